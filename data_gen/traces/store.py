"""The trace store: one safetensors file per document, one JSON manifest, nothing half-written.

STORE/manifest.json                     what every document shares, and which documents there are to be
STORE/0000/doc_0000000.safetensors      hidden states, keys, positions, oracle probabilities of one document; the next
                                        folder begins with number 1000

A document's file names its store, its document and what that was to read: one of another store or place is refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import read_sealed, save_tensors, sweep, whole, write_atomically, write_sealed
from data_gen.core.shard import Shard
from data_gen.traces.device import DeviceOracle
from data_gen.traces.failures import shards_of
from data_gen.traces.labels import SparseOracle, WindowLabels, lookahead_windows
from data_gen.traces.types import (
    FORMAT,
    DocumentMeta,
    GoldenChunks,
    Manifest,
    NativeRow,
    Planned,
    RawTrace,
    SparseAttention,
)

MANIFEST = "manifest.json"
REMEDY = "delete it and generate again"
"""What to do with a damaged trace."""
IN_A_FOLDER = 1000
"""Documents: file systems grow slow where more lie side by side."""
NAMED = 3
"""Missing documents that a refusal names."""


def read_manifest(path: Path) -> Manifest:
    """A store's manifest. Raises InputError when it is damaged or of another format."""
    remedy = "copy it again, or generate into another folder"
    with whole(path, "manifest", remedy):
        version = json.loads(path.read_bytes())["format"]
    if version != FORMAT:
        raise InputError(
            f"{path}: the store has format {version}, but this version reads format {FORMAT}; generate it again"
        )
    with whole(path, "manifest", remedy):
        return Manifest.model_validate(read_sealed(path))


class TraceDocument:
    """One document of a store; tensors are mapped from disk and read where they are touched.

    Raises InputError when the file is damaged, or of another store or place in it than `planned` says.
    """

    def __init__(self, path: Path, trace: TraceConfig, planned: Planned) -> None:
        self.path, self.trace = path, trace
        with whole(path, "trace", REMEDY):
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata()
            self.meta = DocumentMeta.model_validate_json(metadata["document"])
            found = Planned(metadata["store"], self.meta.name, metadata["content"])
            if found.store != planned.store:
                raise ValueError("it is of a store with other settings")
            if found != planned:
                raise ValueError(f"it holds {found.name} {found.content}, not {planned.name} {planned.content}")

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self.path.parents[1]

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
        """All that is stored, by name: [T, ...] of query tokens, [N, ...] of chunks, CSR parts of the oracle."""
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

    def labels(self, windows: torch.Tensor, device: torch.device | None = None) -> WindowLabels:
        """The oracle pooled over `windows` ([W, 2] rows on the host, from `windows`), on a device if it is given."""
        if device is None or device.type == "cpu":
            return self.oracle.labels(windows, self.positions, self.trace.chunking)
        return self._oracle_on(device).labels(windows)

    @cached_property
    def _oracle_on(self) -> Callable[[torch.device], DeviceOracle]:
        return cache(lambda device: DeviceOracle(self.oracle, self.positions, self.trace.chunking, device))

    def forget_oracle(self) -> None:
        """Free what the oracle takes in memory, on every device; who asks again unpacks it again."""
        for name in ("oracle", "_oracle_on", "attention", "golden"):
            vars(self).pop(name, None)


def _fields(trace: TraceConfig) -> dict[str, Any]:
    """Every setting by its name in a recipe."""
    values = trace.model_dump()
    return {f"chunking.{name}": value for name, value in values.pop("chunking").items()} | values


def number_of(path: Path) -> int:
    """A document's number, by its file."""
    return int(path.stem.removeprefix("doc_"))


def file_of(number: int) -> str:
    """Where document `number` lies in a store."""
    return f"{number // IN_A_FOLDER:04d}/doc_{number:07d}.safetensors"


