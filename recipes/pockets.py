"""Trains, measures and describes a pocket model: `python -m recipes.pockets train pocket_v4 --out runs/pocket_v4`.

A run of `train` with the same arguments continues from its checkpoint; while training it prints losses and accuracy by
task, and after each stage, on unseen documents, accuracy and the indexer's recall of attention mass. `evaluate` writes
FOLDER/evaluation.json and the model card, or with --out that file alone; `card` writes the card again.
"""

import argparse
from pathlib import Path

import torch

from data_gen.core.errors import InputError
from recipes.pocket.card import write_card
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import evaluate
from recipes.pocket.family import PocketFamily
from recipes.pocket.train import Trainer
from recipes.pocket_dsa.model import FAMILY as POCKET_DSA
from recipes.pocket_v4.model import FAMILY as POCKET_V4

FAMILIES = {family.name: family for family in (POCKET_V4, POCKET_DSA)}


def parser() -> argparse.ArgumentParser:
    """Command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    train, measure, card = (verbs.add_parser(name) for name in ("train", "evaluate", "card"))
    for verb in (train, measure, card):
        verb.add_argument("family", choices=FAMILIES)
    for verb in (measure, card):
        verb.add_argument("folder", type=Path, help="as written by train")
    for verb in (train, measure):
        verb.add_argument("--config", type=Path, help="recipe instead of the family's own")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--workers", type=int, default=0, help="processes that make batches")
    train.add_argument("--seconds", type=float, default=float("inf"), help="stop and save after so long")
    measure.add_argument("--lengths", type=int, nargs="+", help="instead of the recipe's; with --out")
    measure.add_argument("--documents", type=int, help="of a task and length, instead of the recipe's; with --out")
    measure.add_argument("--out", type=Path, help="file for the figures; the folder is left as it is")
    return made


def train(family: PocketFamily, args: argparse.Namespace) -> None:
    """Train, save, export."""
    torch.set_float32_matmul_precision("high")
    try:
        trainer = Trainer(family, load_config(args.config), args.out, args.workers, args.seconds)
    except InputError as error:
        raise SystemExit(str(error)) from error
    if trainer.run():
        trainer.export()


def measure(family: PocketFamily, args: argparse.Namespace) -> None:
    """Measure a model folder."""
    if not (args.folder / "config.json").is_file():
        raise SystemExit(f"{args.folder}: no model there (config.json is missing)")
    if args.out is None and (args.lengths or args.documents):
        raise SystemExit("--lengths and --documents measure a part: name a file for it with --out")
    config = load_config(args.config)
    plan = config.evaluation
    plan.lengths, plan.documents = args.lengths or plan.lengths, args.documents or plan.documents
    plan.comparisons = min(plan.comparisons, plan.documents)
    evaluate(family, args.folder, config, args.out or args.folder / "evaluation.json")
    if args.out is None:
        write_card(family, args.folder)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb."""
    args = parser().parse_args(arguments)
    family = FAMILIES[args.family]
    if args.verb == "card":
        write_card(family, args.folder)
        return
    args.config = args.config or Path(__file__).with_name(family.name) / "config.yaml"
    (train if args.verb == "train" else measure)(family, args)


if __name__ == "__main__":
    main()
