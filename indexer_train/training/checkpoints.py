"""Checkpoints of a run: what the stock trainer leaves out of them, and which are whole.

checkpoint-100/loss.safetensors     the loss's own parameters, and how many processes train; the first process writes it
                                    last, so that a checkpoint with it and every process's random state is whole
"""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from indexer_train.losses.base import IndexerLoss
from indexer_train.model import IndexerSpec, QueryEncoder
from indexer_train.training import processes

LAST = "loss.safetensors"
STATE = "trainer_state.json"
IN_STATE = {"epoch", "global_step", "max_steps", "best_metric", "best_global_step", "stateful_callbacks"}
"""What resuming and inspecting read of it."""

logger = logging.getLogger(__name__)


class KeepLoss(TrainerCallback):
    """Saves what the loss learns beside the model; the stock trainer would start it anew on resume."""

    def __init__(self, loss: IndexerLoss) -> None:
        self.loss = loss

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / LAST
            learned = {name: value.detach().cpu() for name, value in self.loss.own_parameters().items()}
            metadata = {"processes": str(processes.count())}
            write_atomically(path, lambda file: save_file(learned, file, metadata))


def processes_of(checkpoint: Path) -> int:
    """How many processes trained until `checkpoint`."""
    with safe_open(checkpoint / LAST, framework="pt") as file:
        return int((file.metadata() or {}).get("processes", 1))


def restore_loss(loss: IndexerLoss, checkpoint: Path) -> None:
    """Give the loss what it had learned by then; the trainer itself restores the rest.

    Raises InputError when another number of processes trained until then: the batches to come would be others.
    """
    if (earlier := processes_of(checkpoint)) != processes.count():
        raise InputError(
            f"{checkpoint}: {earlier} processes trained until there, {processes.count()} would go on differently; "
            f"start {earlier}, or train into another folder"
        )
    loss.load_state_dict(load_file(checkpoint / LAST), strict=False)


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; half-written ones are removed (by the first process)."""
    for path in reversed(checkpoints(folder)):
        if reason := damage(path):
            logger.warning("%s is half-written (%s); skipped", path, reason)
            if processes.rank() == 0:
                shutil.rmtree(path)
        else:
            return path
    return None


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, whole or not, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def stay_with_best(checkpoint: Path) -> TrainerState:
    """The trainer's state at `checkpoint`, its best checkpoint looked for beside it: the run may have been moved.

    Raises InputError when the best one is gone: going on would end with another.
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if state.best_model_checkpoint is None:
        return state
    best = checkpoint.with_name(Path(state.best_model_checkpoint).name)
    if not best.exists():
        raise InputError(f"{best}: the best checkpoint of the run is missing; copy it there or train into a new folder")
    if str(best) != state.best_model_checkpoint:
        state.best_model_checkpoint = str(best)
        if processes.rank() == 0:
            write_atomically(checkpoint / STATE, lambda file: state.save_to_json(str(file)))
    return state


def over(state: TrainerState) -> bool:
    """Whether training had ended by then, early or not; the stock trainer forgets it and would train on."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be continued from; None when it is whole."""
    try:
        for name in (LAST, STATE, "optimizer.pt", "scheduler.pt", "modules.json"):
            if not (checkpoint / name).exists():
                return f"{name} is missing"
        count = processes_of(checkpoint)
        for name in ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]:
            if not (checkpoint / name).exists():
                return f"{name} is missing"
        state = json.loads((checkpoint / STATE).read_bytes())
        if not isinstance(state, dict) or not state.keys() >= IN_STATE:
            return f"{STATE} is not the trainer's"
        for path in checkpoint.rglob(QueryEncoder.config_file_name):
            IndexerSpec.model_validate_json(path.read_bytes())
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, framework="pt"):  # compares the size with the header
                pass
        for path in checkpoint.rglob("*.pt*"):
            if not zipfile.is_zipfile(path):  # the directory of a zip file lies at its end
                return f"{path.name} is cut short"
    except ValidationError:
        return f"{QueryEncoder.config_file_name} is no indexer's"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error).splitlines()[0]
    return None
