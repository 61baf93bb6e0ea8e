"""What a server is told: environment variables LOOKAHEAD_*, or `--additional-config '{"lookahead": {...}}'`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, ValidationError, model_validator

from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from eval.serving.select import Fallback
from indexer_train.selection import Budget, Coverage, Cut, Selection, Threshold

PREFIX = "LOOKAHEAD_"
SECTION = "lookahead"
"""Key of the engine's additional configuration."""


class Settings(Strict):
    """bundle: the indexer's folder; budget, threshold or coverage: how chunks are chosen, by default as the bundle
    says; cap: most resident chunks, protected ones included; full_above: a window that asks for more than this multiple
    of the cap reads everything (`Fallback`); lag: 1 lets one more token be read with the old set; host_gib: host memory
    for cold blocks, which then leave the engine's pool; trace: a file to which each window's set is appended, one JSON
    line a window."""

    model_config = ConfigDict(frozen=True)

    bundle: Path
    budget: float | None = Field(default=None, gt=0, le=1)
    threshold: float | None = None
    coverage: float | None = Field(default=None, gt=0, le=1)
    cap: PositiveInt | None = None
    full_above: float | None = Field(default=None, ge=1)
    lag: Literal[0, 1] = 0
    host_gib: float | None = Field(default=None, gt=0)
    trace: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The environment has only strings."""
        lag = values.get("lag")
        return values | {"lag": int(lag)} if isinstance(lag, str) and lag.isdigit() else values

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        rules = [name for name in ("budget", "threshold", "coverage") if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)}: give only one of them")
        if self.full_above is not None and self.cap is None:
            raise ValueError("full_above: a multiple of the cap; set a cap too")
        if self.lag and self.host_gib is not None:
            raise ValueError("lag: blocks that come back from host memory are a token late anyway; leave lag out")
        return self

    @property
    def selection(self) -> Selection | None:
        """Instead of the bundle's, if asked for."""
        if self.budget is not None:
            return Budget(budget=self.budget)
        if self.coverage is not None:
            return Coverage(share=self.coverage)
        return Threshold(cuts=[Cut(score=self.threshold)]) if self.threshold is not None else None

    @property
    def fallback(self) -> Fallback | None:
        """The demand fallback, if asked for."""
        return Fallback(full_above=self.full_above) if self.full_above is not None else None


def load_settings(additional: object = None, environment: Mapping[str, str] = os.environ) -> Settings:
    """The environment's settings, those of the engine's additional configuration before them.

    Raises InputError, in one line, for an unknown or wrong one.
    """
    given: dict[str, Any] = {
        name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)
    }
    section = additional.get(SECTION, {}) if isinstance(additional, dict) else {}
    if not isinstance(section, dict):
        raise InputError(f"additional config: `{SECTION}` is {type(section).__name__}, not a table of settings")
    try:
        return Settings.model_validate(given | section)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"settings: {f'{name}: ' if name else ''}{message}") from error
