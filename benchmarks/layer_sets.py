"""One resident set for all layers, or one for each group of layers: what does the model still say, at equal bytes?

    python -m benchmarks.layer_sets smollm2-quickstart --out runs/layer-sets --groups 3 6 --own 3
    python -m benchmarks.layer_sets smollm2-quickstart --out runs/layer-sets --groups 3 6 --own 3 --share 0.3 \
        --tokens 1000 1200 --follow 64 --questions 4 --output benchmarks/results/layer-sets-cpu.json

Traces the recipe's training documents once (--share: that part of each kind; --tokens: other lengths, here and in what
is asked) and trains indexers on them, all with the recipe's settings. `shared` is the recipe's: one indexer, labels
pooled over all layers. `N groups` cuts the layers into N contiguous groups (--groups), each with an indexer of its own,
whose labels are pooled over the group's layers alone. All of them read the states and keys of the recipe's layers; with
`own layers` (--own) each reads as many layers of its own group. Oracles of peaks are pooled in the same ways, down to a
set for each layer.

Every layer keeps the recipe's budget, so that all sets take equal bytes. They are masks over one prompt
(benchmarks/masked.py). Texts are followed before questions are asked, of the development and of the report documents
of benchmarks/ablations.py (--texts, --questions: of a seed, the latter of each kind). A stopped run continues. The
table has KL of the next token from full attention and questions right, and differences from the one shared set and from
recency on the same documents with 95 % intervals.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import results_tables
from benchmarks.ablation_tables import SETS
from benchmarks.ablations import Oracle, ask, held_out
from benchmarks.masked import Continuation, MaskedModel, Policy, Score, foresight, recency, trained
from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from data_gen.generate import generate
from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import Manifest, Planned, SparseAttention
from indexer_train.load import load_indexer
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.model import MemoryIndexer
from indexer_train.training.trainer import train
from recipes import Recipe, load_recipe

SHARED, ORACLE, RECENCY = "shared", "oracle, ", "recency"
SOURCES = {"development": ["stdlib"], "report": None}
"""As benchmarks/ablations.py has them; None: what the recipe holds out."""


@dataclass(frozen=True)
class Arm:
    """One way to share sets. groups: the layers of each set; reads: those that each set's indexer reads."""

    groups: list[list[int]]
    reads: list[list[int]]


class GroupDocument(TraceDocument):
    """A document whose oracle is that of some layers. columns: their places among the full-attention layers."""

    def __init__(self, path: Path, trace: TraceConfig, planned: Planned, columns: list[int]) -> None:
        super().__init__(path, trace, planned)
        self.columns = columns

    @cached_property
    def attention(self) -> SparseAttention:
        """Probabilities of these layers only. Raises InputError where chunks were dropped by what all layers need."""
        names = ("pointers", "chunks", "mean", "peak", "rest")
        whole = SparseAttention(*(self._file.get_tensor(f"oracle.{name}") for name in names))
        if bool(whole.rest.any()):
            raise InputError(f"{self.path}: raise trace.top_chunks, so that no chunk is dropped")
        return SparseAttention(
            whole.pointers, whole.chunks, whole.mean[:, self.columns], whole.peak[:, self.columns], whole.rest
        )


class GroupStore(TraceStore):
    """A view of a store for the indexer of one group of layers. columns: see `GroupDocument`."""

    def __init__(self, root: Path, manifest: Manifest, files: dict[Path, Planned], columns: list[int]) -> None:
        super().__init__(root, manifest, files)
        self.columns = columns

    @classmethod
    def of(cls, store: TraceStore, group: list[int], reads: list[int]) -> "GroupStore":
        """Labels pooled over the layers `group`; states and keys of the layers `reads`."""
        trace = store.manifest.trace.model_copy(update={"layers": reads})
        columns = [store.manifest.backbone.full_layers.index(layer) for layer in group]
        return cls(store.root, store.manifest.model_copy(update={"trace": trace}), store.files, columns)

    def only(self, paths: Iterable[Path]) -> "GroupStore":
        """A view of this view: these of its files."""
        return GroupStore(self.root, self.manifest, {path: self.files[path] for path in paths}, self.columns)

    def document(self, path: Path) -> GroupDocument:
        """One of `paths`."""
        return GroupDocument(path, self.manifest.trace, self.files[path], self.columns)


