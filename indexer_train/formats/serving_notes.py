"""What the FlashMemory release's serving must be told beside a checkpoint, which holds weights and RoPE only."""

from data_gen.core.chunks import Chunking
from data_gen.flashmemory.document import CHUNK_TOKENS, V4_FLASH
from indexer_train.formats.flashmemory import Format
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Coverage, Threshold

SERVED = Chunking(tokens=CHUNK_TOKENS, sink=0, recent=2048)
"""What it protects by default."""
WINDOW = 64
"""Tokens between its refreshes by default."""


def serving_notes(indexer: MemoryIndexer, format: Format) -> list[str]:
    """A line on each thing that a checkpoint of `indexer` does not say: settings to serve it with, and what is lost."""
    spec, rope = indexer.spec, indexer.spec.rope
    assert rope is not None and V4_FLASH.rope is not None  # what has none is not exported
    notes = [*_offsets(indexer), _environment(indexer)]
    ours = {"hidden width": spec.hidden, "key width": spec.key_width, "chunk tokens": spec.chunking.tokens}
    theirs = (V4_FLASH.hidden, V4_FLASH.key_width, CHUNK_TOKENS)
    for (name, value), served in zip(ours.items(), theirs, strict=True):
        if value != served:
            notes.append(f"{name} {value}: the release's serving is made for V4-Flash, {name} {served}")
    if rope.model_copy(update={"positions": V4_FLASH.rope.positions}) != V4_FLASH.rope:
        notes.append("the release's serving computes V4-Flash's RoPE, which is not this indexer's")
    if format == "flashmemory-safetensors" and rope.positions != V4_FLASH.rope.positions:
        notes.append(f"the file has no RoPE table: convert it back with --positions {rope.positions}")
    return notes


def _offsets(indexer: MemoryIndexer) -> list[str]:
    """Bias and calibrated thresholds as the constant that serving adds to every logit before it cuts at zero."""
    spec, bias = indexer.spec, indexer.query_encoder.bias
    constant = 0.0 if bias is None else bias.item()
    notes = [f"logit offset {constant:+.9g} (the bias): serve with {_offset(constant)}"]
    left = [each for each in spec.selections if isinstance(each, Coverage)]
    notes += [f"{each}: left out, for the release's serving has no coverage" for each in left]
    thresholds = [each for each in spec.selections if isinstance(each, Threshold)]
    if spec.shape.join != "max":
        scores = [cut.score for each in thresholds for cut in each.cuts]
        notes.append(
            f"layers are joined by {spec.shape.join} here, by max when served: the selection will differ, and the "
            f"thresholds {scores} do not carry over; train and calibrate with join max"
        )
        return notes
    for threshold in thresholds:
        aim = {"budget": "keeps {} of the chunks", "recall": "has a mass recall of {}", None: "is the threshold set"}
        said = aim[threshold.target].format(f"{threshold.value or 0:.1%}")
        for cut in threshold.cuts:
            offset = constant - cut.score
            where = f" in contexts of up to {cut.longest} tokens" if cut.longest else ""
            notes.append(f"logit offset {offset:+.9g} {said}{where}: serve with {_offset(offset)}")
    if isinstance(spec.selection, Budget):
        hint = "" if thresholds else "; `lookahead calibrate` finds one"
        notes.append(f"selects {spec.selection}, but the release's serving knows a threshold only{hint}")
    return notes


def _environment(indexer: MemoryIndexer) -> str:
    spec = indexer.spec
    settings = {
        "INLINE_LAYERS": ",".join(map(str, spec.layers)),
        "INTERVAL": spec.window,
        "FIRST_KEEP": spec.chunking.sink,
        "LAST_KEEP": spec.chunking.recent,
    }
    named = " ".join(f"SGLANG_RETRIEVER_{name}={value}" for name, value in settings.items())
    return f"layers, window and protected chunks: serve with {named}"


def _offset(value: float) -> str:
    return f"SGLANG_RETRIEVER_LOGIT_OFFSET={value:.9g}"
