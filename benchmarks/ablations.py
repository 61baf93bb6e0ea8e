"""Which part of a recipe matters, by what the model still says: answers and text under every variation's resident sets.

    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations --train NAME ...
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations --share 0/8
    python -m benchmarks.ablations smollm2-quickstart --out runs/ablations
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/correction --correction 8
    python -m benchmarks.ablations gemma-3-270m-long runs/long/*/train --out runs/long/outputs --length 8192 \
        --length 32768 --ask recipe --ask listwise_mass --correction 8 --report package:pandas
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations \
        --variant six-layers=six-layers.yaml:runs/six-layers/train

Trains every variation (benchmarks/variations.py) on the same traces (--train: only these), asks every held-out question
and follows every text under all of them (--ask: these; --share K/N: every N-th document from the K-th on, for processes
side by side), and prints the tables of what OUT holds, which --train and --share leave to another call; a stopped run
continues. Choices are made on the `development` documents; the `report` ones are looked at afterwards (--set). They
share nothing: development reads another source (--development), with the wordings and key words of training, report
what the recipe holds out, or a source of its own (--report), with wordings and key words that nothing else has. A table
has, for each variation, needles right, KL of the next token from full attention and their differences from the recipe
and of recency's and mean-pooled keys' from it on the same documents with 95 % intervals, then what documents held back
from training said (--diagnose: those of these traces), and how each of that ranks the variations beside the outcomes
(Spearman, for texts and questions of all lengths). OUT/ablations.json holds every row.

Without --length the documents are those that the recipe holds out, from SEEDS seeds, under `decode.budget`. With it
the questions and texts are those of `lookahead benchmark`, as its section of the recipe says (--task: only these).
Texts are then followed under the largest of `benchmark.budgets` and questions asked under the smallest; tasks come in
the order of --task, the shortest length first (--examples, --texts: fewer of each).

Labels, traced layers and documents are part of traces. --variant NAME=RECIPE:TRACES is another recipe (a name or a
file) trained on such, TRACES with commas, beside the variations; it is asked the same documents under the same budget,
with its own window, so backbone and chunking must be the same. It is named again where others are asked (--share).

--epochs compares the epochs of one training in place of variations: those of the recipe, each kept as an indexer,
`recipe` being the one that its criterion chose. The ranks then say by what an epoch should be chosen.

--correction CHUNKS asks the recipe's indexer also with a per-step correction of so many chunks, which come off its
budget, by each token's own query and by that of the one before, where the budget buys twice as many. The table then
says what was fetched (chunks a token) and the bytes of the keys by which chunks are chosen, and has rows that spend
as much: recency with the recipe's bytes of such keys as more keys and values, and recency, mean-pooled keys and the
recipe with the correction's.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args, overload

import torch
from tqdm import tqdm

from benchmarks.ablation_tables import RECIPE, SETS, correlations, rows, tables
from benchmarks.asked import Asked, at_length, held_out, right
from benchmarks.machine import origin
from benchmarks.masked import Continuation, MaskedModel, Policy, Score
from benchmarks.masked_scores import foresight, mean_pooled, recency, trained
from benchmarks.variations import EPOCH, VARIATIONS, Batches, Other, learn, learn_epochs
from data_gen.backbones.load import load_backbone
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from eval.online.runner import stop_tokens
from eval.online.scorers import fidelity
from eval.runtime.correction import Correction, CorrectionQuery
from indexer_train.load import load_indexer
from recipes import Recipe, load_recipe

Oracle = Callable[[Continuation, int], Score]
"""(what full attention went through, tokens of a window) -> what it needed."""
ORACLES: dict[str, Oracle] = {
    "oracle of peaks": partial(foresight, peaks=True),
    "oracle of mass": partial(foresight, peaks=False),
}


def policies_of(out: Path, names: list[str], window: int, correction: int, masked: MaskedModel) -> list[Policy]:
    """What is asked of every document but the oracles: `names`, of which those that are trained lie in `out`.

    window: tokens between refreshes of those that look as far ahead. Raises InputError for other chunks. With a
    correction also baselines that spend as much on keys and values as others do on keys to choose by.
    """
    layers, found = len(masked.layers), []
    share = 1 / (2 * masked.chunking.tokens * layers)
    """What a layer's mean keys, of two bytes a value as the cache's are, take of all layers' keys and values."""
    for name in names:
        indexer = load_indexer(out / name / "indexer").to(masked.model.device)
        spec = indexer.spec
        if spec.chunking != masked.chunking:
            raise InputError(f"{name}: its chunks are not those of what is asked")
        every = None if spec.window == window else spec.window
        found.append(Policy(name, trained(indexer), 0.0, every=every, key_layers=len(spec.layers)))
    own = next((policy for policy in found if policy.name == RECIPE), None)
    if own:
        found += [replace(own, name=f"{RECIPE}, every {n}", every=n) for n in {each.every for each in found} if n]
    pooled = Policy("mean-pooled keys", mean_pooled, 0.0, key_layers=layers)
    newest = Policy("recency", recency, 0.0)
    found += [newest, pooled]
    if correction and own:
        for query in get_args(CorrectionQuery):
            corrected = Correction(chunks=correction, query=query)
            found.append(replace(own, name=f"{RECIPE} + {correction} by {query}", correction=corrected,
                                 key_layers=own.key_layers + layers))  # fmt: skip
        most = found[-1].key_layers
        found.append(replace(newest, name="recency, bytes of the recipe", extra=own.key_layers * share))
        for each in (own, newest, pooled):
            extra = (most - each.key_layers) * share
            found.append(replace(each, name=f"{each.name}, bytes of the correction", extra=extra))
    return found


