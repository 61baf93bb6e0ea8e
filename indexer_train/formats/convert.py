"""Indexers to bundles and the FlashMemory release's checkpoints and back; what a format cannot carry is reported."""

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal

import torch

from data_gen.core.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.types import Manifest
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.formats.flashmemory import Checkpoint, Format, check_table, read_checkpoint, write_checkpoint
from indexer_train.formats.serving_notes import SERVED, WINDOW, serving_notes
from indexer_train.formats.weights import LayerWeights
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Budget, Coverage


@dataclass
class Exported:
    """files: what was written; notes: one line on each thing that the files do not say."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def keep_layers(indexer: MemoryIndexer, layers: list[int]) -> MemoryIndexer:
    """The same indexer with some of its layers only; calibrated rules and what was measured, of all of them, go.

    Raises InputError when a layer is not there.
    """
    spec = indexer.spec
    if (missing := sorted(set(layers) - set(spec.layers))) or not layers:
        raise InputError(f"layers {missing or layers}: the indexer has {spec.layers}")
    if len(set(layers)) < len(layers):
        raise InputError(f"layers {layers}: one is named twice")
    if sorted(layers) == spec.layers:
        return indexer
    budgets = [each for each in spec.selections if isinstance(each, Budget)]
    made = spec.provenance and spec.provenance.model_copy(update={"metrics": []})
    changed = {"layers": sorted(layers), "selections": budgets, "provenance": made, "outputs": []}
    fewer = spec.model_copy(update=changed)
    kept = MemoryIndexer.from_spec(fewer, str(indexer.device))
    places = kept.query_encoder.state_dict()
    kept.query_encoder.load_state_dict({name: indexer.query_encoder.state_dict()[name] for name in places})
    return kept.eval()


def export_indexer(
    indexer: MemoryIndexer, out: Path, format: Literal["bundle"] | Format, layers: list[int] | None = None
) -> Exported:
    """Write an indexer, or some of its layers, for serving.

    Raises InputError when the indexer has terms that the format's score lacks, or is served by a coverage, which the
    format lacks too: its selection would be another one.
    """
    kept = indexer if layers is None else keep_layers(indexer, layers)
    if format == "bundle":
        export_bundle(kept, out)
        exported = Exported([out])
        if kept.spec.backbone == V4_FLASH.fingerprint:
            exported.notes.append(
                "made from dumps or for them, which do not say whose weights they are: no model will take this bundle. "
                "Export as flashmemory-safetensors, then `lookahead convert` that with --traces of your checkpoint"
            )
    else:
        exported = _export_checkpoint(kept, out, format)
    if kept.spec.selections != indexer.spec.selections:
        left = " and ".join(sorted({f"{each.by}s" for each in indexer.spec.selections if not isinstance(each, Budget)}))
        exported.notes.append(f"{left} were calibrated on layers {indexer.spec.layers} together: left out")
    return exported


def _export_checkpoint(indexer: MemoryIndexer, out: Path, format: Format) -> Exported:
    spec, shape = indexer.spec, indexer.spec.shape
    terms = {"distance_bumps": shape.distance_bumps, "scale": shape.scale, "slot": shape.slot}
    if foreign := [name for name, value in terms.items() if value]:
        raise InputError(
            f"{format} has no place for {', '.join(foreign)}: train with distance_bumps 0, scale false, slot false"
        )
    if spec.key != V4_FLASH.key or spec.rope is None:
        raise InputError(f"{format} is for DeepSeek-V4's indexer keys; this indexer reads {spec.key} keys")
    if isinstance(spec.selection, Coverage):
        raise InputError(
            f"{format}: the indexer is served by a coverage, and the release's serving knows a threshold only; "
            "`lookahead calibrate` finds one"
        )
    weights = {layer: LayerWeights.of(indexer.query_encoder.encoder(layer)) for layer in spec.layers}
    return Exported(write_checkpoint(weights, spec.rope, out, format), serving_notes(indexer, format))


def import_checkpoints(
    paths: list[Path],
    layers: list[int] | None = None,
    manifest: Manifest | None = None,
    offset: float = 0.0,
    positions: int | None = None,
) -> MemoryIndexer:
    """An indexer made of one or several of the release's checkpoint files.

    layers: CSA ordinals to keep (all by default); with a single file of a single layer, the ordinal it is.
    manifest: of the traces that the indexer is for; V4-Flash as the release serves it by default. offset: the logit
    offset it was served with, which becomes the bias. positions: first position to refuse, instead of the end of the
    file's RoPE table. Raises InputError when files do not belong together.
    """
    if not isfinite(offset):
        raise InputError(f"--offset {offset}: must be a finite number")
    only = layers[0] if layers and len(layers) == len(paths) == 1 else None
    found = {path: read_checkpoint(path, only) for path in paths}
    weights: dict[int, LayerWeights] = {}
    for path, checkpoint in found.items():
        if twice := sorted(set(weights) & set(checkpoint.layers)):
            raise InputError(f"{path}: layers {twice} are in another file as well")
        weights |= checkpoint.layers
    if layers is not None and (missing := sorted(set(layers) - set(weights))):
        raise InputError(f"layers {missing} are not in the files, which hold {sorted(weights)}")
    kept = {layer: weights[layer] for layer in sorted(layers or weights)}
    indexer = MemoryIndexer.from_spec(_spec(found, kept, manifest, offset, positions), device="cpu")
    for layer, native in kept.items():
        native.copy_into(indexer.query_encoder.encoder(layer))
    bias = indexer.query_encoder.bias
    if offset and bias is not None:
        torch.nn.init.constant_(bias, offset)
    return indexer.eval()


def _spec(
    found: dict[Path, Checkpoint],
    kept: dict[int, LayerWeights],
    manifest: Manifest | None,
    offset: float,
    positions: int | None,
) -> IndexerSpec:
    info = V4_FLASH if manifest is None else manifest.backbone
    if info.key != V4_FLASH.key or info.rope is None:
        raise InputError(f"the traces hold {info.key} keys; the release's checkpoints score DeepSeek-V4's indexer keys")
    shapes = {(weights.heads, weights.rank, weights.hidden, weights.width) for weights in kept.values()}
    if len(shapes) > 1:
        raise InputError(
            f"layers {sorted(kept)} differ in heads, rank or widths; all layers of an indexer must be alike"
        )
    ((heads, rank, hidden, width),) = shapes
    if (hidden, width) != (info.hidden, info.key_width):
        hint = "" if manifest else "; of another model, pass --traces"
        raise InputError(
            f"hidden and key width are {hidden} and {width}, "
            f"but the backbone has {info.hidden} and {info.key_width}{hint}"
        )
    tables = {path: checkpoint.table for path, checkpoint in found.items() if checkpoint.table is not None}
    for path, table in tables.items():
        check_table(path, table, info.rope.model_copy(update={"positions": len(table)}))
    reach = positions or min([len(table) for table in tables.values()], default=info.rope.positions)
    return IndexerSpec(
        shape=IndexerConfig(
            heads=heads, rank=rank, distance_bumps=0, scale=False, slot=False, bias=bool(offset), join="max"
        ),
        layers=list(kept),
        hidden=hidden,
        key_width=width,
        chunking=SERVED if manifest is None else manifest.trace.chunking,
        window=WINDOW if manifest is None else manifest.trace.window,
        backbone=info.fingerprint,
        key=info.key,
        rope=info.rope.model_copy(update={"positions": reach}),
    )
