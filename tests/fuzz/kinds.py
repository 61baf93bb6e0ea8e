"""Everything that is fuzzed, by name; a new kind joins this list."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz import artefacts, inputs
from tests.fuzz.cases import Case
from tests.fuzz.world import World

Kind = Callable[[World, Path, Random], Case]
KINDS: dict[str, Kind] = {
    "stores": artefacts.store,
    "negatives": artefacts.negatives,
    "indexers": artefacts.indexer,
    "bundles": artefacts.bundle,
    "checkpoints": artefacts.checkpoint,
    "backbones": inputs.backbone,
    "documents": inputs.document,
    "recipes": inputs.recipes,
    "release": artefacts.release,
    "dumps": artefacts.dumps,
}
"""What is fuzzed, each for the same time."""
