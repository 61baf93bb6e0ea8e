"""Checkpoints of a run: what the stock trainer leaves out of them, and which are whole.

checkpoint-100/loss.safetensors     the loss's own parameters; written last, so that a checkpoint with it is whole
"""

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from data_gen.store import write_atomically
from indexer_train import processes
from indexer_train.losses.base import IndexerLoss

LAST = "loss.safetensors"

logger = logging.getLogger(__name__)


class KeepLoss(TrainerCallback):
    """Saves what the loss learns beside the model; the stock trainer would start it anew on resume."""

    def __init__(self, loss: IndexerLoss) -> None:
        self.loss = loss

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / LAST
            learned = {name: value.detach().cpu() for name, value in self.loss.own_parameters().items()}
            write_atomically(path, lambda file: save_file(learned, file))


def restore_loss(loss: IndexerLoss, checkpoint: Path) -> None:
    """Give the loss what it had learned by then; the trainer itself restores the rest."""
    loss.load_state_dict(load_file(checkpoint / LAST), strict=False)


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; half-written ones are removed (by the first process)."""
    for path in sorted(folder.glob("checkpoint-*"), key=number, reverse=True):
        if reason := damage(path):
            logger.warning("%s is half-written (%s); skipped", path, reason)
            if processes.rank() == 0:
                shutil.rmtree(path)
        else:
            return path
    return None


def number(checkpoint: Path) -> int:
    """The step it was written at."""
    return int(checkpoint.name.split("-")[1])


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be continued from; None when it is whole."""
    try:
        for name in (LAST, "trainer_state.json", "optimizer.pt", "scheduler.pt", "modules.json"):
            if not (checkpoint / name).exists():
                return f"{name} is missing"
        json.loads((checkpoint / "trainer_state.json").read_text())
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, framework="pt"):  # compares the size with the header
                pass
        for path in checkpoint.rglob("*.pt*"):
            if not zipfile.is_zipfile(path):  # the directory of a zip file lies at its end
                return f"{path.name} is cut short"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error).splitlines()[0]
    return None
