"""Which part of a recipe matters: train variations on the same traces, score all on the same held-out documents.

    python benchmarks/ablations.py smollm2-quickstart runs/quickstart/traces --out runs/ablations

Prints mass recall at 10 % kept relative to the oracle's, for needle documents and for text, one row a variation.
"""

import argparse
import json
from pathlib import Path

from data_gen.core.files import write_atomically
from data_gen.traces.store import TraceStore
from eval.offline.recall import evaluate_recall
from eval.report.tables import table
from indexer_train.training.trainer import train
from recipes import load_recipe

VARIATIONS = {
    "as the recipe says": ({}, {}),
    "12 distance bumps": ({"distance_bumps": 12}, {}),
    "twice the heads and rank": ({"heads": 32, "rank": 256}, {}),
    "no slot for protected mass": ({"slot": False}, {}),
    "no predicted log-scale": ({"scale": False}, {}),
    "loss: listwise on the head-maximum": ({}, {"loss": "listwise_peak"}),
    "loss: focal BCE on golden chunks": ({}, {"loss": "focal"}),
}
BUDGET = 0.1


def main() -> None:
    """Train and score every variation; finished ones are read back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("traces", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    training, heldout = (TraceStore.open(arguments.traces / split) for split in ("train", "heldout"))
    lines = []
    for name, (shape, settings) in VARIATIONS.items():
        folder = arguments.out / name.replace(" ", "-").replace(":", "")
        result = folder / "ablation.json"
        if not result.exists():
            indexer = train(
                training, recipe.indexer.model_copy(update=shape), recipe.train.model_copy(update=settings), folder
            )
            threshold = indexer.spec.thresholds[str(recipe.train.budget)]
            found = evaluate_recall(indexer, heldout, recipe.train.golden, threshold)
            rows = [row.model_dump() for row in found]
            write_atomically(result, lambda file, rows=rows: file.write_text(json.dumps(rows, indent=1)))
        rows = [row for row in json.loads(result.read_text()) if row["budget"] == BUDGET]
        recall = {(row["task"], row["policy"]): row["mass_recall"] for row in rows}
        lines.append([name, *(recall[task, "indexer"] / recall[task, "oracle"] for task in ("needles", "text"))])
    print(table(["variation", "needles, of the oracle", "text, of the oracle"], lines))


if __name__ == "__main__":
    main()
