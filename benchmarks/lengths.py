"""An indexer on documents of other lengths: recall of every policy, beyond the training lengths too, and its churn.

    python -m benchmarks.lengths gemma-3-270m --indexer runs/gemma/indexer --out runs/gemma/lengths \\
        --length 4096 --length 8192 --length 16384 --length 32768

The recipe must fix `documents.heldout_share`, so that the text stays held out whatever the lengths. For each length its
held-out documents are traced at that length, needles and text, and every policy is scored. Prints attention-mass and
golden recall at each budget, the indexer's share of the oracle's, and its difference from every other policy with a 95
% interval, from a bootstrap over the same documents. A stopped run continues.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import origin
from data_gen.backbones.load import adapter, load_backbone
from data_gen.generate import generate
from data_gen.traces.store import TraceStore
from eval.offline.recall import DocumentRecall, measure, task_groups
from eval.offline.refresh import analyse_lookahead
from eval.report.tables import Table
from indexer_train.load import check_traces, load_indexer
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.model import MemoryIndexer
from recipes import Recipe, load_recipe

METRICS = ("mass_recall", "golden_recall")


def traced(recipe: Recipe, lengths: list[int], out: Path) -> dict[int, TraceStore]:
    """The recipe's held-out documents at each length."""
    model, tokenizer = load_backbone(recipe.backbone)
    stores = {}
    for length in lengths:
        documents = recipe.documents.model_copy(update={"tokens": (length, length)})
        (stores[length],) = generate(
            adapter(model), tokenizer, documents, recipe.trace, out / str(length), ["heldout"],
            lambda items, what: tqdm(items, what, unit="doc"),
        )  # fmt: skip
    return stores


def rows(indexer: MemoryIndexer, store: TraceStore, length: int, golden: float) -> list[dict[str, Any]]:
    """A row per group of tasks, budget and policy; difference: the indexer's minus the policy's, by document."""
    cells: dict[tuple[str, float], dict[str, list[DocumentRecall]]] = defaultdict(lambda: defaultdict(list))
    for each in measure({"indexer": indexer}, store, golden, rules={}):
        if isinstance(each.amount.budget, float):
            for group in task_groups(each.meta):
                cells[group, each.amount.budget][each.ranker.policy].append(each)
    found = []
    for (group, budget), policies in cells.items():
        values = {
            policy: np.array([[each.macro[name] for name in METRICS] for each in members])
            for policy, members in policies.items()
        }
        for policy, own in values.items():
            mean, low, high = bootstrap_means(np.hstack([own, values["indexer"] - own]))
            row = {"length": length, "task": group, "budget": budget, "policy": policy, "documents": len(own)}
            for place, name in enumerate(METRICS):
                gap = len(METRICS) + place
                row[name] = mean[place]
                row[f"{name}_difference"] = [mean[gap], low[gap], high[gap]]
            found.append(row)
    return found


def share_table(found: list[dict[str, Any]]) -> str:
    """Mass recall by length, task and budget: the indexer's, of the oracle's, and beside mean-pooled keys."""
    lines = []
    by = {(row["length"], row["task"], row["budget"], row["policy"]): row for row in found}
    for length, task, budget in dict.fromkeys(key[:3] for key in by):
        ours, oracle = (by[length, task, budget, name] for name in ("indexer", "oracle"))
        other = by.get((length, task, budget, "mean_pooled"))
        cells = [ours["mass_recall"], ours["mass_recall"] / oracle["mass_recall"], ours["golden_recall"]]
        if other is not None:
            gap, low, high = other["mass_recall_difference"]
            cells += [other["mass_recall"], f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"]
        lines.append([f"{length:,}", task, f"{budget:.1%}", ours["documents"], *cells])
    ours = ["n", "mass recall", "of the oracle's", "golden recall"]
    return str(Table(["tokens", "task", "kept", *ours, "mean-pooled", "indexer's lead"], lines))


def main() -> None:
    """Trace, score and print; OUT/lengths.json holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--indexer", type=Path, required=True)
    parser.add_argument("--length", type=int, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe, indexer = load_recipe(arguments.recipe), load_indexer(arguments.indexer)
    if recipe.documents.heldout_share is None:
        parser.error("the recipe must set documents.heldout_share, or other lengths could read what was trained on")
    found, churn = [], {}
    for length, store in traced(recipe, arguments.length, arguments.out).items():
        check_traces(indexer, store)
        found += rows(indexer, store, length, recipe.train.golden)
        lookahead = analyse_lookahead({"indexer": indexer}, store, recipe.train.golden, recipe.train.budget)
        churn[length] = lookahead.model_dump()
    print(share_table(found))
    made = origin("cuda" if torch.cuda.is_available() else "cpu")
    report = {"origin": made, "rows": found, "lookahead": churn}
    (arguments.out / "lengths.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
