"""A run that was stopped goes on to the same bits: what the stock trainer leaves out of its checkpoints, or forgets."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from data_gen.core.errors import InputError
from data_gen.core.files import replace_sealed, seal_folder, write_atomically
from indexer_train import processes
from indexer_train.checkpoints import LAST, SETTINGS, STATE, checkpoints, damage, processes_of
from indexer_train.losses.base import IndexerLoss

logger = logging.getLogger(__name__)


def same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Remember what a run is made of; a run in the same folder with anything else is refused, not mixed in.

    A run that never reached a checkpoint left nothing to mix with: its settings may be corrected. Raises InputError.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=1)
    path = out / SETTINGS
    begun = (out / "checkpoints").exists() or (out / "indexer").exists()
    if begun and not path.exists():
        raise InputError(f"{out}: holds a training run whose {SETTINGS} is missing; choose another folder")
    if begun and path.read_bytes() != text.encode():
        raise InputError(f"{out}: holds a training run with other settings or traces; choose another folder")
    write_atomically(path, lambda file: file.write_text(text))


class KeepLoss(TrainerCallback):
    """Saves what the loss learns beside the model, where the stock trainer would start anew; seals the checkpoint."""

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
    """The newest whole checkpoint in `folder`, or None; others are removed (by the first process)."""
    for path in reversed(checkpoints(folder)):
        if reason := damage(path):
            logger.warning("%s is not whole (%s); the one before it is taken", path, reason)
            if processes.rank() == 0:
                shutil.rmtree(path)
        else:
            return path
    return None


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
        raise InputError(f"{best}: damaged best checkpoint ({reason}); copy it there or train into a new folder")


def over(state: TrainerState) -> bool:
    """Whether training had ended by then, early or not; the stock trainer forgets it and would train on."""
    callbacks: Any = state.stateful_callbacks
    return callbacks["TrainerControl"]["args"]["should_training_stop"]
