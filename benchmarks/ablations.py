"""Which part of a recipe matters, by what the model still says: answers and text under every variation's resident sets.

    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations --train NAME ...
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations --share 0/8
    python -m benchmarks.ablations smollm2-quickstart --out runs/ablations
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/correction --correction 8
    python -m benchmarks.ablations gemma-3-270m-long runs/long/*/train --out runs/long/outputs --length 8192 \
        --length 32768 --ask recipe --ask listwise_mass --correction 8 --report package:pandas

Trains every variation on the same traces (--train: only these), asks every held-out question and follows every text
under all of them (--ask: these; --share K/N: every N-th document from the K-th on, for processes side by side), and
prints the tables of what OUT holds, which --train and --share leave to another call; a stopped run continues. Choices
are made on the `development` documents; the `report` ones are looked at afterwards (--set). They share nothing:
development reads another source (--development), with the wordings and key words of training, report what the recipe
holds out, or a source of its own (--report), with wordings and key words that nothing else has. A table has, for each
variation, needles right, KL of the next token from full attention and their differences from the recipe and of
recency's and mean-pooled keys' from it on the same documents with 95 % intervals, then what the held-back training
documents said: peak entropy, golden and mass recall; and how each of those ranks the variations beside the outcomes
(Spearman, for texts and questions of all lengths). OUT/ablations.json holds every row.

Without --length the documents are those that the recipe holds out, from SEEDS seeds, under `decode.budget`. With it
the questions and texts are those of `lookahead benchmark`, as its section of the recipe says (--task: only these).
Texts are then followed under the largest of `benchmark.budgets` and questions asked under the smallest.

--correction CHUNKS asks the recipe's indexer also with a per-step correction of so many chunks, which come off its
budget, by each token's own query and by that of the one before, where the budget buys twice as many; the table then
says what was fetched (chunks a token) and the bytes of mean keys.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from benchmarks.ablation_tables import DIAGNOSES, RECIPE, SETS, correlations, rows, tables
from benchmarks.machine import origin
from benchmarks.masked import Continuation, MaskedModel, Policy, Score, foresight, mean_pooled, recency, trained
from data_gen.backbones.load import load_backbone
from data_gen.core.files import write_atomically
from data_gen.text.documents import draw_documents, heldout_share
from eval.online.examples import Example, TextExample
from eval.online.generated import Haystack, generate_examples
from eval.online.runner import stop_tokens
from eval.online.scorers import fidelity
from eval.runtime.correction import Correction, CorrectionQuery
from indexer_train.data.mixture import mix
from indexer_train.load import load_indexer
from indexer_train.losses import LOSSES
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train
from recipes import Recipe, load_recipe

VARIATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    RECIPE: ({}, {}),
    "joined": ({}, {"loss_options": {"joined": True}}),
    "chosen-by-mass": ({}, {"choose": "mass_recall"}),
    "no-bumps": ({"distance_bumps": 0}, {}),
    "twelve-bumps": ({"distance_bumps": 12}, {}),
    "twice-as-large": ({"heads": 32, "rank": 256}, {}),
    "no-slot": ({"slot": False}, {}),
    "no-scale": ({"scale": False}, {}),
    "joined-by-max": ({"join": "max"}, {}),
    **{loss: ({}, {"loss": loss, "loss_options": {}}) for loss in LOSSES},
}
"""Name -> what it changes of the recipe's indexer and training; a loss that the recipe has anyway is left out."""
UNTRAINED: dict[str, Score] = {"recency": recency, "mean-pooled keys": mean_pooled}
"""Beside the oracles, which are made again for each document."""
Oracle = Callable[[Continuation, int], Score]
"""(what full attention went through, tokens of a window) -> what it needed."""
ORACLES: dict[str, Oracle] = {
    "oracle of peaks": partial(foresight, peaks=True),
    "oracle of mass": partial(foresight, peaks=False),
}
SEEDS = 2
"""Sets of held-out questions, each of the recipe's numbers."""


@dataclass(frozen=True)
class Asked:
    """What one prompt is asked. length: 0 for documents that the recipe holds out; given: read token by token after
    the prompt, which is read with full attention; most: tokens generated after that; values: what a right answer has
    to contain, none for text that is followed."""

    name: str
    length: int
    task: str
    prompt: list[int]
    given: list[int]
    most: int
    values: list[str]


