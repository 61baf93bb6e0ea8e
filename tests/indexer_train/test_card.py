"""The saved folder as others meet it: its card, and sentence-transformers loading it."""

import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from data_gen.core.files import read_sealed, write_sealed
from indexer_train.artefacts import inspect
from indexer_train.data.mixture import mix
from indexer_train.model import MemoryIndexer
from indexer_train.training.trainer import train


@pytest.fixture(scope="module")
def saved(stores, tiny_recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("card")
    train(stores[0], tiny_recipe.indexer, tiny_recipe.train, out)
    return out / "indexer"


def test_the_card_says_what_where_from_how_good_and_what_not(saved):
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "sentence-transformers" and "memory-indexer" in card.data.tags
    spec = MemoryIndexer(str(saved)).spec
    for part in ("## Model", "## Data", "## Metrics", "## Intended use", "## Limits", "llama", spec.backbone):
        assert part in card.text, part
    assert "- 6 documents: source `builtin`, 420 to 500 tokens; asked for text 4, single 4\n" in card.text
    assert "labels: the backbone's own attention\n" in card.text and "golden 0.05, " in card.text
    assert "`pip install .` in a clone" in card.text
    assert "traces of 6 documents; 2 others chose the checkpoint" in card.text
    rows = [line.split("|")[1:-1] for line in card.text.splitlines() if line.startswith("| validation")]
    assert {row[1].strip() for row in rows} == {"text", "single", "all"}
    assert {row[2].strip() for row in rows} == {str(selection) for selection in spec.selections}
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[3:] if cell.strip() != "-")


def copied(store, root, count, backbone=None, **documents):
    """A store of the first `count` documents, with another manifest."""
    shutil.copytree(store.root, root)
    for path in sorted(root.glob("*/doc_*"))[count:]:
        path.unlink()
    manifest = read_sealed(root / "manifest.json")
    manifest["plan"] = dict([*manifest["plan"].items()][:count])
    manifest["documents"] |= documents
    manifest["backbone"] |= backbone or {}
    write_sealed(root / "manifest.json", manifest)
    return root


def test_every_mixed_store_the_labels_and_the_backbones_name_are_told(stores, tiny_recipe, tmp_path):
    one = copied(stores[0], tmp_path / "one", 8, {"name": "somebody/llama"})
    other = copied(stores[0], tmp_path / "other", 3, source="package:numpy", train={"document": 3})
    settings = tiny_recipe.train.model_copy(update={"epochs": 1, "loss": "focal"})
    train(mix([one, other]), tiny_recipe.indexer, settings, tmp_path / "run", {one: 1.0, other: 3.0})
    saved = tmp_path / "run" / "indexer"
    card = (saved / "README.md").read_text()
    made = MemoryIndexer(str(saved)).spec.provenance
    assert [source.training for source in made.sources] == [6, 3] and made.training == 9 and made.validation == 2
    assert "traces of 9 documents; 2 others" in card and "- 6 documents: source `builtin`, 420 to 500 tokens;" in card
    assert "- 3 documents: source `package:numpy`, 420 to 500 tokens; asked for document 3; read 3 times an" in card
    assert "labels: the backbone's own attention" in card and "golden 0.05," in card
    assert "- backbone: somebody/llama (llama), fingerprint" in card
    facts = dict(inspect(saved, lambda items, _: items).facts)
    assert facts["trained on"].startswith("9 documents traced from somebody/llama (llama), labels: attention")


def test_the_code_in_the_card_runs(saved):
    (code,) = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.S)
    scope = {"hidden": torch.randn(2, 32), "position": 200, "history": torch.randn(50, 2, 32)}
    exec(code.replace("FOLDER", str(saved)), scope)
    assert scope["scores"].shape == (1, 50)


def test_the_folder_can_be_pushed_as_it_is(saved):
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert {"README.md", "modules.json", "config_sentence_transformers.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    for name in names:
        if name.endswith((".json", ".md")):
            assert str(saved.parent) not in (saved / name).read_text(), name


def test_sentence_transformers_loads_what_it_saved(saved, tmp_path):
    indexer = MemoryIndexer(str(saved))
    stock = SentenceTransformer(str(saved), trust_remote_code=True)
    queries = [(torch.randn(2, 32), 200), (torch.randn(2, 32), 7)]
    expected = indexer.encode_query(queries)
    assert (stock.encode_query(queries) == expected).all()
    indexer.save(str(tmp_path / "again"))
    again = MemoryIndexer(str(tmp_path / "again"))
    assert again.spec == indexer.spec and (again.encode_query(queries) == expected).all()