class TraceStore:
    """A folder of traced documents that share one manifest.

    files: what each document's file must be, in order, where they are not all that the store has.
    """

    def __init__(self, root: Path, manifest: Manifest, files: dict[Path, Planned] | None = None) -> None:
        self.root, self.manifest = root, manifest
        if files is not None:
            self.files = files

    @cached_property
    def files(self) -> dict[Path, Planned]:
        """What each finished document's file must be, in order, as found when this is first asked.

        Raises InputError when there is a file that the plan does not know.
        """
        planned = {self.path(number): self.manifest.planned(number) for number in sorted(self.manifest.plan)}
        found = set(self.root.glob("*/doc_*.safetensors"))
        if others := sorted(found - planned.keys()):
            raise InputError(f"{others[0]}: not among the documents of this store; delete it, or move it back")
        return {path: each for path, each in planned.items() if path in found}

    @classmethod
    def open(cls, root: Path, partial: bool = False) -> "TraceStore":
        """Open a store for reading; partial: even where documents are missing.

        Raises InputError when there is none, and when it is empty or unfinished.
        """
        path = root / MANIFEST
        if not path.exists():
            raise InputError(f"{root}: no trace store there ({MANIFEST} is missing); run `lookahead generate` first")
        store = cls(root, read_manifest(path))
        if not store.files:
            raise InputError(f"{root}: the trace store holds no document")
        if not partial and (missing := store.missing()):
            names = [store.manifest.plan[number][0] for number in missing[:NAMED]]
            named = ", ".join(names) + (" ..." if len(missing) > NAMED else "")
            raise InputError(
                f"{root}: {len(missing)} of {len(store.manifest.plan)} documents are missing ({named})"
                f"{shards_of(root, missing)}; run the command that makes them again, or add --partial"
            )
        return store

    @classmethod
    def create(cls, root: Path, manifest: Manifest) -> "TraceStore":
        """Start a store, or continue it with a grown plan. Raises InputError for other settings or other documents."""
        root.mkdir(parents=True, exist_ok=True)
        path = root / MANIFEST
        if path.exists() and any(root.glob("*/doc_*")):
            earlier = read_manifest(path)
            for field in ("backbone", "trace", "documents"):
                if getattr(earlier, field) != getattr(manifest, field):
                    raise InputError(f"{root}: holds traces made with another {field}; choose another folder")
            for number, (name, content) in manifest.plan.items():
                if earlier.plan.get(number) not in (None, (name, content)) and (root / file_of(number)).exists():
                    raise InputError(
                        f"{root}: {name} is not the document that the store was begun with: its source has changed; "
                        "restore it, or choose another folder"
                    )
            plan = dict(sorted((earlier.plan | manifest.plan).items()))
            if plan == earlier.plan:
                return cls(root, earlier)
            manifest = earlier.model_copy(update={"plan": plan})
        write_sealed(path, manifest.model_dump(mode="json"))
        return cls(root, manifest)

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[Path]:
        """The finished documents' files, in order."""
        return list(self.files)

    def missing(self) -> list[int]:
        """Numbers of planned documents that are not among `files`."""
        return [number for number in self.manifest.plan if self.path(number) not in self.files]

    def sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        for folder in (self.root, *self.root.glob("[0-9]*/")):
            sweep(folder)

    def shard(self, shard: Shard) -> "TraceStore":
        """A view of this store: the documents of one worker, by their numbers."""
        return self.only(path for path in self.files if shard.owns(number_of(path)))

    def only(self, paths: Iterable[Path]) -> "TraceStore":
        """A view of this store: these of its files."""
        return TraceStore(self.root, self.manifest, {path: self.files[path] for path in paths})

    def check_held_out(self) -> None:
        """Raise InputError on documents to train on: what an indexer learned by heart chooses nothing."""
        if self.manifest.documents.get("split") == "train":
            raise InputError(f"{self.root}: holds training documents; use held-out documents here")

    def check_training(self) -> None:
        """Raise InputError on held-out documents: trained on, they would prove nothing."""
        if self.manifest.documents.get("split") == "heldout":
            raise InputError(f"{self.root}: holds held-out documents; train on others")

    def check_settings(self, trace: TraceConfig) -> None:
        """Raise InputError, naming the first difference, unless these are the settings it was traced with."""
        asked = _fields(trace)
        for name, own in _fields(self.manifest.trace).items():
            if own != asked[name]:
                raise InputError(
                    f"{self.root}: traced with trace.{name} {own}, but the recipe says {asked[name]}; "
                    "use the recipe that the traces were made with, or generate with this one"
                )

    def hold_back(self, every: int) -> tuple["TraceStore", "TraceStore"]:
        """Views of this store: (all documents but every n-th, every n-th one). Raises InputError if one is empty."""
        paths = self.paths()
        held = paths[every - 1 :: every]
        rest = [path for place, path in enumerate(paths, 1) if place % every]
        if not held or not rest:
            raise InputError(
                f"{self.root}: validation_every {every} leaves nothing to {'validate' if rest else 'train'} on, of "
                f"{len(paths)} documents; change it, or trace more"
            )
        return self.only(rest), self.only(held)

    def path(self, number: int) -> Path:
        """Of a document's file, whether it is there or not."""
        return self.root / file_of(number)

    def document(self, path: Path) -> TraceDocument:
        """One of `paths`."""
        return TraceDocument(path, self.manifest.trace, self.files[path])

    def __iter__(self) -> Iterator[TraceDocument]:
        return map(self.document, self.paths())

    def write(self, number: int, meta: DocumentMeta, raw: RawTrace, source: dict[str, Any] | None = None) -> int:
        """Write one document with its `source`, whole or not at all: its bytes. Raises InputError if not planned."""
        planned = self.manifest.planned(number)
        if meta.name != planned.name:
            raise InputError(f"{self.root}: document {number} is {planned.name}, not {meta.name}")
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
        metadata = {"document": json.dumps(meta.model_dump()), "store": planned.store, "content": planned.content}
        if source:
            metadata["source"] = json.dumps(source)  # as ASCII: half a surrogate pair in a prompt has no UTF-8
        path = self.path(number)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: save_tensors(tensors, file, metadata))
        return path.stat().st_size
