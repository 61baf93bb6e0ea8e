"""Trackers that the recipe names in `train.report_to`; wandb begins online for who is logged in, else offline."""

import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from transformers.integrations.integration_utils import get_available_reporting_integrations

from data_gen.core.errors import InputError
from indexer_train import processes

PROJECT = "lookahead-indexer"


def check_trackers(report_to: list[str]) -> None:
    """Raise InputError unless the stock trainer knows every tracker and its package is installed."""
    installed = get_available_reporting_integrations()
    if unknown := [name for name in report_to if name not in installed]:
        raise InputError(f"train.report_to: not installed: {', '.join(unknown)}; choose from {', '.join(installed)}")


def begin(report_to: list[str], out: Path, recipe: dict[str, Any]) -> None:
    """Begin the run of wandb, where it is asked for, with the recipe in its config, on the first process.

    What the environment says of project, folder and mode holds. The stock trainer's callback joins a run that has
    begun; one that it begins itself would raise in the middle of training for who has neither a key nor a login.
    """
    if "wandb" not in report_to or processes.rank():
        return
    import wandb

    if wandb.run is None:
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(out)),
            mode=wandb_mode(),
            settings=None if "WANDB_SILENT" in os.environ else wandb.Settings(silent=True),
        )
    wandb.config.update({"recipe": recipe}, allow_val_change=True)


def wandb_mode() -> Literal["offline"] | None:
    """`offline`, a run that `wandb sync` can upload later, without a key or login; None: as wandb itself decides."""
    told = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    return None if told or _logged_in() else "offline"


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
