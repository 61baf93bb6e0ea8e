"""The bundle that a runtime loads: bundle.json beside indexer.safetensors.

bundle.json: format, spec (indexer_train/spec.py IndexerSpec: layers, tau, chunking, protection, selections, shape,
key recipe, RoPE, backbone fingerprint) and the SHA-256 of both: the spec's canonical JSON, then the weights' file.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from data_gen.core.errors import InputError
from data_gen.core.files import sweep, whole, write_atomically
from indexer_train.scorer import Scorer
from indexer_train.spec import IndexerSpec

if TYPE_CHECKING:
    from indexer_train.model import MemoryIndexer

WEIGHTS = "indexer.safetensors"
HEADER = "bundle.json"
FORMAT = 2
REMEDY = "run `lookahead export` again"


class Bundle(BaseModel):
    """The JSON side of a bundle."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[2] = FORMAT
    spec: IndexerSpec
    sha256: str


def export_bundle(indexer: "MemoryIndexer", folder: Path) -> Bundle:
    """Write a bundle; the JSON appears last, so a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    weights = folder / WEIGHTS
    tensors = {name: value.detach().cpu().contiguous() for name, value in indexer.query_encoder.state_dict().items()}
    write_atomically(weights, lambda file: save_file(tensors, file))
    spec = indexer.spec.model_dump(mode="json")
    bundle = Bundle(spec=indexer.spec, sha256=_checksum(spec, weights))
    write_atomically(folder / HEADER, lambda file: file.write_text(bundle.model_dump_json(indent=2)))
    return bundle


def _checksum(spec: dict[str, Any], weights: Path) -> str:
    """Of the spec as it is written, so that fields which later versions add change nothing, and the weights."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode() + weights.read_bytes()).hexdigest()


def load_bundle(folder: Path) -> "MemoryIndexer":
    """The indexer of a bundle, as training and evaluation use it; else as `load_scorer`."""
    from indexer_train.model import MemoryIndexer  # brings sentence-transformers, which serving does without

    scorer = load_scorer(folder)
    indexer = MemoryIndexer.from_spec(scorer.spec, device="cpu")
    indexer.query_encoder.load_state_dict(scorer.state_dict())
    return indexer.to(scorer.device).eval()


def load_scorer(folder: Path) -> Scorer:
    """What Level 1 needs of a bundle, on the best device. Raises InputError for a missing, damaged or foreign one."""
    header, weights = folder / HEADER, folder / WEIGHTS
    if not header.exists() or not weights.exists():
        raise InputError(f"{folder}: no bundle there ({HEADER} and {WEIGHTS}); run `lookahead export` first")
    with whole(header, "bundle", REMEDY):
        content = json.loads(header.read_bytes())
        version = content["format"]
    if version != FORMAT:
        raise InputError(f"{header}: not a bundle of this version (format {version}, not {FORMAT}); {REMEDY}")
    with whole(header, "bundle", REMEDY):
        bundle = Bundle.model_validate(content)
    if _checksum(content["spec"], weights) != bundle.sha256:
        raise InputError(f"{folder}: damaged bundle (the checksum of {HEADER} and {WEIGHTS} differs); {REMEDY}")
    with whole(weights, "bundle", REMEDY):
        scorer = Scorer(bundle.spec)
        scorer.load_state_dict(load_file(weights))
    return scorer.to("cuda" if torch.cuda.is_available() else "cpu").eval()