def held_out(
    recipe: Recipe, name: str, source: list[str] | None, follow: int, tokenizer: Any, context: int
) -> Iterator[Asked]:
    """Documents as the recipe holds them out, of SEEDS seeds, for one of SETS; source: text of its own."""
    asked = recipe.documents
    if source is not None:
        asked = asked.model_copy(update={"source": source, "heldout_share": 0.02 if name == "development" else 0.98})
    for seed in range(asked.seed, asked.seed + SEEDS):
        sides = {"train": {}, "heldout": {}, SETS[name]: asked.heldout}
        built = asked.model_copy(update=sides | {"seed": seed})
        for document in draw_documents(built, recipe.trace, tokenizer, context, SETS[name]):
            place = document.prompt - 1 if document.values else len(document.tokens) - follow - 1
            given = document.tokens[place : place + 1] if document.values else document.tokens[place:-1]
            yield Asked(f"{name} {seed} {document.name}", 0, document.task, document.tokens[:place], given,
                        recipe.decode.answer_tokens, document.values)  # fmt: skip


def at_length(
    recipe: Recipe,
    name: str,
    source: list[str] | None,
    lengths: list[int],
    tasks: list[str],
    follow: int,
    tokenizer: Any,
) -> Iterator[Callable[[], Asked]]:
    """What `lookahead benchmark` asks at these lengths, its numbers, for one of SETS, the shortest first."""
    config = recipe.benchmark.model_copy(update={"text_tokens": follow})
    documents = recipe.documents
    share = 1.0 if source is not None else heldout_share(documents)
    where = documents.source if source is None else source
    haystack = Haystack(where, documents.text_field, share, tokenizer, max(lengths), documents.bad_rows)

    def asked(label: str, build: Callable[[], Example | TextExample]) -> Asked:
        example = build()
        if isinstance(example, TextExample):
            place = len(example.tokens) - follow - 1
            prompt, given, most, values = example.tokens[:place], example.tokens[place:-1], 0, []
        else:
            ids = example.prompt(tokenizer, recipe.documents.thinking)
            prompt, given = ids[:-1], [ids[-1], *example.opening(tokenizer)]
            most, values = example.answer_tokens, example.references
        return Asked(label, example.length or 0, example.task, prompt, given, most, values)

    examples = generate_examples(config, lengths, haystack, tokenizer, recipe.documents.thinking, SETS[name])
    for each, build in examples.items():
        if each.rsplit("-", 2)[0] in tasks:
            yield partial(asked, f"{name} {each}", build)


def learn(recipe: Recipe, traces: list[Path], names: list[str], out: Path) -> None:
    """Train what is not trained yet, and measure it on the documents held back from training."""
    store = mix(traces)
    for name in names:
        shape, settings = VARIATIONS[name]
        diagnosis = out / name / "diagnosis.json"
        if diagnosis.exists():
            continue
        config = recipe.train.model_copy(update=settings)
        indexer = train(store, recipe.indexer.model_copy(update=shape), config, out / name)
        _, validation = store.hold_back(config.validation_every)
        rows = [row for row in indexer.spec.provenance.metrics if row.task == "all"]
        values = rows[0].values | MassRecallEvaluator(validation, config.budget)(indexer)
        write_atomically(
            diagnosis, lambda file, values=values: file.write_text(json.dumps({n: values[n] for n in DIAGNOSES}))
        )


