"""Logging to Weights & Biases: online for who is logged in, else offline, and always with the recipe."""

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback

from indexer_train.training import processes


def report_to(out: Path) -> str:
    """What the trainer reports to: "wandb", or "none" where WANDB_MODE=disabled (and in all processes but the first).

    Who has neither a key nor a login gets a run in `out` that `wandb sync` can upload later: asked for a key in the
    middle of training, wandb would raise.
    """
    if processes.rank() or os.environ.get("WANDB_MODE") == "disabled":
        return "none"
    if "WANDB_API_KEY" not in os.environ and not _logged_in():
        os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_DIR", str(out))
    os.environ.setdefault("WANDB_PROJECT", "lookahead-indexer")
    os.environ.setdefault("WANDB_SILENT", "true")
    return "wandb"


def _logged_in() -> bool:
    """Whether `wandb login` left an entry for the server in a netrc file."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class RecipeToWandb(TrainerCallback):
    """Puts the recipe into the run's config; metrics and trainer arguments get there on their own."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "wandb" in args.report_to:
            import wandb

            wandb.config.update({"recipe": self.recipe}, allow_val_change=True)
