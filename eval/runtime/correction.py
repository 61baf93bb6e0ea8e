"""Settings of the per-step correction (its mechanism: eval/runtime/hosts/corrector.py)."""

from typing import Literal

from pydantic import ConfigDict

from data_gen.core.config import Count, Strict

CorrectionQuery = Literal["same", "previous"]
NO_KEYS = "correction: this model caches no keys of single heads to average; leave it out"


class Correction(Strict):
    """Beside the resident set of a window, chunks that each layer finds by itself at every token.

    chunks: how many chunks each full-attention layer finds, taken off the budget; query: whose query finds them: that
    of the `same` token, or of the `previous` one, so that an engine can fetch them one token ahead (hosts here wait for
    them either way).
    """

    model_config = ConfigDict(frozen=True)

    chunks: Count
    query: CorrectionQuery = "same"