def policies_of(recipe: Recipe, out: Path, names: list[str], correction: int, device: torch.device) -> list[Policy]:
    """What is asked of every document but the oracles: `names`, of which those that are trained lie in `out`."""
    scores: dict[str, Score] = {name: trained(load_indexer(out / name / "indexer").to(device)) for name in names}
    asked = [Policy(name, score, 0.0) for name, score in (scores | UNTRAINED).items()]
    for query in get_args(CorrectionQuery) if correction else ():
        corrected = Correction(chunks=correction, query=query)
        asked.append(Policy(f"{RECIPE} + {correction} by {query}", scores[RECIPE], 0.0, corrected))
    return asked


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
            log_full = followed(masked, full, asked.given, window)
        budgets = recipe.benchmark.budgets if asked.length else [recipe.decode.budget]
        budget = min(budgets) if asked.values else max(budgets)
        bought = masked.chunking.kept(budget, prompt.tokens)
        beside = [replace(each, budget=budget) for each in policies
                  if each.correction is None or bought >= 2 * each.correction.chunks]  # fmt: skip
        beside += [Policy(name, oracle(full, window), budget) for name, oracle in oracles.items()]
        going = masked.begin(prompt, beside)
        if asked.values:
            said += answers(masked, going, asked.given, asked.most, window, ended)
            values = [{"right": right(tokenizer.decode(each), asked.values)} for each in said]
        else:
            logits = followed(masked, going, asked.given, window)
            pairs = [fidelity(each, log_full[0]) for each in [log_full[0], *logits]]
            values = [{"agreement": float(a.mean()), "kl": float(k.mean())} for a, k in pairs]
        kept = [share for each in (full, going) for share in torch.stack(each.kept).mean(dim=0).tolist()]
        every_policy = [*full.policies, *beside]
        runs = {
            policy.name: value | {"kept": share}
            for policy, value, share in zip(every_policy, values, kept, strict=True)
        }
        if any(policy.correction for policy in policies):
            held = sum(means.nbytes for means in prompt.means.values())
            for each, policy, fetched in zip(
                (full, *[going] * len(beside)), every_policy, [0.0, *going.fetched.tolist()], strict=True
            ):
                means = 0 if policy.correction is None else held
                runs[policy.name] |= {"fetched": fetched / each.read, "mean_key_bytes": means}
        with journal.open("a") as file:
            record = {"name": asked.name, "set": asked.name.split()[0], "tokens": asked.length, "task": asked.task}
            file.write(json.dumps(record | {"runs": runs, "origin": made}) + "\n")


def right(answer: str, values: list[str]) -> bool:
    """Whether every value is in the answer: what is written after it changes nothing."""
    return all(value in answer for value in values)


def followed(masked: MaskedModel, going: Continuation, tokens: list[int], window: int) -> list[torch.Tensor]:
    """Log-probabilities of the next token [tokens, vocabulary] of each row, refreshed every `window` tokens."""
    parts: list[list[torch.Tensor]] = [[] for _ in going.policies]
    for piece in torch.tensor(tokens).split(window):
        masked.refresh(going)
        for part, logits in zip(parts, masked.read(going, piece.expand(len(parts), -1)), strict=True):
            part.append(logits.float().log_softmax(dim=-1))
    return [torch.cat(part) for part in parts]


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
    tokens, over, due = torch.tensor([given]).expand(len(said), -1), [False] * len(said), 0
    for _ in range(most):
        if going.read >= due:
            masked.refresh(going)
            due = going.read + window
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
    parser.add_argument("--train", action="append", choices=list(VARIATIONS), help="these only, and ask nothing")
    parser.add_argument("--ask", action="append", choices=list(VARIATIONS), help="these only, the recipe among them")
    parser.add_argument("--share", help="K/N: ask every N-th document from the K-th on, and train nothing")
    parser.add_argument("--set", action="append", choices=SETS, help="asked only these; both by default")
    parser.add_argument("--length", type=int, action="append", default=[], help="tokens of the documents asked about")
    parser.add_argument("--task", action="append", help="asked at these lengths, for those of the recipe's benchmark")
    parser.add_argument("--development", action="append", help="sources of the development documents; stdlib if none")
    parser.add_argument("--report", action="append", help="sources of the report documents")
    parser.add_argument("--correction", type=int, default=0, metavar="CHUNKS", help="the recipe also with a correction")
    parser.add_argument("--follow", type=int, default=128, help="tokens followed of each text")
    arguments = parser.parse_args()
    recipe, out = load_recipe(arguments.recipe), arguments.out
    every = [name for name in VARIATIONS if name != recipe.train.loss]
    if arguments.traces and arguments.share is None:
        learn(recipe, arguments.traces, arguments.train or arguments.ask or every, out)
    if arguments.traces and arguments.train is None:
        model, tokenizer = load_backbone(recipe.backbone)
        context = model.config.get_text_config(decoder=True).max_position_embeddings
        sources = {"development": arguments.development or ["stdlib"], "report": arguments.report}
        follow, lengths, tasks = arguments.follow, arguments.length, arguments.task or list(recipe.benchmark.tasks)
        built = (
            build
            for name in arguments.set or SETS
            for build in (
                at_length(recipe, name, sources[name], lengths, tasks, follow, tokenizer)
                if lengths
                else (
                    lambda each=each: each for each in held_out(recipe, name, sources[name], follow, tokenizer, context)
                )
            )
        )
        names = arguments.ask or [name for name in every if (out / name / "indexer").exists()]
        asked = policies_of(recipe, out, names, arguments.correction, model.device)
        first, of = map(int, (arguments.share or "0/1").split("/"))
        masked = MaskedModel(model, recipe.trace.chunking)
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
