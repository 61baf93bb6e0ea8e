"""What is measured, loaded, converted or inspected needs nothing of the training loop."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "indexer_train"
TRAINING = "indexer_train.training"
BATCHES = ["indexer_train.data.batches", "indexer_train.data.sampling"]
ROOMS = ("measure", "formats")
LIGHT = ["load", *(f"{room}.{path.stem}" for room in ROOMS for path in (PACKAGE / room).glob("[a-z]*.py"))]


def loaded(module):
    """Modules of the training package that importing `module` leaves loaded."""
    script = f"import sys, {module}; print(*(name for name in sys.modules if name.startswith('indexer_train')))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, stdout=subprocess.PIPE, check=True)
    return set(done.stdout.decode().split())


def test_loading_measuring_and_converting_import_no_training():
    found = loaded(", ".join(f"indexer_train.{name}" for name in LIGHT))
    assert {"indexer_train.measure.calibration", "indexer_train.formats.convert", "indexer_train.load"} <= found
    assert not [name for name in found if name.startswith(TRAINING) or name in BATCHES]


@pytest.mark.parametrize("module", ["indexer_train.artefacts", "indexer_train.losses", "indexer_train.data.batches"])
def test_inspecting_and_making_batches_import_no_training_loop(module):
    found = loaded(module)
    assert module in found and not [name for name in found if name.startswith(TRAINING)]


def test_the_training_loop_would_be_seen():
    assert {f"{TRAINING}.trainer", *BATCHES} <= loaded(f"{TRAINING}.trainer")
