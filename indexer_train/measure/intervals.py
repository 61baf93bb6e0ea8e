"""Bootstrap confidence intervals over documents: windows of one document are not independent, documents are."""

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over documents with percentile intervals. values: [documents, M], NaN where a document has no value.

    Returns (mean, low, high), each [M]; NaN where no document has a value, and no interval (NaN) below two documents.
    Pairs of methods are compared by the bootstrap of their per-document differences: pass those. The same documents
    are drawn for every column, and on every call with as many documents.
    """
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)
    count = len(values)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    with np.errstate(invalid="ignore"):
        mean = filled.sum(axis=0) / defined.sum(axis=0)
        resampled = (draws @ filled) / (draws @ defined)  # NaN where a draw has no document with a value
    low, high = _quantiles(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    few = defined.sum(axis=0) < 2
    return mean, np.where(few, np.nan, low), np.where(few, np.nan, high)


def _quantiles(resampled: np.ndarray, shares: list[float]) -> np.ndarray:
    empty = np.isnan(resampled).all(axis=0)
    found = np.nanquantile(np.where(empty, 0.0, resampled), shares, axis=0)
    return np.where(empty, np.nan, found)
