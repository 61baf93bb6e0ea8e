"""One resident set for all layers, or one for each group of layers: what does the model still say, at equal bytes?

    python -m benchmarks.layer_sets smollm2-quickstart runs/quickstart/traces/train --out runs/layer-sets --groups 3 6
    python -m benchmarks.layer_sets smollm2-quickstart runs/quickstart/traces/train --out runs/layer-sets --groups 3 6 \
        --tokens 1000 1200 --follow 64 --questions 0 --output benchmarks/results/layer-sets-cpu.json
    python -m benchmarks.layer_sets smollm2-quickstart --out runs/layer-oracles --groups 3 6 10 15

Trains indexers on the recipe's traces, or on those of them that there are, all with its settings. `shared` is the
recipe's: one indexer, labels pooled over all layers. `N groups` cuts the layers into N contiguous groups, each with an
indexer of its own, whose labels are pooled over the group's layers alone. All read the states and keys of the layers
that the traces hold. Oracles of peaks are pooled in the same ways, down to a set for each layer. Without traces nothing
is trained, and the oracles alone say what groups could gain.

Every layer keeps the recipe's budget, so that all sets take equal bytes. They are masks over one prompt
(benchmarks/masked.py). Texts are followed before questions are asked, of the development and of the report documents
of benchmarks/ablations.py (--texts, --questions: of a seed, the latter of each kind; --tokens: of other lengths;
--share K/N: every N-th of them from the K-th on, for processes side by side, which leave printing to another call; 0/0
asks none and prints what is there). A stopped run continues. The table has KL of the next token from full attention and
questions right, and differences from the one shared set and from recency on the same documents with 95 % intervals.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results_tables
from benchmarks.ablation_tables import SETS
from benchmarks.ablations import Oracle, ask
from benchmarks.asked import Asked, held_out
from benchmarks.masked import Continuation, MaskedModel, Policy, Score
from benchmarks.masked_scores import foresight, recency, trained
from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
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
    def of(cls, store: TraceStore, group: list[int]) -> "GroupStore":
        """Labels pooled over the layers `group`."""
        full = store.manifest.backbone.full_layers
        return cls(store.root, store.manifest, store.files, [full.index(layer) for layer in group])

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


def learn(store: TraceStore, recipe: Recipe, groups: Sequence[list[int]], out: Path) -> list[MemoryIndexer]:
    """The indexer of each group, trained unless it is there."""
    found = []
    for number, group in enumerate(groups):
        folder = out / f"{number}"
        done = (folder / "indexer").exists()
        view = GroupStore.of(store, group)
        found.append(load_indexer(folder / "indexer") if done else train(view, recipe.indexer, recipe.train, folder))
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
            one = ORACLE + SHARED if name.startswith(ORACLE) or SHARED not in values else SHARED
            row: dict[str, Any] = {"set": part, "kind": kind, "policy": name, "documents": len(own)}
            row |= {metric: float(own.mean()), "kept": float(np.mean([runs[name]["kept"] for runs in members]))}
            for beside, other in ((SHARED, values[one]), (RECENCY, values[RECENCY])):
                gaps = bootstrap_means((own - other)[:, None])
                row[f"{metric}_beside_{beside}"] = [float(each[0]) for each in gaps]
            if metric == "kl":
                row["fall"] = float(1 - own.mean() / values[one].mean())
            found.append(row)
    return found


def journalled(out: Path) -> list[dict[str, Any]]:
    """What every process that asked has finished."""
    return [json.loads(line) for file in sorted(out.glob("asked-*.jsonl")) for line in file.read_text().splitlines()]


def main() -> None:
    """Train, ask, print; --output holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("traces", type=Path, nargs="?", help="training documents; some may be missing")
    parser.add_argument("--out", type=Path, required=True, help="for indexers and what was asked")
    parser.add_argument("--groups", type=int, nargs="+", required=True, help="numbers of groups")
    parser.add_argument("--set", action="append", choices=SETS, help="asked only these; both by default")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"), help="of what is asked")
    parser.add_argument("--texts", type=int, help="held-out texts of a seed, for the recipe's number")
    parser.add_argument("--questions", type=int, help="held-out questions of a seed and kind, for the recipe's number")
    parser.add_argument("--follow", type=int, default=128, help="tokens followed of each text")
    parser.add_argument("--share", help="K/N: ask every N-th document from the K-th on")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    recipe, out = load_recipe(args.recipe), args.out
    model, tokenizer = load_backbone(recipe.backbone)
    layers = adapter(model).info.full_layers
    arms = {SHARED if count == 1 else f"{count} groups": cut(layers, count) for count in sorted({1, *args.groups})}
    trained_ones: dict[str, list[MemoryIndexer]] = {}
    store: Iterable[TraceDocument] = []
    if args.traces is not None:
        store = TraceStore.open(args.traces, partial=True)
        store.check_training()
        trained_ones = {name: learn(store, recipe, groups, out / name) for name, groups in arms.items()}
    first, of = map(int, (args.share or "0/1").split("/"))
    asked = recipe.documents
    kinds = {task: args.texts if task == "text" else args.questions for task in asked.heldout}
    held = asked.heldout | {task: number for task, number in kinds.items() if number is not None}
    asked = asked.model_copy(update={"heldout": held, "tokens": tuple(args.tokens or asked.tokens)})
    recipe = recipe.model_copy(update={"documents": asked})
    names = None
    if of:
        out.mkdir(parents=True, exist_ok=True)
        policies = [Policy(RECENCY, recency, 0.0)]
        for name, indexers in trained_ones.items():
            scores = [trained(indexer.to(model.device)) for indexer in indexers]
            policies.append(Policy(name, by_layer(scores, arms[name]), 0.0))
        oracles = {ORACLE + name: oracle_of(groups) for name, groups in arms.items()}
        oracles[ORACLE + "a set a layer"] = oracle_of(cut(layers, len(layers)))
        context = model.config.get_text_config(decoder=True).max_position_embeddings
        every: list[Asked] = []
        for name in args.set or SETS:
            found = list(held_out(recipe, name, SOURCES[name], args.follow, tokenizer, context))
            every += sorted(found, key=lambda each: each.name.rsplit("-", 1)[-1])  # a stopped run has some of each seed
        every.sort(key=lambda each: bool(each.values))  # texts decide
        names = {each.name for each in every}
        done = {record["name"] for record in journalled(out)}
        left = [each for each in every[first::of] if each.name not in done]
        journal = out / f"asked-{first}-of-{of}.jsonl"
        ask(recipe, policies, MaskedModel(model, recipe.trace.chunking), tokenizer, left, journal, oracles)
        if args.share:
            return  # others go on beside this process: the tables are printed by a call of its own
    records = [record for record in journalled(out) if names is None or record["name"] in names]
    if not records:
        print(f"{out}: nothing has been asked yet")
        return
    made = {json.dumps(record["origin"]): record["origin"] for record in records}
    report = {
        "origins": list(made.values()),
        "trained_on": Counter(document.meta.task for document in store),
        "tokens": asked.tokens,
        "groups": arms,
        "rows": rows(records),
    }
    print("\n\n".join(results_tables.layer_sets(report)))
    if args.output:
        write_atomically(args.output, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    main()
