"""Cold pools of short segments, so that a few units fill several."""

from eval.serving.pools import ColdPool


def segmented(largest, shape, dtype, pageable=None):
    """A `ColdPool` whose segments have at most `largest` bytes."""
    return type("Segmented", (ColdPool,), {"largest": largest})(shape, dtype, pageable)
