"""What a training run leaves on disk, and whether a checkpoint of it is whole; nothing here needs the training loop.

RUN/training.json                           all that the run is made of
RUN/checkpoints/checkpoint-100/             the stock trainer's folder: indexer, optimizer, scheduler, random states
RUN/checkpoints/checkpoint-100/loss.safetensors     the loss's own parameters, and how many processes train; the first
                                            process writes it last, so that a checkpoint with it and every process's
                                            random state is whole
RUN/indexer/                                the trained indexer
"""

import json
import re
import zipfile
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from indexer_train.model import QueryEncoder
from indexer_train.spec import IndexerSpec

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
        return int((file.metadata() or {}).get("processes", 1))


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
