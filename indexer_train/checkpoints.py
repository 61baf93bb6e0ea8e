"""What a training run leaves on disk, and whether a checkpoint of it is whole; nothing here needs the training loop.

RUN/training.json                           all that the run is made of
RUN/checkpoints/checkpoint-100/             the stock trainer's folder: indexer, optimizer, scheduler, random states
RUN/checkpoints/checkpoint-100/loss.safetensors     the loss's own parameters, and how many processes train
RUN/checkpoints/checkpoint-100/checksums.json       of all its files; the first process writes it last, when every
                                            process has written its own, so that a checkpoint with them is whole
RUN/checkpoints/damaged-checkpoint-100/     one that was damaged after it had been whole; nothing reads it
RUN/indexer/                                the trained indexer
"""

import json
import re
from pathlib import Path

from safetensors import safe_open

from data_gen.core.errors import InputError
from data_gen.core.files import CHECKSUMS, folder_checksums, folder_damage, whole

SETTINGS = "training.json"
LAST = "loss.safetensors"
STATE = "trainer_state.json"
IN_STATE = {"epoch", "global_step", "max_steps", "best_metric", "best_global_step", "stateful_callbacks"}
"""What resuming and inspecting read of it."""


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, whole or not, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def processes_of(checkpoint: Path) -> int:
    """How many processes trained until `checkpoint`."""
    with safe_open(checkpoint / LAST, framework="pt") as file:
        return int(file.metadata()["processes"])


def cut_short(checkpoint: Path) -> bool:
    """Whether `checkpoint` was never whole, because whoever saved it was killed or had no room.

    Then it has no checksums, or those of the indexer in it, which know nothing of what is written later.
    """
    if not (checkpoint / CHECKSUMS).exists():
        return True
    try:
        return LAST not in folder_checksums(checkpoint)
    except InputError:  # they are written whole, so that they were damaged later
        return False


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be continued from; None when it is whole, every byte of it."""
    if reason := folder_damage(checkpoint):
        return reason
    sealed = folder_checksums(checkpoint)
    for name in (LAST, STATE, "optimizer.pt", "scheduler.pt", "modules.json"):
        if name not in sealed:
            return f"{name} is missing"
    with whole(checkpoint / STATE, "checkpoint", "delete it"):
        state = json.loads((checkpoint / STATE).read_bytes())
        if not isinstance(state, dict) or not state.keys() >= IN_STATE:
            return f"{STATE} is not the trainer's"
    return None
