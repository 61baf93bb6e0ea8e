"""What every line of results.json is (eval/report/rows.py has the lines themselves)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Row(BaseModel):
    """A line of results.json: read only, and a field that nobody knows is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CountedRow(Row):
    """fetched: chunks from the cold side, a token; mean_key_mb: 10^6 bytes held for a per-step correction. What was not
    counted is missing in the file."""

    fetched: float | None = None
    mean_key_mb: float | None = None

    @model_serializer(mode="wrap")
    def _without_uncounted(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("fallbacks", "windows", "fetched", "mean_key_mb")
        return {name: value for name, value in write(self).items() if value is not None or name not in optional}
