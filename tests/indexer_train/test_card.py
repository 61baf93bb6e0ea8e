"""The saved folder as others meet it: its card, and sentence-transformers loading it."""

import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from data_gen.core.files import read_sealed, write_sealed
from indexer_train.artefacts import inspect
from indexer_train.card import model_card
from indexer_train.data.mixture import mix
from indexer_train.model import MemoryIndexer
from indexer_train.spec import OutputRow, Outputs
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
    for part in ("## Model", "## Data", "## Diagnosis", "## Intended use", "## Limits", "llama", spec.backbone):
        assert part in card.text, part
    assert "- 6 documents: source `builtin`, 420 to 500 tokens; asked for text 4, single 4\n" in card.text
    assert "labels: the backbone's own attention\n" in card.text and "golden 0.05, " in card.text
    assert "`pip install .` in a clone" in card.text
    assert "traces of 6 documents; 2 others chose the checkpoint" in card.text
    rows = [line.split("|")[1:-1] for line in card.text.splitlines() if line.startswith("| validation")]
    assert {row[1].strip() for row in rows} == {"text", "single", "all"}
    assert {row[2].strip() for row in rows} == {str(selection) for selection in spec.selections}
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[3:] if cell.strip() != "-")


def test_a_card_without_answers_says_how_to_measure_them_above_recall(saved):
    text = (saved / "README.md").read_text()
    none, recall = (
        text.index("No answers or text KL were measured with this indexer: `lookahead decode"),
        "| validation",
    )
    assert none < text.index("## Model") < text.index("## Diagnosis") < text.index(recall) and "## Metrics" not in text


def test_answers_and_text_lead_the_card(saved):
    spec = MemoryIndexer(str(saved)).spec
    rows = [
        OutputRow(
            task="held-out documents", questions=36, texts=8, right={"full": 21.0, "indexer": 23.0, "recency": 2.0},
            kl={"full": 0.0, "indexer": 0.0774, "recency": 0.0853}, kv_share=0.2114, kv_mb=14.26,
        ),
        OutputRow(
            task="ruler vt, 4,096 tokens, budget 10.0%", questions=20, right={"full": 17.25, "indexer": 12.0},
            kv_share=0.13, kv_mb=3.0,
        ),
    ]  # fmt: skip
    told = {"recipe": "quick.yaml", "commit": "abc1234", "hardware": "2 threads of a CPU", "date": "2026-01-02"}
    spec.outputs = [Outputs(verb="decode", documents="44 of 1,000 tokens", rows=rows, **told)]
    card = model_card(spec)
    lines = [line for line in card.split("## Model")[0].splitlines() if line.startswith("| ")]
    assert lines == [
        "| asked | right: indexer | full attention | recency | texts | KL: indexer | recency | KV kept | KV MB |",
        "| held-out documents | 23 of 36 | 21 of 36 | 2 of 36 | 8 | 0.077 | 0.085 | 21.1 % | 14.3 |",
        "| ruler vt, 4,096 tokens, budget 10.0% | 12 of 20 | 17.2 of 20 | - | - | - | - | 13.0 % | 3.0 |",
    ]
    assert "- decode: 44 of 1,000 tokens; recipe quick.yaml, commit abc1234, 2 threads of a CPU, 2026-01-02\n" in card
    assert card.index("held-out documents") < card.index("## Model") < card.index("## Diagnosis")
    assert "No answers" not in card


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