def ask(
    recipe: Recipe,
    policies: list[Policy],
    masked: MaskedModel,
    tokenizer: Any,
    every: Iterable[Asked],
    journal: Path,
    oracles: dict[str, Oracle] = ORACLES,
) -> None:
    """Go on after every prompt under every policy; `journal` keeps the finished ones."""
    stop, window, made = stop_tokens(masked.model, tokenizer), recipe.trace.window, origin(masked.model.device)
    done = {json.loads(line)["name"] for line in journal.read_text().splitlines()} if journal.exists() else set()
    for asked in tqdm((each for each in every if each.name not in done), "asking"):
        prompt = masked.prompt(asked.prompt)
        full = masked.begin(prompt, [Policy("full", None, 1.0)], watch=True)
        if asked.values:
            ended = lambda said, values=asked.values: right(tokenizer.decode(said), values) or said[-1] in stop  # noqa: E731
            said = answers(masked, full, asked.given, asked.most, window, ended)
        else:
            (log_full,) = followed(masked, full, asked.given, window)
        budgets = recipe.benchmark.budgets if asked.length else [recipe.decode.budget]
        budget = min(budgets) if asked.values else max(budgets)
        bought = masked.chunking.kept(budget, prompt.tokens)
        beside = [replace(each, budget=budget) for each in policies
                  if each.correction is None or bought >= 2 * each.correction.chunks]  # fmt: skip
        beside += [Policy(name, oracle(full, window), budget) for name, oracle in oracles.items()]
        going = masked.begin(prompt, beside)
        if asked.values:
            said = [*said, *answers(masked, going, asked.given, asked.most, window, ended)]
            values = [{"right": right(tokenizer.decode(each), asked.values)} for each in said]
        else:
            pairs = [fidelity(log_full, log_full), *followed(masked, going, asked.given, window, log_full)]
            values = [{"agreement": float(a.mean()), "kl": float(k.mean())} for a, k in pairs]
        kept = [share for each in (full, going) for share in torch.stack(each.kept).mean(dim=0).tolist()]
        every_policy = [*full.policies, *beside]
        runs = {
            policy.name: value | {"kept": share}
            for policy, value, share in zip(every_policy, values, kept, strict=True)
        }
        if any(policy.correction for policy in policies):
            per_layer = next(iter(prompt.means.values())).nbytes  # the keys that an indexer reads are as wide
            for each, policy, fetched in zip(
                (full, *[going] * len(beside)), every_policy, [0.0, *going.fetched.tolist()], strict=True
            ):
                keys = policy.key_layers * per_layer
                runs[policy.name] |= {"fetched": fetched / each.read, "key_bytes": keys}
        with journal.open("a") as file:
            record = {"name": asked.name, "set": asked.name.split()[0], "tokens": asked.length, "task": asked.task}
            file.write(json.dumps(record | {"runs": runs, "origin": made}) + "\n")


@overload
def followed(masked: MaskedModel, going: Continuation, tokens: list[int], window: int) -> list[torch.Tensor]: ...
@overload
def followed(
    masked: MaskedModel, going: Continuation, tokens: list[int], window: int, full: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]: ...
def followed(
    masked: MaskedModel, going: Continuation, tokens: list[int], window: int, full: torch.Tensor | None = None
) -> list[torch.Tensor] | list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each row log-probabilities of the next token [tokens, vocabulary], or with those of full attention how it
    compares with them (`fidelity`): a large vocabulary's are kept for one row alone. Refreshed every `window` tokens.

    A policy that is refreshed more often is so after a whole part of the window.
    """
    parts: list[list[Any]] = [[] for _ in going.policies]
    size = min([window, *(each.every for each in going.policies if each.every)])
    for first, piece in enumerate(torch.tensor(tokens).split(size)):
        masked.refresh(going, window)
        for part, logits in zip(parts, masked.read(going, piece.expand(len(parts), -1)), strict=True):
            log_p = logits.float().log_softmax(dim=-1)
            part.append(log_p if full is None else fidelity(log_p, full[first * size :][: len(log_p)]))
    if full is None:
        return [torch.cat(part) for part in parts]
    return [(torch.cat([agrees for agrees, _ in part]), torch.cat([kl for _, kl in part])) for part in parts]


def answers(
    masked: MaskedModel,
    going: Continuation,
    given: list[int],
    most: int,
    window: int,
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Greedy answers of each row after `given`, of at most `most` tokens; `ended`: tokens -> whether that was all."""
    said: list[list[int]] = [[] for _ in going.policies]
    tokens, over = torch.tensor([given]).expand(len(said), -1), [False] * len(said)
    for _ in range(most):
        if going.read >= min(going.due):
            masked.refresh(going, window)
        tokens = masked.read(going, tokens, last=True)[:, -1:].argmax(dim=-1)
        for row, token in enumerate(tokens.flatten().tolist()):
            if not over[row]:
                said[row].append(token)
                over[row] = ended(said[row])
        if all(over):
            break
    return said


