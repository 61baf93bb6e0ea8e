"""Shipped recipes are valid, explained, and inside the wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_gen.errors import InputError
from recipes import load_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_say_what_to_expect(name):
    assert load_recipe(name) == load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    header = [line for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header).lower()
    assert all(word in text for word in ("hardware", "time", "expect")), text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("backbone: [", "not YAML"),
        ("backbone: {path: x}", "documents: Field required"),
        ("just words", "top level"),
        ("backbone: {path: x, pth: y}", "backbone.pth: unknown key"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, complaint):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=complaint):
        load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(InputError, match=SHIPPED[0]):
        load_recipe("nothing-like-it")


def test_the_wheel_carries_recipes_and_packages(tmp_path):
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {f"recipes/{name}.yaml" for name in SHIPPED} <= names
    assert {"cli.py", "data_gen/store.py", "indexer_train/model.py", "eval/recall.py"} <= names
