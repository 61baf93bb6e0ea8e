"""Shipped recipes are valid, explained, and inside the wheel."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data_gen.core.errors import InputError
from data_gen.text.documents import draw_documents
from recipes import load_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_say_what_to_expect(name):
    by_path = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    assert by_path == load_recipe(name).model_copy(update={"took": None})  # a file may have been changed since
    header = [line for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "Hardware: " in text and "PENDING" not in text, text
    assert all(re.search(rf"{word}.*\d", text, re.DOTALL) for word in ("[Tt]ime: ", "Expected")), text


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_that_trains_names_its_loss_and_its_criterion(name):
    """Else another default would change what its figures are of."""
    train = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["train"]
    assert {"loss", "choose"} <= train.keys() or train == {"epochs": 1}, "only one that trains nothing leaves them out"


class FourCharacters:
    """A tokenizer of a token every four characters, about what English takes with those of real models."""

    chat_template = None
    all_special_ids = ()

    def __call__(self, text, **_):
        pieces = [text] if isinstance(text, str) else text
        ids = [[0] * -(-len(piece) // 4) for piece in pieces]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, ids):
        return "word" * len(ids)


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name).documents.source == "builtin"])
def test_the_built_in_text_is_enough_for_the_recipe(name):
    recipe = load_recipe(name)
    for split in ("train", "heldout"):
        documents = list(draw_documents(recipe.documents, recipe.trace, FourCharacters(), 1 << 20, split))
        assert len(documents) == sum(getattr(recipe.documents, split).values())


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


def test_text_that_is_followed_has_a_prompt(tmp_path):
    settings = load_recipe("smollm2-quickstart").model_dump(mode="json")
    settings["decode"]["text_tokens"] = settings["documents"]["tokens"][0]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"decode\.text_tokens 1000: a text of documents\.tokens 1000"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("section", ["decode", "benchmark"])
def test_a_first_window_is_no_longer_than_the_others(tmp_path, section):
    settings = load_recipe("smollm2-quickstart").model_dump(mode="json")
    for first, refused in ((64, False), (65, True)):
        settings[section]["first_window"] = first
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
        if not refused:
            assert getattr(load_recipe(str(tmp_path / "r.yaml")), section).first_window == first
            continue
        with pytest.raises(InputError, match=rf"{section}\.first_window 65: longer than trace\.window 64"):
            load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(InputError, match=SHIPPED[0]):
        load_recipe("nothing-like-it")


BLOCKED = """
import socket
connect = socket.socket.connect
def local_only(self, address):
    host = address[0] if isinstance(address, tuple) else "localhost"
    if host not in ("localhost", "127.0.0.1", "::1"):
        raise OSError(f"network touched: {address}")
    return connect(self, address)
socket.socket.connect = local_only
"""


def test_the_debug_recipe_runs_as_written_without_a_network(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_"))}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "cli", "run", "debug", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["recall"]
    recall = {(row["policy"], row["task"], row["budget"]): row["mass_recall"] for row in rows}
    for task in ("text", "single"):
        random, found, oracle = (recall[policy, task, 0.1] for policy in ("random", "indexer", "oracle"))
        assert random + 0.01 < found < oracle
    assert (tmp_path / "out" / "bundle" / "bundle.json").exists()


def test_the_paper_recipe_draws_three_negatives_for_each_positive():
    settings = load_recipe("deepseek-v4-flash")
    candidates, shape = settings.train.candidates, settings.indexer
    assert (candidates.kind, candidates.negatives, candidates.positives) == ("sampled", 3, 512)
    assert (settings.train.loss, shape.heads, shape.rank, shape.join) == ("focal", 128, 2048, "max")
    assert settings.trace.window == 64 and len(settings.trace.layers) == 8


def test_the_wheel_carries_recipes_and_packages(tmp_path):
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {f"recipes/{name}.yaml" for name in SHIPPED} <= names
    assert {"recipes/pocket_v4/model/model.safetensors", "recipes/pocket_v4/config.yaml"} <= names
    assert {"cli.py", "data_gen/traces/store.py", "indexer_train/model.py", "eval/offline/recall.py"} <= names
    assert {f"{package}/py.typed" for package in ("data_gen", "indexer_train", "eval", "recipes")} <= names


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("indexer", {"rank": 2**70}),
        ("indexer", {"heads": 10**30}),
        ("indexer", {"heads": 60_000, "rank": 60_000}),
        ("indexer", {"distance_bumps": 10**9}),
        ("documents", {"tokens": [1, 2**40]}),
        ("documents", {"seed": 10**40}),
        ("trace", {"window": 2**31}),
        ("train", {"epochs": 10**12}),
        ("decode", {"answer_tokens": 10**12}),
    ],
)
def test_numbers_that_nothing_can_hold_are_refused_by_name(tmp_path, tiny_recipe, section, change):
    settings = tiny_recipe.model_dump(mode="json")
    settings[section] |= change
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=f"^recipe {path}: {section}") as refused:
        load_recipe(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["a: " + "1" * 5000, "[" * 100_000, "a: !!python/object:os.system {}", "\0", "- \t:"])
def test_what_no_yaml_parser_survives_is_one_line(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^recipe {path}: ") as refused:
        load_recipe(str(path))
    assert "\n" not in str(refused.value)


def test_the_quickstart_is_asked_again_in_other_held_out_documents():
    first, again = (load_recipe(name).model_dump() for name in ("smollm2-quickstart", "smollm2-quickstart-again"))
    assert sum(first.pop("took")["seconds"].values()) < 12 * 60 and again.pop("took") is None
    for recipe in (first, again):
        del recipe["decode"]["text_documents"], recipe["decode"]["text_tokens"]
    assert (first["documents"].pop("seed"), again["documents"].pop("seed")) == (0, 1)
    assert first == again


def test_the_quickstarts_third_questions_are_of_text_and_words_of_their_own():
    again, fresh = (load_recipe(f"smollm2-quickstart-{name}").model_dump() for name in ("again", "fresh"))
    changed = ("source", "heldout_share", "wordings", "seed")
    asked = {name: (again["documents"].pop(name), fresh["documents"].pop(name)) for name in changed}
    assert all(one != other for one, other in asked.values()) and again == fresh