def main() -> None:
    """Train, ask, print; OUT/ablations.json holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("traces", type=Path, nargs="*", help="to train on; without them what is there is printed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", action="append", help="these only, and ask nothing")
    parser.add_argument("--ask", action="append", help="these only, the recipe among them")
    parser.add_argument("--epochs", action="store_true", help="those of the recipe's training, not variations")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=RECIPE:TRACES", help="beside them")
    parser.add_argument("--batches", choices=get_args(Batches), help="where training makes them, not where recipes say")
    parser.add_argument("--share", help="K/N: ask every N-th document from the K-th on, and train nothing")
    parser.add_argument("--set", action="append", choices=SETS, help="asked only these; both by default")
    parser.add_argument("--length", type=int, action="append", default=[], help="tokens of the documents asked about")
    parser.add_argument("--task", action="append", help="asked at these lengths, for those of the recipe's benchmark")
    parser.add_argument("--examples", type=int, help="questions of each task and length, for the recipe's number")
    parser.add_argument("--texts", type=int, help="texts of each length, for the recipe's number")
    parser.add_argument("--development", action="append", help="sources of the development documents; stdlib if none")
    parser.add_argument("--report", action="append", help="sources of the report documents")
    parser.add_argument("--diagnose", type=Path, metavar="TRACES", help="on these, for what training holds back")
    parser.add_argument("--correction", type=int, default=0, metavar="CHUNKS", help="the recipe also with a correction")
    parser.add_argument("--follow", type=int, default=128, help="tokens followed of each text")
    arguments = parser.parse_args()
    recipe, out = load_recipe(arguments.recipe), arguments.out
    numbers = {name: value for name in ("examples", "texts") if (value := getattr(arguments, name)) is not None}
    recipe = recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update=numbers)})
    others = dict(map(Other.of, arguments.variant))
    every = [name for name in VARIATIONS if name != recipe.train.loss] + list(others)
    known = [*VARIATIONS, *others]
    if arguments.epochs:
        known = every = [RECIPE, *(f"{EPOCH}{number + 1}" for number in range(recipe.train.epochs))]
        if others:
            parser.error("--epochs: of one training; leave --variant out")
    for name in [*(arguments.train or []), *(arguments.ask or [])]:
        if name not in known:
            parser.error(f"{name}: none of what is compared ({', '.join(known)})")
    if arguments.epochs and arguments.traces and arguments.share is None:
        learn_epochs(recipe, arguments.traces, out, arguments.batches, arguments.diagnose)
    elif arguments.traces and arguments.share is None:
        learn(recipe, arguments.traces, arguments.train or arguments.ask or every, out, others, arguments.batches,
              arguments.diagnose)  # fmt: skip
    if arguments.traces and arguments.train is None:
        model, tokenizer = load_backbone(recipe.backbone)
        context = model.config.get_text_config(decoder=True).max_position_embeddings
        sources = {"development": arguments.development or ["stdlib"], "report": arguments.report}
        follow, lengths, tasks = arguments.follow, arguments.length, arguments.task or list(recipe.benchmark.tasks)
        drawn = partial(held_out, follow=follow, tokenizer=tokenizer, context=context)
        built = (
            build
            for name in arguments.set or SETS
            for build in (
                at_length(recipe, name, sources[name], lengths, tasks, follow, tokenizer)
                if lengths
                else (lambda each=each: each for each in drawn(recipe, name, sources[name]))
            )
        )
        names = arguments.ask or [name for name in every if (out / name / "indexer").exists()]
        masked = MaskedModel(model, recipe.trace.chunking)
        asked = policies_of(out, names, recipe.trace.window, arguments.correction, masked)
        first, of = map(int, (arguments.share or "0/1").split("/"))
        journal = out / f"asked-{first}-of-{of}.jsonl"
        ask(recipe, asked, masked, tokenizer, (build() for build in islice(built, first, None, of)), journal)
    if arguments.train or arguments.share:
        return  # others go on beside this process: the tables are printed by a call of its own
    records = [json.loads(line) for file in sorted(out.glob("asked-*.jsonl")) for line in file.read_text().splitlines()]
    if not records:
        parser.error(f"{out}: nothing asked yet; name the traces")
    found = rows(records, out)
    print(tables(found))
    made = {json.dumps(record["origin"]): record["origin"] for record in records}
    report = json.dumps(
        {"origins": list(made.values()), "rows": found, "rank_correlations": correlations(found)}, indent=1
    )
    write_atomically(out / "ablations.json", lambda path: path.write_text(report + "\n"))


if __name__ == "__main__":
    main()
