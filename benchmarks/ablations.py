"""Which part of a recipe matters, by what the model still says: answers and text under every variation's resident sets.

    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations --train NAME ...
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/ablations --share 0/8
    python -m benchmarks.ablations smollm2-quickstart --out runs/ablations
    python -m benchmarks.ablations smollm2-quickstart runs/quickstart/traces/train --out runs/correction --correction 8

Trains every variation on the same traces (--train: only these), asks every held-out question and follows every text
under all of them (--share K/N: every N-th document from the K-th on, for processes side by side), and prints the tables
of what OUT holds, which --train and --share leave to another call; a stopped run continues. Choices are made on the
`development` documents; the `report` ones are looked at afterwards. They share nothing: development reads another
source (--development), with the wordings and key words of training, report what the recipe holds out, with wordings and
key words that nothing else has. A table has, for each variation, needles right, KL of the next token from full
attention and their differences from the recipe on the same documents with 95 % intervals, then what the held-back
training documents said: peak entropy, golden and mass recall; and how each of those ranks the variations beside the
outcomes (Spearman). OUT/ablations.json holds every row.

--correction CHUNKS asks the recipe's indexer also with a per-step correction of so many chunks, which come off its
budget, by each token's own query and by that of the one before; the table then says what was fetched (chunks a token)
and the bytes of mean keys. It trains and asks the recipe alone, in an OUT of its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import origin
from benchmarks.masked import Continuation, MaskedModel, Policy, foresight, recency, trained
from data_gen.backbones.load import load_backbone
from data_gen.core.files import write_atomically
from data_gen.text.documents import Document, build_documents
from data_gen.traces.store import TraceStore
from eval.online.runner import stop_tokens
from eval.online.scorers import fidelity
from eval.report.tables import table
from eval.runtime.correction import Correction, CorrectionQuery
from indexer_train.load import load_indexer
from indexer_train.losses import LOSSES
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train
from recipes import Recipe, load_recipe

RECIPE = "recipe"
VARIATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    RECIPE: ({}, {}),
    "joined": ({}, {"loss_options": {"joined": True}}),
    "half-peaks": ({}, {"loss": "listwise_mass", "loss_options": {"peaks": 0.5}}),
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
SETS = ("development", "report")
SEEDS = 2
"""Sets of held-out questions, each of the recipe's numbers."""
DIAGNOSES = ("peak_entropy", "golden_recall", "mass_recall")


def documents(recipe: Recipe, name: str, development: str, tokenizer: Any, context: int) -> list[tuple[str, Document]]:
    """(name, document) of one of SETS: as many as the recipe holds out, SEEDS times."""
    found = []
    for seed in range(recipe.documents.seed, recipe.documents.seed + SEEDS):
        asked, split = recipe.documents.model_copy(update={"seed": seed}), "heldout"
        if name == "development":
            new = {"source": development, "train": asked.heldout, "heldout": {}, "heldout_share": 0.5}
            asked, split = asked.model_copy(update=new), "train"
        built = build_documents(asked, recipe.trace, tokenizer, context, split)
        found += [(f"{name} {seed} {document.name}", document) for document in built]
    return found


def learn(recipe: Recipe, traces: Path, names: list[str], out: Path) -> None:
    """Train what is not trained yet, and measure it on the documents held back from training."""
    store = TraceStore.open(traces)
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


def ask(recipe: Recipe, out: Path, development: str, follow: int, share: tuple[int, int], correction: int) -> None:
    """Go on behind every document's prompt under every trained variation; OUT/asked-K.jsonl keeps the finished ones."""
    model, tokenizer = load_backbone(recipe.backbone)
    masked, stop = MaskedModel(model, recipe.trace.chunking), stop_tokens(model, tokenizer)
    indexers = {name: load_indexer(out / name / "indexer") for name in VARIATIONS if (out / name / "indexer").exists()}
    scores = {name: trained(indexer.to(model.device)) for name, indexer in indexers.items()} | {"recency": recency}
    budget, made = recipe.decode.budget, origin(model.device)
    asked = [Policy(name, score, budget) for name, score in scores.items()]
    for query in get_args(CorrectionQuery) if correction else ():
        corrected = Correction(chunks=correction, query=query)
        asked.append(Policy(f"{RECIPE} + {correction} by {query}", scores[RECIPE], budget, corrected))
    context, window = model.config.get_text_config(decoder=True).max_position_embeddings, recipe.trace.window
    journal = out / f"asked-{share[0]}-of-{share[1]}.jsonl"
    done = {json.loads(line)["name"] for line in journal.read_text().splitlines()} if journal.exists() else set()
    every = [each for name in SETS for each in documents(recipe, name, development, tokenizer, context)]
    for name, document in tqdm([each for each in every[share[0] :: share[1]] if each[0] not in done], "asking"):
        place = document.prompt - 1 if document.values else len(document.tokens) - follow - 1
        prompt = masked.prompt(document.tokens[:place])
        full = masked.begin(prompt, [Policy("full", None, 1.0)], watch=True)
        if document.values:
            ended = lambda said, values=document.values: right(tokenizer.decode(said), values) or said[-1] in stop  # noqa: E731
            most = recipe.decode.answer_tokens
            said = answers(masked, full, document.tokens[place], most, window, ended)
        else:
            log_full = followed(masked, full, document.tokens[place:-1], window)
        policies = [*asked, Policy("oracle of peaks", foresight(full, window, True), budget)]
        policies += [Policy("oracle of mass", foresight(full, window, False), budget)]
        going = masked.begin(prompt, policies)
        if document.values:
            said += answers(masked, going, document.tokens[place], most, window, ended)
            values = [{"right": right(tokenizer.decode(each), document.values)} for each in said]
        else:
            logits = followed(masked, going, document.tokens[place:-1], window)
            pairs = [fidelity(each, log_full[0]) for each in [log_full[0], *logits]]
            values = [{"agreement": float(a.mean()), "kl": float(k.mean())} for a, k in pairs]
        kept = [share for each in (full, going) for share in torch.stack(each.kept).mean(dim=0).tolist()]
        every_policy = [*full.policies, *policies]
        runs = {
            policy.name: value | {"kept": share}
            for policy, value, share in zip(every_policy, values, kept, strict=True)
        }
        if correction:
            held = sum(means.nbytes for means in prompt.means.values())
            for each, policy, fetched in zip(
                (full, *[going] * len(policies)), every_policy, [0.0, *going.fetched.tolist()], strict=True
            ):
                means = 0 if policy.correction is None else held
                runs[policy.name] |= {"fetched": fetched / each.read, "mean_key_bytes": means}
        with journal.open("a") as file:
            file.write(json.dumps({"name": name, "set": name.split()[0], "runs": runs, "origin": made}) + "\n")


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
    masked: MaskedModel, going: Continuation, first: int, most: int, window: int, ended: Any
) -> list[list[int]]:
    """Greedy answers of each row behind `first`, of at most `most` tokens; `ended`: tokens -> whether that was all."""
    said: list[list[int]] = [[] for _ in going.policies]
    tokens, over = torch.full((len(said), 1), first), [False] * len(said)
    for step in range(most):
        if step % window == 0:
            masked.refresh(going)
        tokens = masked.read(going, tokens, last=True)[:, -1:].argmax(dim=-1)
        for row, token in enumerate(tokens.flatten().tolist()):
            if not over[row]:
                said[row].append(token)
                over[row] = ended(said[row])
        if all(over):
            break
    return said


