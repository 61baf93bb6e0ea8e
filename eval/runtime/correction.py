"""Settings of the per-step correction (its mechanism: eval/runtime/hosts/corrector.py)."""

from typing import Literal

from pydantic import ConfigDict

from data_gen.core.config import Count, Strict

CorrectionQuery = Literal["same", "previous"]


class Correction(Strict):
    """Beside the resident set of a window, chunks that each layer finds by itself at every token.

    chunks: of each full-attention layer, taken off the budget; query: whose finds them, that of the token itself or of
    the one before it, so that an engine can fetch them one token ahead (hosts here wait for them either way).
    """

    model_config = ConfigDict(frozen=True)

    chunks: Count
    query: CorrectionQuery = "same"
