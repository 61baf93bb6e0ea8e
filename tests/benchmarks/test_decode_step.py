"""The arithmetic of the decode step's benchmark at tiny widths: its layers against a softmax written out, its sums."""

import json
import sys

import pytest
import torch

from benchmarks import decode_step
from benchmarks.attention_dense import dense
from benchmarks.attention_side import Caches, Shape, V4Step, fetching
from benchmarks.decode_step import Case, DenseShape, Step, fixed_flops, summary
from data_gen.core.key_bytes import decode_keys, pages_to_rows
from eval.plan.load import load_model
from eval.plan.plan import GIGA, PlanSettings
from eval.serving.entries import EntryShape, decode_entries, gather_entries

CPU = torch.device("cpu")
SHAPE = Shape(
    heads=4, entry=EntryShape(64, 64), index_heads=16, index_width=128, top=16, window=8, csa=2, hca=1, layers=4,
    csa_tokens=4, hca_tokens=8, indexer=(16, 32, 16),
)  # fmt: skip


def softmax_over(step, sequence, entries):
    """Attention of one token over decoded entries and a sink of logit zero, by the definition."""
    logits = step.query[sequence].float() @ entries.T * SHAPE.entry.width**-0.5
    weights = torch.cat([logits, torch.zeros(len(logits), 1)], dim=1).softmax(dim=1)[:, :-1]
    return weights @ entries


@pytest.mark.parametrize("resident", [None, 40])
def test_a_step_is_what_deepseek_v4_computes(resident):
    torch.manual_seed(0)
    caches = Caches(SHAPE, 512, 2, resident, CPU)
    step = V4Step(caches)
    found = step.step()
    assert len(found) == SHAPE.layers and len(step.stages()) == 5
    for sequence in (0, 1):
        listed = caches.listed[sequence].long()
        window = [
            decode_entries(gather_entries(near, caches.near_listed[sequence], SHAPE.entry), SHAPE.entry)
            for near in caches.near
        ]
        for layer in range(SHAPE.csa):
            rows = (
                pages_to_rows(caches.keys[layer], len(caches.keys[layer]) * 64)
                if resident is None
                else caches.keys[layer][:, :132]
            )
            keys = decode_keys(rows[listed])
            match = (step.index_query[sequence].float() @ keys.T).relu()
            best = (step.index_weights[sequence] @ match).topk(SHAPE.top).indices
            entries = gather_entries(caches.entries[layer], listed[best], SHAPE.entry, caches.page)
            near = torch.cat([decode_entries(entries, SHAPE.entry), window[layer]])
            torch.testing.assert_close(
                found[layer][sequence].float(), softmax_over(step, sequence, near), rtol=0.02, atol=0.02
            )
        far = decode_entries(gather_entries(caches.far[0], caches.far_listed[sequence], SHAPE.entry), SHAPE.entry)
        assert len(far) == 512 // 8
        expected = softmax_over(step, sequence, torch.cat([far, window[2]]))
        torch.testing.assert_close(found[2][sequence].float(), expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(
            found[3][sequence].float(), softmax_over(step, sequence, window[3]), rtol=0.02, atol=0.02
        )


def test_bytes_are_those_of_the_planner():
    full, lsa = (Caches(SHAPE, 512, 2, resident, CPU).bytes for resident in (None, 40))
    entry, key = SHAPE.entry.bytes, 132
    near = SHAPE.layers * 64 * entry
    assert full == 2 * (SHAPE.csa * 128 * (entry + key) + 64 * entry + near)
    padded = -(-entry // 16) * 16 + 144
    assert lsa == 2 * (SHAPE.csa * 40 * padded + 64 * entry + near)


def test_a_fetch_fills_slots_with_other_chunks():
    caches = Caches(SHAPE, 512, 2, 40, CPU)
    before = caches.hot.slots.clone()
    fetch, moved = fetching(caches.hot, 24)
    assert moved == 24 * caches.hot.layout.stride
    fetch()
    changed = (caches.hot.slots != before).any(dim=1)
    assert 12 < int(changed.sum()) <= 24
    known = {row.numpy().tobytes() for row in before}
    assert all(row.numpy().tobytes() in known for row in caches.hot.slots)


def test_a_dense_fetch_moves_whole_chunks_of_all_layers():
    torch.manual_seed(0)
    shape = DenseShape(layers=2, heads=4, kv_heads=2, width=8, hidden=32, tokens=4)
    side = dense(shape, 256, 2, 16, 0.25, CPU)
    assert side.fetched == 8 * 2 * 2 * 2 * 4 * 8 * 4  # chunks, layers, keys and values, heads, tokens, width, bytes
    first = side.step()
    side.fetch()
    assert all(not torch.equal(a, b) and bool(b.isfinite().all()) for a, b in zip(first, side.step(), strict=True))
    assert side.refresh().shape == (2, 16)


def test_what_no_mode_changes_is_the_papers_constant():
    flops = fixed_flops(load_model("deepseek-v4-flash", None), PlanSettings(), 1 << 20)
    assert flops / GIGA == pytest.approx(26.6, abs=0.1)


def row(mode, batch, ms, tokens):
    return Step("deepseek-v4-flash", 1 << 18, mode, batch, ms, {"all": ms}, ms, 0.0, 0.0, 1.0, 1.0, 0.0, tokens)


def test_ratios():
    case = Case(load_model("deepseek-v4-flash", None), PlanSettings(gpu_memory=100.0, gpus=8), (1 << 18,), (), None,
                {1 << 18: 1.74})  # fmt: skip
    steps = [row("full", 1, 4.0, 10.0), row("full", 8, 9.0, 40.0), row("lsa", 1, 2.0, 12.0), row("lsa", 8, 3.0, 60.0),
             row("lsa", 64, 9.0, 100.0)]  # fmt: skip
    (found,) = summary(case, steps)
    assert found["equal_batch"] == 8 and found["ratio_at_equal_batch"] == 1.5
    assert found["ratio_at_best"] == 2.5 and found["attention_ratio_alone"] == 2.0
    assert found["ratio_in_the_paper"] == 1.74 and found["requests_lsa"] > found["requests_full"] > 0


def test_the_toy_writes_every_row(tmp_path, monkeypatch, capsys):
    output = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["decode_step", "--toy", "--output", str(output)])
    decode_step.main()
    report = json.loads(output.read_text())
    assert report["commit"] and len(report["summary"]) == 2
    assert [(r["mode"], r["batch"]) for r in report["rows"]] == 2 * [("full", 1), ("full", 2), ("lsa", 1), ("lsa", 2)]
    for found in report["rows"]:
        gpus = next(each["gpus"] for each in report["settings"] if each["model"] == found["model"])
        seconds = (found["ms"] + found["rest_ms"]) / 1e3
        assert found["tokens_a_second"] == pytest.approx(gpus * found["batch"] / seconds)
        assert (found["refresh_ms"] > 0) == (found["mode"] == "lsa") and found["worst_ms"] >= found["refresh_ms"]
    assert capsys.readouterr().out.startswith(decode_step.HEADING)