def rows(records: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """A row per set and policy; differences from the recipe by pairs, [mean, low, high]; diagnoses of trained ones."""
    found = []
    for part in SETS:
        members = [record for record in records if record["set"] == part]
        for name in members[0]["runs"] if members else []:
            row: dict[str, Any] = {"set": part, "policy": name}
            for metric in ("right", "kl", "agreement"):
                runs = [record["runs"] for record in members if metric in record["runs"][name]]
                own, ours = (np.array([run[each][metric] for run in runs], float) for each in (name, RECIPE))
                row |= {metric: float(own.mean()), f"{metric}_documents": len(own)}
                row[f"{metric}_difference"] = [float(each[0]) for each in bootstrap_means((own - ours)[:, None])]
            row["kept"] = float(np.mean([record["runs"][name]["kept"] for record in members]))
            for metric in ("fetched", "mean_key_bytes"):
                if metric in members[0]["runs"][name]:
                    row[metric] = float(np.mean([record["runs"][name][metric] for record in members]))
            diagnosis = out / name / "diagnosis.json"
            found.append(row | (json.loads(diagnosis.read_text()) if diagnosis.exists() else {}))
    return found


def correlations(found: list[dict[str, Any]]) -> list[list[Any]]:
    """[set, diagnosis, Spearman with needles right, with KL] over the trained variations."""
    lines = []
    for part in SETS:
        trained_ones = [row for row in found if row["set"] == part and DIAGNOSES[0] in row]
        for name in DIAGNOSES if len(trained_ones) > 2 else ():
            ranks = [np.argsort(np.argsort([row[each] for row in trained_ones])) for each in (name, "right", "kl")]
            lines.append([part, name, *(float(np.corrcoef(ranks[0], other)[0, 1]) for other in ranks[1:])])
    return lines


def tables(found: list[dict[str, Any]]) -> str:
    """What is printed: one row a set and variation, then how diagnoses rank."""

    def differs(value: list[float]) -> str:
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*value)

    counted = any("fetched" in row for row in found)
    lines = [
        [row["set"], row["policy"], f"{row['right'] * row['right_documents']:.0f} of {row['right_documents']}",
         differs(row["right_difference"]), row["kl"], differs(row["kl_difference"]), f"{row['kept']:.1%}",
         *([row["fetched"], row["mean_key_bytes"] / 1e6] if counted else []),
         *(row.get(name, "-") for name in DIAGNOSES)]
        for row in found
    ]  # fmt: skip
    head = ["set", "variation", "right", "beside the recipe", "KL", "beside the recipe", "KV kept"]
    head += [*(["chunks fetched a token", "mean keys, MB"] if counted else []), *DIAGNOSES]
    ranked = table(["set", "diagnosis", "rank: right", "rank: KL"], correlations(found))
    return f"{table(head, lines)}\n\n{ranked}"


def main() -> None:
    """Train, ask, print; OUT/ablations.json holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("traces", type=Path, nargs="?", help="to train on; without them what is there is printed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", action="append", choices=list(VARIATIONS), help="these only, and ask nothing")
    parser.add_argument("--share", help="K/N: ask every N-th document from the K-th on, and train nothing")
    parser.add_argument("--development", default="stdlib", help="source of the development documents")
    parser.add_argument("--correction", type=int, default=0, metavar="CHUNKS", help="the recipe also with a correction")
    parser.add_argument("--follow", type=int, default=128, help="tokens followed of each text")
    arguments = parser.parse_args()
    recipe, out = load_recipe(arguments.recipe), arguments.out
    if arguments.traces is not None and arguments.share is None:
        same = [name for name in VARIATIONS if name == recipe.train.loss]
        every = [RECIPE] if arguments.correction else [name for name in VARIATIONS if name not in same]
        learn(recipe, arguments.traces, arguments.train or every, out)
    if arguments.traces is not None and arguments.train is None:
        first, of = map(int, (arguments.share or "0/1").split("/"))
        ask(recipe, out, arguments.development, arguments.follow, (first, of), arguments.correction)
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
