"""The examples do what they say, at small size."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nbformat
import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from nbclient import NotebookClient

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import load_backbone
from data_gen.config import BackboneConfig
from data_gen.core.fingerprint import checkpoint_tensors, fingerprint
from examples import push_to_hub
from indexer_train.formats.bundle import export_bundle
from indexer_train.load import load_indexer
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget
from recipes import load_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_notebook_finds_a_far_note(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = (EXAMPLES / "pocket_prompt.txt").read_text()
    (key,) = re.findall(r"recall (\w+) \?$", asked.strip())
    (noted,) = re.findall(rf"note {key} (\w+) \.", asked)
    notebook = nbformat.read(EXAMPLES / "decode_with_a_bundle.ipynb", nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    stored = [output["text"] for cell in notebook.cells for output in cell.get("outputs", [])]
    NotebookClient(notebook, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = [output["text"] for output in outputs if output.get("name") == "stdout"]
    assert printed == stored, "the notebook's outputs are not what its cells print"
    assert printed[1] == f"full attention: {noted}\n"
    answer, kept = re.fullmatch(r"with the indexer: (\w+)\n([\d.]+)% of the chunks resident.*\n", printed[2]).groups()
    assert answer == noted and float(kept) < 20


def test_the_readme_decodes_as_it_says(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    asked = (EXAMPLES / "pocket_prompt.txt").read_text().strip()
    key = asked.split()[-2]
    assert capsys.readouterr().out.startswith(re.findall(rf"note {key} (\w+) \.", asked)[0])


def test_the_quickstarts_model_becomes_a_folder_that_its_bundle_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/serving.md", "exec"), names := {})
    model, _ = load_backbone(names["BackboneConfig"](path=str(tmp_path / "smollm2")))
    found, before = model.state_dict(), names["model"].state_dict()
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    own = DenseBackbone(load_backbone(load_recipe("smollm2-quickstart").backbone)[0]).info.fingerprint
    assert fingerprint(checkpoint_tensors(tmp_path / "smollm2")) == own


def test_five_texts_become_a_bundle_and_a_report(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for page in ("concepts", "architecture", "glossary", "reliability", "faq"):
        shutil.copy(ROOT / "docs" / f"{page}.md", texts)
    command = [sys.executable, EXAMPLES / "train_on_my_texts.py", texts, "--out", tmp_path / "run"]
    model = ["--backbone", "tiny", "--layers", "0", "1", "2", "--longest", "700"]
    subprocess.run([*command, *model], check=True, cwd=ROOT)
    traces = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("traces/*/*/doc_*")}
    subprocess.run([*command, *model], check=True, cwd=ROOT)  # which continues
    assert traces and all(path.stat().st_mtime_ns == before for path, before in traces.items())
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert recipe.documents.source == str(tmp_path / "run" / "texts.jsonl") and recipe.trace.layers == [0, 1, 2]
    assert (tmp_path / "run" / "bundle" / "bundle.json").exists() and (tmp_path / "run" / "report.html").exists()


@pytest.fixture
def train_on_my_texts(monkeypatch, capsys):
    """What the script says last when some arguments end it with exit code 2."""
    script = runpy.run_path(str(EXAMPLES / "train_on_my_texts.py"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_on_my_texts.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            script["main"]()
        assert stop.value.code == 2
        return "".join(capsys.readouterr().err.splitlines()[-1:])

    return call


def test_what_is_no_text_or_no_model_is_refused_in_one_line(tmp_path, train_on_my_texts):
    texts, out = tmp_path / "texts", ("--out", tmp_path / "run")
    assert f"{texts}: no .txt or .md file there" in train_on_my_texts(texts, "--backbone", "tiny", *out)
    texts.mkdir()
    (texts / "a.txt").write_text("some words")
    for model, complaint in (
        (tmp_path / "model", "no model that transformers reads"),
        (ROOT / "recipes/pocket_v4/model", "calls no layer full_attention; name some with --layers"),
        ("model.gguf", "name them with --layers"),
        ("tiny", "name them with --layers"),
    ):
        assert f"--backbone {model}: " in (line := train_on_my_texts(texts, "--backbone", model, *out))
        assert complaint in line
    few = train_on_my_texts(texts, "--backbone", "tiny", "--layers", 0, *out)
    assert "12 characters of text are too few; 32768 are the least" in few
    (texts / "b.txt").write_bytes(b"\xff")
    assert f"{texts / 'b.txt'}: not UTF-8 text" in train_on_my_texts(texts, "--backbone", "tiny", *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "other"), [("recipe.yaml", "texts.jsonl"), ("texts.jsonl", "recipe.yaml")])
def test_what_was_edited_is_not_overwritten(tmp_path, train_on_my_texts, name, other):
    (tmp_path / "a.txt").write_text("some words " * 3200)
    edited = tmp_path / name
    edited.write_text("my own")
    asked = (tmp_path, "--backbone", "tiny", "--layers", 0, "--out", tmp_path)
    assert f"{edited}: not what this call would write" in train_on_my_texts(*asked)
    assert edited.read_text() == "my own" and not (tmp_path / other).exists()


def test_texts_are_counted_and_written_in_characters(tmp_path, train_on_my_texts, monkeypatch):
    (tmp_path / "a.txt").write_text("雪" * 38_400)
    asked = (tmp_path, "--backbone", "tiny", "--layers", 0, "--out", tmp_path / "run")
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    train_on_my_texts(*asked)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["documents"]["tokens"] == [300, 600]
    assert (tmp_path / "run" / "texts.jsonl").read_text().startswith('{"text": "雪雪')


def test_layers_are_spread_over_those_that_see_everything(tmp_path):
    settings = {"model_type": "gemma3_text", "num_hidden_layers": 12}
    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(12)]
    (tmp_path / "config.json").write_text(json.dumps(settings | {"layer_types": kinds}))
    recipe_for = runpy.run_path(str(EXAMPLES / "train_on_my_texts.py"))["recipe_for"]
    recipe = recipe_for(tmp_path / "texts.jsonl", 100_000, str(tmp_path), None, 8000)
    assert recipe["trace"]["layers"] == [5, 8, 11]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder laid out as the hub's cache, which uploads go to; downloads read it, as on a machine that is offline."""

    def create_repo(api, repo_id, **options):
        return RepoUrl(f"https://huggingface.co/{'datasets/' if options.get('repo_type') else ''}{repo_id}")

    def snapshot(repo_id, repo_type):
        folder = tmp_path / f"{repo_type or 'model'}s--{repo_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    def upload_folder(api, *, repo_id, folder_path, path_in_repo="", repo_type=None, **options):
        shutil.copytree(folder_path, snapshot(repo_id, repo_type) / path_in_repo, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{'0' * 40}")

    def upload_file(api, *, path_or_fileobj, path_in_repo, repo_id, repo_type=None, **options):
        (snapshot(repo_id, repo_type) / path_in_repo).write_bytes(path_or_fileobj)

    for method in (create_repo, upload_folder, upload_file):
        monkeypatch.setattr(HfApi, method.__name__, method)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_an_indexer_goes_to_a_hub_and_back(finished, hub):
    push_to_hub.push_indexer(finished / "indexer", finished / "bundle", "you/indexer")
    back, before = push_to_hub.pull_indexer("you/indexer"), load_indexer(finished / "indexer")
    assert back.spec == before.spec
    for name, value in before.query_encoder.state_dict().items():
        assert torch.equal(value, back.query_encoder.state_dict()[name])


def test_the_calls_that_the_hub_script_names_load_what_it_pushed(finished, recipe, hub):
    push_to_hub.push_indexer(finished / "indexer", finished / "bundle", "you/indexer")
    before = load_indexer(finished / "indexer")
    assert MemoryIndexer("you/indexer", device="cpu").digest() == before.digest()
    (code,) = re.findall(r"```python\n(.*?)```", bundle_readme(hub), re.DOTALL)
    model, _ = load_backbone(BackboneConfig(path=str(recipe.parent / "model")))
    exec(compile(code, "README.md", "exec"), names := {"model": model})
    assert names["runtime"].indexer.digest() == before.digest()


def bundle_readme(hub):
    """The card of the pushed bundle."""
    (card,) = hub.glob("models--you--indexer-bundle/snapshots/*/README.md")
    return card.read_text()


def test_a_bundle_gets_a_card(finished, hub, lookahead):
    push_to_hub.push_indexer(finished / "indexer", finished / "bundle", "you/indexer")
    card = bundle_readme(hub)
    assert "memory-indexer" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "| layers read | 0, 2 |" in card and "| chunks | 4 tokens; protected: the first 1, the newest 2 |" in card
    (snapshot,) = hub.glob("models--you--indexer-bundle/snapshots/*")
    assert lookahead("inspect", snapshot)[0] == 0


def test_a_bundles_card_says_how_the_bundle_selects(finished, hub, tmp_path):
    """The indexer beside it may be calibrated anew after the export."""
    exported = load_indexer(finished / "indexer")
    exported.spec.selections[:] = [Budget(budget=0.07)]
    export_bundle(exported, tmp_path / "bundle")
    push_to_hub.push_indexer(finished / "indexer", tmp_path / "bundle", "you/indexer")
    assert "| serves | the best 7.0% of the chunks |" in bundle_readme(hub)


REFUSALS = [
    LocalTokenNotFoundError("no token"),
    HFValidationError("no name"),
    HfHubHTTPError("no right", response=cast(Any, SimpleNamespace(headers={}, request=None))),
    HTTPError("no network"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_what_the_hub_refuses_is_told_in_one_line(finished, hub, monkeypatch, capsys, refusal):
    def create_repo(*arguments, **options):
        raise refusal

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", "traces", str(finished / "traces/train"), "you/traces"])
    with pytest.raises(SystemExit) as stop:
        push_to_hub.main()
    assert stop.value.code == 2 and f"error: you/traces: {refusal}; check" in capsys.readouterr().err


def test_a_damaged_or_foreign_bundle_is_not_pushed(finished, hub, tmp_path, monkeypatch, capsys):
    bundle = shutil.copytree(finished / "bundle", tmp_path / "damaged")
    (bundle / "indexer.safetensors").write_bytes(b"damaged")
    pocket = ROOT / "recipes/pocket_v4/bundle"
    for other, complaint in ((bundle, "damaged bundle"), (pocket, "not exported from")):
        asked = ["indexer", finished / "indexer", "you/indexer", "--bundle", other]
        monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, asked)])
        with pytest.raises(SystemExit) as stop:
            push_to_hub.main()
        assert stop.value.code == 2 and f"{other}: {complaint}" in capsys.readouterr().err
    assert not list(hub.glob("models--*"))


@pytest.mark.parametrize(
    ("rows", "word"), [(999, "n<1K"), (1000, "1K<n<10K"), (10_000, "10K<n<100K"), (10**8, "100M<n<1B")]
)
def test_a_trace_store_says_its_size_in_the_hubs_words(rows, word):
    assert push_to_hub.size_category(rows) == word


def test_a_trace_store_gets_a_card(finished, hub, lookahead):
    push_to_hub.push_traces(finished / "traces" / "train", "you/traces")
    (snapshot,) = hub.glob("datasets--you--traces/snapshots/*")
    card = (snapshot / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["size_categories"] == "n<1K"
    assert "| layers traced | 0, 2 of the full-attention layers 0, 1, 2 |" in card
    assert lookahead("inspect", snapshot)[0] == 0


def test_the_server_script_asks_for_what_it_needs(tmp_path):
    script = EXAMPLES / "serve_with_vllm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    for arguments, complaint in (([], "usage: "), (["model", tmp_path], "no bundle there")):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and complaint in done.stderr
