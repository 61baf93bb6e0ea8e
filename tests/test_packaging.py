"""What is imported is declared, and what is declared is pinned."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENGINE = {"vllm"}
"""What the plugin for it is loaded by; docs/serving.md names it."""
OWN = {"cli", "data_gen", "indexer_train", "eval", "recipes", "benchmarks", "tests"}
RELEASE = {"dataloader", "train"}
"""Modules of the FlashMemory release, which two benchmarks run where a checkout is given."""


def canonical(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def imported(folders):
    """Distributions that the modules in `folders` import."""
    files = [file for name in folders for file in [*(ROOT / name).rglob("*.py"), *ROOT.glob(f"{name}.py")]]
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        found |= {name.split(".")[0] for name in names}
    providers = packages_distributions()
    foreign = found - ENGINE - OWN - RELEASE - set(sys.stdlib_module_names)
    return {canonical(name) for module in foreign for name in providers.get(module, [module])[:1]}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (["cli", "data_gen", "indexer_train", "eval", "recipes"], ["cpu", "gpu", "gguf", "lm-eval"]),
        (["tests"], ["cpu", "dev", "lm-eval"]),
    ],
)
def test_every_import_is_a_declared_dependency(folders, extras):
    declared = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    # faiss comes from either of two distributions, whichever is installed; both are declared.
    assert imported(folders) - {"faiss", "faiss-cpu", "faiss-gpu"} <= {canonical(line) for line in declared}


def test_every_dependency_of_the_tested_set_is_pinned():
    pinned = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["cpu"], *extras["gguf"], *extras["dev"]]
    assert {canonical(line) for line in lines} <= pinned
