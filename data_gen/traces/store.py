"""The trace store: one safetensors file per document, one JSON manifest, nothing half-written.

STORE/manifest.json             what every document shares
STORE/doc_00000.safetensors     hidden states, keys, positions, oracle probabilities of one document
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import read_sealed, save_tensors, sweep, whole, write_atomically, write_sealed
from data_gen.traces.labels import SparseOracle, WindowLabels, lookahead_windows
from data_gen.traces.types import FORMAT, DocumentMeta, GoldenChunks, Manifest, NativeRow, RawTrace, SparseAttention

MANIFEST = "manifest.json"
REMEDY = "delete it and generate again"
"""What to do with a damaged trace."""


def _read_manifest(path: Path) -> Manifest:
    remedy = "copy it again, or generate into another folder"
    with whole(path, "manifest", remedy):
        version = json.loads(path.read_bytes())["format"]
    if version != FORMAT:
        raise InputError(f"{path}: a store of format {version}, this version reads {FORMAT}; generate it again")
    with whole(path, "manifest", remedy):
        return Manifest.model_validate(read_sealed(path))


class TraceDocument:
    """One document of a store; tensors are mapped from disk and read where they are touched.

    Raises InputError when the file is damaged.
    """

    def __init__(self, path: Path, trace: TraceConfig) -> None:
        self.path = path
        self.trace = trace
        with whole(path, "trace", REMEDY):
            self._file = safe_open(path, framework="pt")
            self.meta = DocumentMeta.model_validate_json(self._file.metadata()["document"])

    def hidden(self, layer: int) -> torch.Tensor:
        """[T, hidden] bf16, states entering the attention block of `layer`."""
        return self._file.get_tensor(f"layers.{layer}.hidden")

    def keys(self, layer: int) -> torch.Tensor:
        """Keys as stored, one per complete chunk: [N, ...], see `KeyKind`; `key_vectors` decodes."""
        return self._file.get_tensor(f"layers.{layer}.keys")

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] int64, 0-based token positions of the rows."""
        return self._file.get_tensor("positions")

    @cached_property
    def chunks(self) -> int:
        """N, complete chunks of the whole document that have a key."""
        return self.shape(f"layers.{self.trace.layers[0]}.keys")[0]

    def shape(self, name: str) -> list[int]:
        """Of one stored tensor, read from the header."""
        return self._file.get_slice(name).get_shape()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is stored, by name."""
        return {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118 - not a mapping

    @property
    def checksum(self) -> str | None:
        """Of the whole file when it was written (`files.broken_seal` compares it); None where somebody took it out."""
        return self._file.metadata().get("checksum")

    @cached_property
    def attention(self) -> SparseAttention:
        """The attention oracle's probabilities, per layer."""
        names = ("pointers", "chunks", "mean", "peak", "rest")
        return SparseAttention(*(self._file.get_tensor(f"oracle.{name}") for name in names))

    @cached_property
    def golden(self) -> GoldenChunks:
        """The indexer oracle's golden chunks."""
        return GoldenChunks(*(self._file.get_tensor(f"oracle.{name}") for name in ("pointers", "chunks", "votes")))

    @property
    def mean_pooled(self) -> torch.Tensor | None:
        """[T, N] fp16, the untrained baseline's scores; None on DeepSeek-V4."""
        name = "baselines.mean_pooled"
        return self._file.get_tensor(name) if name in self._file.keys() else None  # noqa: SIM118 - not a mapping

    def native(self, layer: int) -> dict[int, NativeRow]:
        """What the backbone's own indexer computed, by row; empty where the trace kept nothing."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for name in self._file.keys():  # noqa: SIM118
            if name.startswith(f"native.{layer}."):
                _, _, row, part = name.split(".")
                found.setdefault(int(row), {})[part] = self._file.get_tensor(name)
        return {row: NativeRow(**parts) for row, parts in sorted(found.items())}

    @property
    def source(self) -> dict[str, Any]:
        """What an imported document came with (prompt, response, the dump's metadata); else empty."""
        return json.loads(self._file.metadata().get("source", "{}"))

    def windows(self, serving: bool) -> torch.Tensor:
        """[W, 2] rows (first, one past the last) of lookahead windows that have an unprotected chunk to choose.

        The window of token t is t .. t + tau - 1, the release's definition, in training and in measured recall alike.
        Serving lags by one: a set is chosen from t's hidden state once t has been read, and serves t + 1 .. t + tau.
        serving: one window every tau tokens, as a runtime refreshes; otherwise one starting at every row.
        Windows cut short by the end of a span count only where the span says so and `trace.tail` tokens remain.
        """
        spans, tau = self.meta.spans, self.trace.window
        if not serving:
            spans = [span.model_copy(update={"serve": span.first}) for span in spans]
        every, shortest = tau if serving else 1, self.trace.tail
        return lookahead_windows(spans, self.positions, self.trace.chunking, tau, every, shortest)

    @cached_property
    def oracle(self) -> SparseOracle:
        """The document's own oracle, layers averaged, to be pooled over windows."""
        return SparseOracle.of(self.golden if self.trace.oracle == "indexer" else self.attention, self.chunks)

    def labels(self, windows: torch.Tensor) -> WindowLabels:
        """The oracle pooled over `windows` ([W, 2] rows, from `windows`)."""
        return self.oracle.labels(windows, self.positions, self.trace.chunking)


def _fields(trace: TraceConfig) -> dict[str, Any]:
    """Every setting by its name in a recipe."""
    values = trace.model_dump()
    return {f"chunking.{name}": value for name, value in values.pop("chunking").items()} | values


class TraceStore:
    """A folder of traced documents that share one manifest."""

    def __init__(self, root: Path, manifest: Manifest, files: list[Path] | None = None) -> None:
        self.root = root
        self.manifest = manifest
        self._files = files

    @classmethod
    def open(cls, root: Path) -> "TraceStore":
        """Open a store for reading. Raises InputError when there is none or it is empty."""
        path = root / MANIFEST
        if not path.exists():
            raise InputError(f"{root}: no trace store there ({MANIFEST} is missing); run `lookahead generate` first")
        store = cls(root, _read_manifest(path))
        if not store.paths():
            raise InputError(f"{root}: the trace store holds no document")
        return store

    @classmethod
    def create(cls, root: Path, manifest: Manifest) -> "TraceStore":
        """Start a store, or continue one made with the same settings."""
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        path = root / MANIFEST
        if path.exists():
            earlier = _read_manifest(path) if list(root.glob("doc_*")) else manifest
            for field in ("backbone", "trace", "documents"):
                if getattr(earlier, field) != getattr(manifest, field):
                    raise InputError(f"{root}: holds traces made with another {field}; choose another folder")
            for name, digest in manifest.texts.items():
                if earlier.texts.get(name) != digest:
                    raise InputError(
                        f"{root}: {name} is another text than the store was begun with, its source has changed; "
                        "restore that, or choose another folder"
                    )
            if earlier is not manifest:
                return cls(root, earlier)
        write_sealed(path, manifest.model_dump(mode="json"))
        return cls(root, manifest)

    def __len__(self) -> int:
        return len(self.paths())

    def paths(self) -> list[Path]:
        """The finished documents' files, in order."""
        return sorted(self.root.glob("doc_*.safetensors")) if self._files is None else self._files

    def check_held_out(self) -> None:
        """Raise InputError on documents to train on: what an indexer learned by heart chooses nothing."""
        if self.manifest.documents.get("split") == "train":
            raise InputError(f"{self.root}: training documents; this is decided on held-out ones")

    def check_training(self) -> None:
        """Raise InputError on held-out documents: trained on, they would prove nothing."""
        if self.manifest.documents.get("split") == "heldout":
            raise InputError(f"{self.root}: held-out documents; train on others")

    def check_settings(self, trace: TraceConfig) -> None:
        """Raise InputError, naming the first difference, unless these are the settings it was traced with."""
        asked = _fields(trace)
        for name, own in _fields(self.manifest.trace).items():
            if own != asked[name]:
                raise InputError(
                    f"{self.root}: traced with trace.{name} {own}, but the recipe says {asked[name]}; "
                    "take the recipe that the traces were made with, or generate with this one"
                )

    def hold_back(self, every: int) -> tuple["TraceStore", "TraceStore"]:
        """Views of this store: (all documents but every n-th, every n-th one). Raises InputError if one is empty."""
        paths = self.paths()
        held = paths[every - 1 :: every]
        rest = [path for path in paths if path not in held]
        if not held or not rest:
            one = f"every {every}th of {len(paths)}"
            raise InputError(f"{self.root}: too few documents to validate on {one} and to train on the others")
        return TraceStore(self.root, self.manifest, rest), TraceStore(self.root, self.manifest, held)

    def path(self, index: int) -> Path:
        return self.root / f"doc_{index:05d}.safetensors"

    def document(self, path: Path) -> TraceDocument:
        """One of `paths`."""
        return TraceDocument(path, self.manifest.trace)

    def __iter__(self) -> Iterator[TraceDocument]:
        return map(self.document, self.paths())

    def write(self, index: int, meta: DocumentMeta, raw: RawTrace, source: dict[str, Any] | None = None) -> None:
        """Write one document, with what it came with; it appears whole or not at all."""
        tensors = {f"layers.{layer}.hidden": value for layer, value in raw.hidden.items()}
        tensors |= {f"layers.{layer}.keys": value for layer, value in raw.keys.items()}
        tensors |= {f"oracle.{name}": value for name, value in vars(raw.oracle).items()}
        tensors["positions"] = raw.positions
        if raw.mean_pooled is not None:
            tensors["baselines.mean_pooled"] = raw.mean_pooled
        for (layer, row), native in raw.native.items():
            parts = {part: value for part, value in vars(native).items() if value is not None}
            tensors |= {f"native.{layer}.{row}.{part}": value for part, value in parts.items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {"document": json.dumps(meta.model_dump())}
        if source:
            metadata["source"] = json.dumps(source)  # as ASCII: half a surrogate pair in a prompt has no UTF-8
        write_atomically(self.path(index), lambda file: save_tensors(tensors, file, metadata))
