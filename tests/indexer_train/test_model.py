"""The score against a literal float64 loop, and the model as a sentence-transformers model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.chunks import Chunking
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle, load_bundle
from indexer_train.load import load_indexer
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.scoring import distance_bumps
from indexer_train.selection import Cut, Threshold


def make(**shape):
    torch.manual_seed(0)
    spec = IndexerSpec(
        shape=IndexerConfig(**({"heads": 3, "rank": 5} | shape)),
        layers=[1, 4],
        hidden=8,
        key_width=6,
        chunking=Chunking(tokens=4),
        window=16,
        backbone="abc",
        selections=[Threshold(target="budget", value=0.1, cuts=[Cut(score=-1.5)])],
    )
    indexer = MemoryIndexer.from_spec(spec, device="cpu").eval()
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return indexer


def reference(indexer, hidden, keys, positions):
    """z as the docstring of scoring.py has it, one number at a time."""
    shape, state = indexer.spec.shape, {k: v.double() for k, v in indexer.query_encoder.state_dict().items()}
    scores = torch.zeros(len(hidden), len(keys), 2, dtype=torch.float64)
    for which, layer in enumerate(indexer.spec.layers):
        weights = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"encoders.{layer}.")}
        for t, h in enumerate(hidden[:, which].double()):
            c = weights["wq_a.weight"] @ h
            c = c / math.sqrt(float((c * c).mean()) + 1e-6) * weights["q_norm.weight"]
            q = (weights["wq_b.weight"] @ c).reshape(shape.heads, 6)
            w = weights["weights_proj.weight"] @ h / math.sqrt(6 * shape.heads)
            extras = []
            if "extras.weight" in weights:
                extras = (weights["extras.weight"] @ h + weights["extras.bias"]).tolist()
            bumps, rest = extras[: shape.distance_bumps], extras[shape.distance_bumps :]
            scale = rest.pop(0) if shape.scale else 0.0
            slot = rest.pop(0) if shape.slot else 0.0
            for s, key in enumerate(keys[:, which].double()):
                z = sum(float(w[i]) * max(0.0, float(q[i] @ key)) for i in range(shape.heads))
                log = math.log2(max(1, int(positions[t]) - 4 * s))
                for p, u in enumerate(bumps):
                    nearest = min(max(log, 4), 3 + shape.distance_bumps)
                    z += u * max(0.0, 1 - abs(nearest - (4 + p)))
                scores[t, s, which] = math.exp(scale) * z - slot
    if shape.join == "max":
        return scores.amax(-1)
    return scores.sum(-1) if shape.join == "sum" else scores.mean(-1)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"distance_bumps": 0},
        {"scale": False, "join": "max"},
        {"slot": False, "join": "mean"},
        {"distance_bumps": 0, "scale": False, "slot": False},
    ],
)
def test_scores_equal_the_reference(shape):
    indexer = make(**shape)
    hidden, keys, positions = torch.randn(3, 2, 8), torch.randn(30, 2, 6), torch.tensor([119, 60, 4000])
    expected = reference(indexer, hidden, keys, positions)
    torch.testing.assert_close(indexer.joined_scores(hidden, keys, positions).double(), expected, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 1 << 21), st.integers(1, 16))
def test_bumps_sum_to_one_at_every_distance(distance, count):
    bumps = distance_bumps(torch.tensor([distance]), count)
    torch.testing.assert_close(bumps.sum(), torch.tensor(1.0))
    assert bumps.min() >= 0


def test_encode_and_similarity_score_like_serving():
    indexer = make()
    hidden, keys = torch.randn(3, 2, 8), torch.randn(30, 2, 6)
    positions = [120, 121, 4000]
    queries = indexer.encode_query(list(zip(hidden, positions, strict=True)))
    documents = indexer.encode_document([(key,) for key in keys])
    scores = indexer.similarity(queries, documents)
    torch.testing.assert_close(scores, indexer.joined_scores(hidden, keys, torch.tensor(positions)))


def test_saved_and_exported_indexers_score_bit_for_bit(tmp_path):
    indexer = make()
    hidden, keys, positions = torch.randn(3, 2, 8), torch.randn(30, 2, 6), torch.tensor([119, 60, 4000])
    expected = indexer.joined_scores(hidden, keys, positions)
    indexer.save_pretrained(str(tmp_path / "saved"))
    export_bundle(indexer, tmp_path / "bundle")
    for loaded in (load_indexer(tmp_path / "saved"), load_bundle(tmp_path / "bundle")):
        assert loaded.spec == indexer.spec
        assert torch.equal(loaded.joined_scores(hidden, keys, positions).cpu(), expected)