def cut(layers: Sequence[int], count: int) -> list[list[int]]:
    """`count` contiguous groups of layers, as equal as can be."""
    if not 1 <= count <= len(layers):
        raise InputError(f"{count} groups of {len(layers)} layers")
    places = [number * len(layers) // count for number in range(count + 1)]
    return [list(layers[first:last]) for first, last in pairwise(places)]


def spread(group: Sequence[int], count: int) -> list[int]:
    """At most `count` layers of a group, evenly spread."""
    places = {min(len(group) - 1, round((number + 0.5) * len(group) / count)) for number in range(count)}
    return [group[place] for place in sorted(places)]


def arms_of(layers: list[int], reads: list[int], counts: Iterable[int], own: Iterable[int]) -> dict[str, Arm]:
    """The shared set, then those of groups. layers: all full-attention ones; reads: the recipe's."""
    found = {SHARED: Arm([layers], [reads])}
    found |= {f"{count} groups": Arm(cut(layers, count), [reads] * count) for count in counts}
    for count in own:
        groups = cut(layers, count)
        found[f"{count} groups, own layers"] = Arm(groups, [spread(group, len(reads)) for group in groups])
    return found


def by_layer(scores: Sequence[Score], groups: Sequence[Sequence[int]]) -> Score:
    """Each group's score for all of its layers: [layers, N]."""

    def score(going: Continuation, row: int) -> torch.Tensor:
        pairs = zip(scores, groups, strict=True)
        return torch.cat([each(going, row).expand(len(group), -1) for each, group in pairs])

    return score


def oracle_of(groups: Sequence[Sequence[int]]) -> Oracle:
    """Perfect foresight of what each group's layers look at most."""

    def oracle(full: Continuation, window: int) -> Score:
        return by_layer([foresight(full, window, True, group) for group in groups], groups)

    return oracle


def learn(store: TraceStore, recipe: Recipe, arm: Arm, out: Path) -> list[MemoryIndexer]:
    """The indexer of each group, trained unless it is there."""
    found = []
    for number, (group, reads) in enumerate(zip(arm.groups, arm.reads, strict=True)):
        folder = out / f"{number}"
        if (folder / "indexer").exists():
            found.append(load_indexer(folder / "indexer"))
        else:
            found.append(train(GroupStore.of(store, group, reads), recipe.indexer, recipe.train, folder))
    return found


def rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per set, kind and policy: `kl` of texts, `right` of questions, means over `documents`.

    Differences beside the one set of the same choice (trained or oracle) and beside recency are by pairs,
    [mean, low, high]; fall: share of the one set's KL that is gone.
    """
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        cells[record["set"], "text" if record["task"] == "text" else "questions"].append(record["runs"])
    found = []
    for (part, kind), members in sorted(cells.items()):
        metric = "kl" if kind == "text" else "right"
        values = {name: np.array([float(runs[name][metric]) for runs in members]) for name in members[0]}
        for name, own in values.items():
            one = ORACLE + SHARED if name.startswith(ORACLE) else SHARED
            row: dict[str, Any] = {"set": part, "kind": kind, "policy": name, "documents": len(own)}
            row |= {metric: float(own.mean()), "kept": float(np.mean([runs[name]["kept"] for runs in members]))}
            for beside, other in ((SHARED, values[one]), (RECENCY, values[RECENCY])):
                gaps = bootstrap_means((own - other)[:, None])
                row[f"{metric}_beside_{beside}"] = [float(each[0]) for each in gaps]
            if metric == "kl":
                row["fall"] = float(1 - own.mean() / values[one].mean())
            found.append(row)
    return found


def main() -> None:
    """Trace, train, ask, print; --output holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True, help="for traces, indexers and what was asked")
    parser.add_argument("--groups", type=int, nargs="*", default=[], help="numbers of groups: recipe's layers read")
    parser.add_argument("--own", type=int, nargs="*", default=[], help="numbers of groups: own layers read")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipe's training documents of each kind")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"), help="of every document")
    parser.add_argument("--texts", type=int, help="held-out texts of a seed, for the recipe's number")
    parser.add_argument("--questions", type=int, help="held-out questions of a seed and kind, for the recipe's number")
    parser.add_argument("--follow", type=int, default=128, help="tokens followed of each text")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    recipe, out = load_recipe(args.recipe), args.out
    model, tokenizer = load_backbone(recipe.backbone)
    masked = MaskedModel(model, recipe.trace.chunking)
    arms = arms_of(masked.layers, recipe.trace.layers, args.groups, args.own)
    read = sorted({layer for arm in arms.values() for reads in arm.reads for layer in reads})
    numbers = {task: round(args.share * number) for task, number in recipe.documents.train.items()}
    lengths = recipe.documents.tokens if args.tokens is None else tuple(args.tokens)
    documents = recipe.documents.model_copy(update={"train": numbers, "tokens": lengths})
    trace = recipe.trace.model_copy(update={"layers": read})
    (store,) = generate(adapter(model), tokenizer, documents, trace, out / "traces", ["train"], progress=tqdm)
    policies = [Policy(RECENCY, recency, 0.0)]
    for name, arm in arms.items():
        scores = [trained(indexer.to(model.device)) for indexer in learn(store, recipe, arm, out / name)]
        policies.append(Policy(name, by_layer(scores, arm.groups), 0.0))
    counts = sorted({1, *args.groups, *args.own, len(masked.layers)})
    named = {1: SHARED, len(masked.layers): "a set a layer"}
    oracles = {ORACLE + named.get(count, f"{count} groups"): oracle_of(cut(masked.layers, count)) for count in counts}
    kinds = {task: args.texts if task == "text" else args.questions for task in recipe.documents.heldout}
    held = recipe.documents.heldout | {task: number for task, number in kinds.items() if number is not None}
    asked = recipe.model_copy(update={"documents": documents.model_copy(update={"heldout": held})})
    context = model.config.get_text_config(decoder=True).max_position_embeddings
    every = [each for name in SETS for each in held_out(asked, name, SOURCES[name], args.follow, tokenizer, context)]
    every.sort(key=lambda each: bool(each.values))  # texts decide: a run that is stopped has them first
    journal = out / "asked.jsonl"
    ask(recipe, policies, masked, tokenizer, every, journal, oracles)
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    made = {json.dumps(record["origin"]): record["origin"] for record in records}
    found = {
        "origins": list(made.values()),
        "trained_on": numbers,
        "tokens": lengths,
        "arms": {name: {"groups": arm.groups, "reads": arm.reads} for name, arm in arms.items()},
        "rows": rows(records),
    }
    print("\n\n".join(results_tables.layer_sets(found)))
    if args.output:
        write_atomically(args.output, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))


if __name__ == "__main__":
    main()
