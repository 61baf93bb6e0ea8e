"""Scores of mean keys in an engine's blocks: in the interpreter and on a GPU against the torch backend."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from data_gen.core.chunks import Chunking
from data_gen.core.tensors import send
from eval.serving.kernels import block_scores as kernels
from eval.serving.kernels.block_scores import STEP, TILE, block_scores
from eval.serving.kernels.block_scores import _score as block_scores_kernel
from eval.serving.level1 import Level1
from eval.serving.select import Limits, resident_chunks, unchecked_chunks
from eval.serving.vllm.keys import BlockKeys
from eval.serving.vllm.sequences import Sequence
from eval.serving.vllm.worker import Worker
from indexer_train.config import IndexerConfig
from indexer_train.scorer import Scorer
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from indexer_train.spec import IndexerSpec
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only, in_interpreter, run_interpreted

TOKENS = 16


def on_a_gpu(test):
    """A test that needs one."""
    needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needed(compiled_only(test)))


def make_scorer(heads=4, width=192, layers=2, join="max", bumps=12, terms=True) -> Scorer:
    torch.manual_seed(3)
    shape = IndexerConfig(heads=heads, rank=16, distance_bumps=bumps, scale=terms, slot=terms, bias=terms, join=join)
    spec = IndexerSpec(
        shape=shape, layers=list(range(layers)), hidden=24, key_width=width, window=64, backbone="x",
        chunking=Chunking(tokens=TOKENS),
    )  # fmt: skip
    scorer = Scorer(spec).eval()
    for name, parameter in scorer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "wq_" in name else 0.5)
    return scorer


def check(lengths: list[int], device: str, **shape) -> None:
    """Blocks in any order, histories of these lengths in tokens."""
    scorer = make_scorer(**shape).to(device)
    spec, layers = scorer.spec, len(scorer.spec.layers)
    wide = max(lengths) // TOKENS + 3  # tables are wider than what a sequence has
    keys = BlockKeys(len(lengths) * wide, layers, spec.key_width, TOKENS, torch.device(device), torch.float32)
    keys.sums.normal_(std=TOKENS)
    table = torch.randperm(len(lengths) * wide).int().view(len(lengths), wide).to(device)
    level1 = Level1(scorer, Limits(cap=99))
    positions = torch.tensor([length - 1 for length in lengths])
    queries = level1.pack(torch.randn(len(lengths), layers, spec.hidden), positions)
    found = block_scores(spec, queries, keys.sums, table)
    expected = level1.joined_scores(queries, torch.stack([keys.means(row) for row in table]))
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=3e-3)
    seen = torch.arange(wide) < (positions[:, None] + 1) // TOKENS
    assert torch.equal(found.isfinite().cpu(), seen)


@in_interpreter
@pytest.mark.parametrize("join", ["max", "mean", "sum"])
@pytest.mark.parametrize(("bumps", "terms"), [(12, True), (0, False), (5, False)])
def test_every_term_and_join(join, bumps, terms):
    check([1000], "cpu", join=join, bumps=bumps, terms=terms)


@in_interpreter
@pytest.mark.parametrize("lengths", [[1100, 17, 400], [1024, 1025], [15]])
def test_sequences_of_several_lengths(lengths):
    check(lengths, "cpu")


@in_interpreter
@pytest.mark.parametrize(("heads", "width"), [(16, 1024), (20, 48)])
def test_heads_and_widths(heads, width):
    check([700, 90], "cpu", heads=heads, width=width, layers=3)


def make_worker(monkeypatch) -> Worker:
    """One that scores by Triton without a GPU, with 20 blocks and no engine."""
    worker, scorer = object.__new__(Worker), make_scorer()
    worker.spec, worker.level1, worker.memory = scorer.spec, Level1(scorer, Limits(cap=99)), None
    worker.runner = SimpleNamespace(kv_cache_config=SimpleNamespace(num_blocks=20))
    worker.captured = SimpleNamespace(keys=[torch.zeros(1)])
    worker.settings = SimpleNamespace(host_gib=None)
    monkeypatch.setattr(Worker, "_fused", lambda self: self.memory is None)
    return worker


@in_interpreter
def test_a_server_compiles_it_when_it_starts(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "block_scores", lambda *args: calls.append(args) or block_scores(*args))
    worker = make_worker(monkeypatch)
    worker.register_caches([])
    assert [args[3].shape for args in calls] == [(1, 1)]
    assert not worker.keys.sums.any()


@in_interpreter
def test_a_server_scores_with_it_as_with_torch(monkeypatch):
    worker = make_worker(monkeypatch)
    worker.register_caches([])
    worker.keys.sums.normal_(std=TOKENS)
    tables, positions = torch.randperm(20).int().view(2, 10), torch.tensor([9 * TOKENS + 3, 5 * TOKENS - 1])
    queries = worker.level1.pack(torch.randn(2, 2, worker.spec.hidden), positions)
    due, totals = [(name, Sequence(), table) for name, table in zip("ab", tables, strict=True)], [9, 5]
    found = worker._scores(queries, due, totals)
    monkeypatch.setattr(Worker, "_fused", lambda self: False)
    expected = worker._scores(queries, due, totals)
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=3e-3)
    assert found.isfinite().sum(1).tolist() == totals


@compiled_only
def test_in_the_interpreter():
    run_interpreted(__file__)


@compiled_only
@pytest.mark.parametrize("width", [192, 1024])
def test_compiled_for_sm_90(width):
    pointers = {"queries": "*fp32", "sums": "*fp32:16", "table": "*i32:16", "scores": "*fp32:16"}
    found = compile_sm90(
        block_scores_kernel,
        pointers | {"query_stride": "i32", "table_stride": "i32", "chunks": "i32"},
        {"LAYERS": 3, "HEADS": 16, "WIDTH": width, "BUMPS": 12, "SCALE": True, "SLOT": True, "BIAS": True,
         "JOIN": "max", "TOKENS": TOKENS, "HEAD_TILE": 16, "BUMP_TILE": 16, "TILE": TILE, "STEP": STEP},
        num_warps=4,
    )  # fmt: skip
    assert found.spilled == 0 and found.tensor_core
    assert found.load_bytes[16] > 0  # keys, four values a load


@on_a_gpu
@pytest.mark.parametrize(("heads", "width"), [(16, 1024), (4, 192), (20, 48)])
def test_on_a_gpu(heads, width):
    check([40_000, 17, 131_000], "cuda", heads=heads, width=width, layers=3)


@on_a_gpu
@pytest.mark.parametrize("rule", [Budget(budget=0.1), Threshold(cuts=[Cut(score=0.0)]), Coverage(share=0.9)])
def test_nothing_waits_for_the_gpu(rule):
    """From states to sets, and then the same sets as when it is waited for."""
    scorer, device = make_scorer().to("cuda"), torch.device("cuda")
    chunking, limits, places = scorer.spec.chunking, Limits(cap=64), torch.tensor([1599, 3210])
    level1, hidden = Level1(scorer, limits), torch.randn(2, 2, scorer.spec.hidden, device=device)
    keys = BlockKeys(500, 2, scorer.spec.key_width, TOKENS, device, torch.float32)
    keys.sums.normal_(std=TOKENS)
    table = torch.randperm(500, device=device).int()[:400].view(2, 200)

    def sets():
        scores = block_scores(scorer.spec, level1.pack(hidden, send(places, device)), keys.sums, table)
        return scores, unchecked_chunks(scores, places, chunking, rule, limits)

    sets()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores, found = sets()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = resident_chunks(scores.cpu(), places, chunking, rule, limits)
    for name in ("ids", "counts", "demand"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
