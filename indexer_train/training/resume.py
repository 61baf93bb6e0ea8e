"""A run that was stopped goes on to the same bits: what the stock trainer leaves out of its checkpoints, or forgets."""

import json
import logging
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from data_gen.core.errors import InputError
from data_gen.core.files import replace_sealed, seal_folder, sweep, write_atomically
from indexer_train import processes
from indexer_train.checkpoints import LAST, SETTINGS, STATE, checkpoints, cut_short, damage, processes_of
from indexer_train.losses.base import IndexerLoss

logger = logging.getLogger(__name__)
KEPT = 2
"""Checkpoints: the best and the newest."""


def same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Remember what a run is made of; a run in the same folder with anything else is refused, not mixed in.

    A run that never reached a checkpoint left nothing to mix with: its settings may be corrected. Raises InputError.
    """
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    text = json.dumps(settings, indent=1)
    path = out / SETTINGS
    begun = (out / "checkpoints").exists() or (out / "indexer").exists()
    if begun and not path.exists():
        raise InputError(f"{out}: holds a training run whose {SETTINGS} is missing; choose another folder")
    if begun and path.read_bytes() != text.encode():
        raise InputError(f"{out}: holds a training run with other settings or traces; choose another folder")
    write_atomically(path, lambda file: file.write_text(text))


class KeepLoss(TrainerCallback):
    """Saves what the loss learns beside the model, where the stock trainer would start again; seals the checkpoint."""

    def __init__(self, loss: IndexerLoss) -> None:
        self.loss = loss

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it, then the checksums of all that every process wrote, last of all that belongs to the checkpoint."""
        processes.wait()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            learned = {name: value.detach().cpu() for name, value in self.loss.own_parameters().items()}
            metadata = {"processes": str(processes.count())}
            write_atomically(folder / LAST, lambda file: save_file(learned, file, metadata))
            seal_folder(folder)
            # The stock trainer would remove older ones when the new one is not whole yet.
            rotate_checkpoints(args.output_dir, KEPT, state.best_model_checkpoint)


def restore_loss(loss: IndexerLoss, checkpoint: Path) -> None:
    """Give the loss what it had learned by then; the trainer itself restores the rest.

    Raises InputError when another number of processes trained until then: the batches to come would be others.
    """
    if (earlier := processes_of(checkpoint)) != processes.count():
        raise InputError(
            f"{checkpoint}: made by {earlier} processes, and {processes.count()} would continue differently; "
            f"start {earlier}, or train into another folder"
        )
    loss.load_state_dict(load_file(checkpoint / LAST), strict=False)


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; the first process clears newer ones out of the way.

    Those that were whole once are set aside, those that were cut short while they were saved are removed.
    """
    newest, damaged = None, dict[Path, str]()
    for path in reversed(checkpoints(folder)):
        if not (reason := damage(path)):
            newest = path
            break
        damaged[path] = reason
    processes.wait()  # until all have looked
    for path, reason in damaged.items() if processes.rank() == 0 else ():
        if cut_short(path):
            shutil.rmtree(path)
            logger.warning("%s was cut short while it was saved (%s); it is removed", path, reason)
        else:
            logger.warning("%s is not whole (%s); it is kept as %s, and not used", path, reason, _set_aside(path).name)
    return newest


def _set_aside(checkpoint: Path) -> Path:
    """Give a checkpoint a new name, which is none of a checkpoint, so that this step can be saved again."""
    names = (f"damaged-{checkpoint.name}" + (f"-{number}" if number else "") for number in count())
    aside = next(path for name in names if not (path := checkpoint.with_name(name)).exists())
    return checkpoint.rename(aside)


def stay_with_best(checkpoint: Path) -> TrainerState:
    """The trainer's state at `checkpoint`, its best checkpoint looked for beside it: the run may have been moved.

    Raises InputError when the best one is gone: going on would end with another.
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if state.best_model_checkpoint is None:
        return state
    best = checkpoint.with_name(Path(state.best_model_checkpoint).name)
    check_best(best)
    if str(best) != state.best_model_checkpoint:
        state.best_model_checkpoint = str(best)
        if processes.rank() == 0:
            replace_sealed(checkpoint / STATE, checkpoint, lambda file: state.save_to_json(str(file)))
    return state


def check_best(best: Path) -> None:
    """Raise InputError unless the run's best checkpoint is there and whole: it would end with other weights."""
    if reason := damage(best) if best.exists() else "it is missing":
        raise InputError(
            f"{best}: damaged best checkpoint ({reason}); restore a copy of it, or train into a new folder"
        )


def over(state: TrainerState) -> bool:
    """Whether training had ended by then, early or not; the stock trainer forgets it and would train on."""
    callbacks: Any = state.stateful_callbacks
    return callbacks["TrainerControl"]["args"]["should_training_stop"]
