"""The bundle that a runtime loads: bundle.json beside indexer.safetensors.

bundle.json: format, spec (indexer_train/model.py IndexerSpec: layers, tau, chunking, protection, selections, shape,
key recipe, RoPE, backbone fingerprint) and the SHA-256 of the weights.
"""

import hashlib
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from data_gen.errors import InputError
from data_gen.store import write_atomically
from indexer_train.model import IndexerSpec, MemoryIndexer

WEIGHTS = "indexer.safetensors"
HEADER = "bundle.json"


class Bundle(BaseModel):
    """The JSON side of a bundle."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    spec: IndexerSpec
    sha256: str


def export_bundle(indexer: MemoryIndexer, folder: Path) -> Bundle:
    """Write a bundle; the JSON appears last, so a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    tensors = {name: value.detach().cpu().contiguous() for name, value in indexer.query_encoder.state_dict().items()}
    write_atomically(weights, lambda file: save_file(tensors, file))
    bundle = Bundle(spec=indexer.spec, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    write_atomically(folder / HEADER, lambda file: file.write_text(bundle.model_dump_json(indent=2)))
    return bundle


def load_bundle(folder: Path) -> MemoryIndexer:
    """The indexer of a bundle, on the best device. Raises InputError for a missing, damaged or foreign one."""
    header, weights = folder / HEADER, folder / WEIGHTS
    if not header.exists() or not weights.exists():
        raise InputError(f"{folder}: no bundle there ({HEADER} and {WEIGHTS}); run `lookahead export` first")
    try:
        bundle = Bundle.model_validate_json(header.read_text())
    except ValidationError as error:
        raise InputError(f"{header}: not a bundle of this version ({error.errors()[0]['msg']})") from error
    if hashlib.sha256(weights.read_bytes()).hexdigest() != bundle.sha256:
        raise InputError(f"{weights}: damaged (checksum differs from {HEADER}); export again")
    indexer = MemoryIndexer.from_spec(bundle.spec, device="cuda" if torch.cuda.is_available() else "cpu")
    indexer.query_encoder.load_state_dict(load_file(weights))
    return indexer.eval()
