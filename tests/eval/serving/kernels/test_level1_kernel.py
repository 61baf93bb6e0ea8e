"""Level 1's kernels: in the interpreter and on a GPU against the torch backend, compiled for sm_90 without one."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys
from data_gen.core.rope import Rope
from eval.serving import level1_triton
from eval.serving.kernels.device import check_fp8, warn_once
from eval.serving.kernels.level1 import score_kernel
from eval.serving.kernels.limits import limit_kernel
from eval.serving.level1 import Level1, PagedKeys, open_level1
from eval.serving.level1_triton import (
    LIMIT_OPTIONS,
    PROGRAMS_AN_SM,
    REGISTERS,
    SCORE_OPTIONS,
    TritonLevel1,
    limit_constants,
    limit_programs,
    program_bytes,
    programs_an_sm,
    score_constants,
    sequences_at_once,
)
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only, in_interpreter, run_interpreted
from tests.eval.serving.kernels.speed import speed


def make_indexer(
    join: str = "max", bumps: int = 12, terms: bool = True, layers: int = 3, heads: int = 16, width: int = 32
) -> MemoryIndexer:
    torch.manual_seed(9)
    shape = IndexerConfig(heads=heads, rank=16, distance_bumps=bumps, scale=terms, slot=terms, bias=terms, join=join)
    spec = IndexerSpec(
        shape=shape, layers=list(range(layers)), hidden=24, key_width=width, window=64, backbone="x",
        chunking=Chunking(tokens=4, sink=1, recent=8), key="fp8_rope_hadamard",
        rope=Rope(dims=16, theta=160000.0, positions=1 << 24),
    )  # fmt: skip
    indexer = MemoryIndexer.from_spec(spec)
    for name, parameter in indexer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "wq_" in name else 0.5)
    return indexer.eval()


def inputs(indexer: MemoryIndexer, *chunks: int) -> tuple[torch.Tensor, PagedKeys]:
    """Packed queries and the shuffled pages of one history per length."""
    spec, generator = indexer.spec, torch.Generator().manual_seed(sum(chunks))
    pages = -(-max(chunks) // 64)
    keys = torch.randn(pages * len(chunks) * 64, len(spec.layers), spec.key_width, generator=generator)
    paged = PagedKeys.from_rows(encode_keys(keys))
    table = torch.randperm(pages * len(chunks), generator=generator).int().view(len(chunks), pages)
    hidden = torch.randn(len(chunks), len(spec.layers), spec.hidden, generator=generator)
    positions = torch.tensor([4 * n - 1 + row % 4 for row, n in enumerate(chunks)])
    queries = Level1(indexer, Limits(cap=9)).pack(hidden, positions)
    return queries, PagedKeys(paged.pages.to(queries.device), table.to(queries.device))


def in_half(indexer: MemoryIndexer, queries: torch.Tensor) -> torch.Tensor:
    """Packed queries with q as fp16 products see it."""
    spec = indexer.spec
    layers = queries[:, :-1].unflatten(1, (len(spec.layers), -1)).clone()
    part = layers[..., : spec.shape.heads * spec.key_width]
    part.copy_(part.half())
    return torch.cat([layers.flatten(1), queries[:, -1:]], dim=1)


def check_against_torch(indexer, queries, keys, limits, selection) -> None:
    """The same scores, and exactly the sets that the torch rules make of the kernel's scores, call after call."""
    torch_backend = Level1(indexer, limits, selection)
    kernel = TritonLevel1(indexer, limits, selection)
    scores = kernel.joined_scores(queries, keys)
    expected = torch_backend.joined_scores(in_half(indexer, queries), keys)
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=2e-4)
    torch_backend.joined_scores = lambda *_: scores
    wanted, found = (each.resident(queries, keys) for each in (torch_backend, kernel))
    for name in ("counts", "demand", "ids"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def middle(indexer: MemoryIndexer, queries: torch.Tensor, keys: PagedKeys) -> Threshold:
    """A threshold that about a third of the chunks reach."""
    scores = Level1(indexer, Limits(cap=9)).joined_scores(queries, keys)
    return Threshold(cuts=[Cut(score=float(scores[scores.isfinite()].quantile(0.67)))])


@in_interpreter
@pytest.mark.parametrize("join", ["max", "mean", "sum"])
@pytest.mark.parametrize(("bumps", "terms"), [(12, True), (0, False), (5, False)])
def test_every_term_and_join(join, bumps, terms):
    indexer = make_indexer(join, bumps, terms)
    queries, keys = inputs(indexer, 150)
    check_against_torch(indexer, queries, keys, Limits(cap=150), middle(indexer, queries, keys))


@in_interpreter
@pytest.mark.parametrize("chunks", [(300, 5), (64, 128), (9,), (1, 65, 200)])
def test_ragged_batches(chunks):
    indexer = make_indexer(layers=2)
    queries, keys = inputs(indexer, *chunks)
    check_against_torch(indexer, queries, keys, Limits(cap=300), middle(indexer, queries, keys))


@pytest.fixture
def many_programs(monkeypatch):
    """The second launch shares a few hundred chunks among as many programs as it would a million tokens."""
    monkeypatch.setattr(level1_triton, "LIMIT_TILE", 64)


@in_interpreter
@pytest.mark.parametrize(
    ("floor", "cap", "score"),
    [(0, 300, -99.0), (0, 40, -99.0), (0, 9, None), (0, 40, None), (210, 300, None), (0, 300, 99.0), (60, 80, 99.0)],
)
def test_floor_and_cap(floor, cap, score, many_programs):
    indexer = make_indexer(layers=1)
    queries, keys = inputs(indexer, 210, 77)
    rule = middle(indexer, queries, keys) if score is None else Threshold(cuts=[Cut(score=score)])
    check_against_torch(indexer, queries, keys, Limits(floor=floor, cap=cap), rule)


@in_interpreter
def test_budgets_ties_and_cuts_by_length(many_programs):
    indexer = make_indexer(layers=1, bumps=0, terms=False)
    queries, keys = inputs(indexer, 330, 77)
    keys.table[0, :3] = keys.table[0, 3]  # the same page four times: ties
    check_against_torch(indexer, queries, keys, Limits(cap=300), Budget(budget=0.2))
    check_against_torch(indexer, queries, keys, Limits(floor=70, cap=100), Budget(budget=0.29))
    cut = middle(indexer, queries, keys).cuts[0].score
    rule = Threshold(cuts=[Cut(longest=310, score=cut), Cut(longest=1000, score=99.0), Cut(score=cut)])
    check_against_torch(indexer, queries, keys, Limits(cap=300), rule)


@in_interpreter
def test_batches_beyond_the_device_go_in_parts(monkeypatch):
    """Two sequences a launch, of five; the sets are those of each sequence alone."""
    monkeypatch.setattr(level1_triton, "sequences_at_once", lambda *_: 2)
    indexer = make_indexer(layers=2)
    queries, keys = inputs(indexer, 90, 5, 130, 64, 77)
    check_against_torch(indexer, queries, keys, Limits(cap=40), middle(indexer, queries, keys))
    check_against_torch(indexer, queries, keys, Limits(cap=40), Budget(budget=0.3))


@in_interpreter
def test_a_table_too_short_is_told_apart():
    indexer = make_indexer(layers=1)
    queries, keys = inputs(indexer, 330, 77)
    short = PagedKeys(keys.pages, keys.table[:, :2])
    found = TritonLevel1(indexer, Limits(cap=40)).resident(queries, short)
    assert found.counts.tolist()[0] == -1 and found.ids[0].eq(-1).all() and int(found.counts[1]) >= 9


@in_interpreter
def test_fp8_products_choose_nearly_the_same():
    """Jaccard of the sets; queries lose three bits of their mantissa's ten."""
    indexer = make_indexer(layers=2, heads=32, width=64)
    queries, keys = inputs(indexer, 500)
    limits, rule = Limits(cap=500), middle(indexer, queries, keys)
    exact = set(Level1(indexer, limits, rule).resident(queries, keys).row(0).tolist())
    rough = set(TritonLevel1(indexer, limits, rule, fp8=True).resident(queries, keys).row(0).tolist())
    assert len(exact & rough) / len(exact | rough) > 0.85


@in_interpreter
def test_refusals_name_what_is_lacking():
    indexer = make_indexer()
    queries, keys = inputs(indexer, 70)
    with pytest.raises(InputError, match="keys: the Triton backend reads pages"):
        TritonLevel1(indexer, Limits(cap=40)).resident(queries, keys.rows(0, 0, 70))
    with pytest.raises(InputError, match="16-byte aligned"):
        pool = torch.zeros(9, 3, keys.pages.shape[2] + 4, dtype=torch.uint8)[..., 4:]
        TritonLevel1(indexer, Limits(cap=40)).resident(queries, PagedKeys(pool, keys.table))
    with pytest.raises(InputError, match="heads, key_width: 12 x 32"):
        TritonLevel1(make_indexer(heads=12), Limits(cap=40))
    with pytest.raises(InputError, match=r"^selection: the Triton backend has no coverage.*; use the torch backend$"):
        TritonLevel1(indexer, Limits(cap=40), Coverage(share=0.9))
    indexer.spec.key = "mean_pre_rope"
    with pytest.raises(InputError, match="not mean_pre_rope keys"):
        TritonLevel1(indexer, Limits(cap=40))


SCORE_ARGUMENTS = {
    "queries": "*fp32:16", "query_stride": "i32", "operands": "*fp8e4nv:16", "weights": "*fp32:16",
    "values": "*fp8e4nv:16", "page_stride": "i32:16",
    "layer_stride": "i32:16", "scales": "*fp32:16", "scale_page_stride": "i32:16", "scale_layer_stride": "i32:16",
    "table": "*i32:16", "table_width": "i32:16", "cut_ends": "*i32:16", "cut_scores": "*fp32:16",
    "logits": "*fp32:16", "scores": "*fp32:16", "status": "*i32:16", "scratch": "*i32:16", "ids": "*i32:16",
    "found": "*i32:16", "cap": "i32:16",
}  # fmt: skip
LIMIT_ARGUMENTS = {
    "positions": "*fp32", "position_stride": "i32", "scores": "*fp32:16", "chunks": "i32:16", "found": "*i32:16",
    "scratch": "*i32:16", "shares": "*i32:16", "status": "*i32:16",
    "ids": "*i32:16", "counts": "*i32:16", "demand": "*i32:16", "budget": "*fp64:16", "floor": "i32", "cap": "i32:16",
}  # fmt: skip


@compiled_only
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("bumps", [0, 12])
def test_scores_on_tensor_cores_without_spills(fp8, bumps):
    """The release's shape: three programs an SM must fit, as the grid assumes."""
    spec = make_indexer(bumps=bumps, terms=bumps > 0, heads=128, width=128).spec
    found = compile_sm90(score_kernel, SCORE_ARGUMENTS, score_constants(spec, 2, 132, fp8), **SCORE_OPTIONS)
    assert found.cooperative and found.spilled == 0 and found.registers <= REGISTERS
    assert PROGRAMS_AN_SM * (found.shared + 1024) <= 228 * 1024
    assert found.shared + 1024 <= program_bytes(spec) and programs_an_sm(228 * 1024, spec) == PROGRAMS_AN_SM
    assert found.tensor_core["wgmma"] == (4 if fp8 else 8) and not found.tensor_core["mma"]  # steps of 32 or 16 bytes
    assert not {1, 2} & set(found.load_bytes) and found.load_bytes[16 if fp8 else 8] >= 8  # keys
    assert ("QGMMA" if fp8 else "HGMMA") in found.sass


@compiled_only
@pytest.mark.parametrize(("heads", "width"), [(16, 32), (64, 64), (64, 128)])
def test_a_program_needs_no_more_shared_memory_than_the_grid_assumes(heads, width):
    """A cooperative launch of more programs than fit at once fails."""
    spec = make_indexer(heads=heads, width=width).spec
    found = compile_sm90(score_kernel, SCORE_ARGUMENTS, score_constants(spec, 1, 132, False), **SCORE_OPTIONS)
    assert found.shared + 1024 <= program_bytes(spec)


@compiled_only
@pytest.mark.parametrize("budget", [False, True])
def test_limits_without_spills(budget):
    constants = limit_constants(make_indexer().spec, budget, 396, 128) | {"FIRST": 0, "LAST": 6}
    found = compile_sm90(limit_kernel, LIMIT_ARGUMENTS, constants, **LIMIT_OPTIONS)
    assert found.cooperative and found.spilled == 0
    assert not {1, 2} & set(found.load_bytes) and found.load_bytes[16] >= 6


SIZES = [262_144, 65_536, 16_384]


@pytest.fixture(scope="module")
def pool():
    """The release's shape (three layers of 128 x 128, the bias a serving engine takes), and 400 MiB of pages."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    indexer = make_indexer(bumps=0, terms=False, heads=128, width=128).cuda()
    rows = [encode_keys(torch.randn(65_536, 3, 128, device="cuda")) for _ in range(16)]
    return indexer, torch.cat([PagedKeys.from_rows(part).pages for part in rows])


@pytest.mark.gpu
@compiled_only
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("chunks", SIZES)
def test_on_the_gpu(pool, chunks, fp8):
    """Against torch; then the time of a call with selection, from pages that are in no cache."""
    indexer, pages = pool
    width = chunks // 64
    positions = torch.tensor([4 * chunks - 1])
    queries = Level1(indexer, Limits(cap=9)).pack(torch.randn(1, 3, 24), positions)
    order = torch.randperm(len(pages), device="cuda").int()
    tables = [order[start : start + width][None].contiguous() for start in range(0, len(order), width)]
    keys = PagedKeys(pages, tables[0])
    scores = Level1(indexer, Limits(cap=9)).joined_scores(queries, keys)
    rule = Threshold(cuts=[Cut(score=float(scores[0].kthvalue(int(0.95 * chunks)).values))])
    limits = Limits(cap=chunks // 8)
    if not fp8:
        check_against_torch(indexer, queries, keys, limits, rule)
        check_against_torch(indexer, queries, keys, Limits(cap=chunks // 64), rule)
    kernel = TritonLevel1(indexer, limits, rule, fp8=fp8)
    exact = set(Level1(indexer, limits, rule).resident(queries, keys).row(0).tolist())
    found = set(kernel.resident(queries, keys).row(0).tolist())
    capped = TritonLevel1(indexer, Limits(cap=chunks // 64), rule, fp8=fp8)
    micros = per_call(kernel, queries, pages, tables)
    with_cap = per_call(capped, queries, pages, tables)
    read = chunks * 3 * 132
    jaccard = len(exact & found) / len(exact | found)
    print(
        f"\nLevel 1, {chunks} chunks, {'fp8' if fp8 else 'fp16'}, with selection: {speed(micros, read)}; "
        f"{with_cap:.1f} us when the cap bites; Jaccard to fp32 {jaccard:.4f}"
    )
    assert jaccard > (0.9 if fp8 else 0.99)


def per_call(level1: TritonLevel1, queries: torch.Tensor, pages: torch.Tensor, tables: list[torch.Tensor]) -> float:
    """Microseconds a call: a CUDA graph of calls over different pages one after the other, median of 20 replays."""
    level1.resident(queries, PagedKeys(pages, tables[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for table in tables:
            level1.resident(queries, PagedKeys(pages, table))
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(tables))
    return sorted(times[5:])[10]


@compiled_only
@pytest.mark.parametrize(("processors", "sequences"), [(132, 1), (132, 8), (16, 3), (7, 1), (7, 8), (1, 1), (132, 300)])
def test_programs_that_wait_for_one_another_run_at_once(processors, sequences):
    parts = limit_programs(processors, sequences, 262_144)
    assert parts == 1 or parts * sequences <= processors
    assert limit_programs(processors, sequences, 64) == 1
    for layers in (1, 3, 21):
        at_once = sequences_at_once(processors, 3 * processors, layers)
        assert at_once == 1 or (at_once * layers <= 3 * processors and at_once <= processors)


@compiled_only
def test_gpus_older_than_fp8_get_torch_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    indexer = SimpleNamespace(spec=make_indexer().spec, device=torch.device("cuda"))
    warn_once.cache_clear()
    for _ in range(2):
        assert type(open_level1(indexer, Limits(cap=40))) is Level1
    (said,) = caplog.messages
    assert "computed by torch, not by Triton" in said and "this GPU has 8.6" in said
    for backend in ("triton", "triton-fp8"):
        with pytest.raises(InputError, match=r"capability 8\.9 for fp8 keys, and this GPU has 8\.6"):
            open_level1(indexer, Limits(cap=40), backend=backend)
    with pytest.raises(InputError, match=r"capability 8\.9"):
        TritonLevel1(indexer, Limits(cap=40))
    with pytest.raises(InputError, match=r"capability 8\.9"):
        check_fp8(indexer.device)  # what the Level-2 kernels ask


@compiled_only
def test_fp8_products_can_be_asked_for(monkeypatch):
    monkeypatch.setattr("eval.serving.level1.lacks", lambda device: None)
    monkeypatch.setattr(level1_triton.triton.knobs.runtime, "interpret", True)  # a device is not asked for
    for backend, fp8 in (("triton", False), ("triton-fp8", True), ("auto", False)):
        assert open_level1(make_indexer(), Limits(cap=40), backend=backend).fp8 == fp8


@compiled_only
def test_a_bundle_that_triton_lacks_gets_torch_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr("eval.serving.level1.lacks", lambda device: None)
    warn_once.cache_clear()
    for _ in range(2):
        assert type(open_level1(make_indexer(heads=12), Limits(cap=40))) is Level1
    with pytest.raises(InputError, match="cap: 8 chunks"):  # not the backend's fault
        open_level1(make_indexer(), Limits(cap=8))
    with pytest.raises(InputError, match="has no coverage"):
        open_level1(make_indexer(), Limits(cap=40), Coverage(share=0.9), "triton")
    monkeypatch.setattr(level1_triton.triton.knobs.runtime, "interpret", True)
    assert type(open_level1(make_indexer(), Limits(cap=40), Coverage(share=0.9))) is Level1
    heads, coverage = caplog.messages
    assert "heads, key_width: 12 x 32" in heads and "has no coverage" in coverage
    caplog.clear()
    monkeypatch.undo()
    if not torch.cuda.is_available():
        open_level1(make_indexer(), Limits(cap=40))
        assert not caplog.messages  # on a CPU torch is no second choice


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_told():
    with pytest.raises(InputError, match="triton needs a CUDA device"):
        open_level1(make_indexer(), Limits(cap=40), backend="triton")


@compiled_only
def test_in_the_interpreter():
    run_interpreted(__file__)
