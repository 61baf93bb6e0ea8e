"""Triton's packed queries against the indexer's own: every term, ragged sizes, far positions, more than one group."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.testing import do_bench_cudagraph

from data_gen.core.errors import InputError
from eval.serving.kernels import queries
from indexer_train.model import MemoryIndexer
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only, in_interpreter, run_interpreted
from tests.eval.serving.kernels.speed import speed
from tests.eval.serving.kernels.test_level1_kernel import make_indexer


def check(indexer: MemoryIndexer, batch: int, tolerance: float) -> None:
    """Each part of the packed query, and the position exactly; the copy holds these weights and states exactly."""
    spec, device = indexer.spec, indexer.device
    for parameter in indexer.parameters():
        parameter.data = parameter.to(queries.STORED).float()
    positions = torch.randint(0, 1 << 20, (batch,))
    hidden = torch.randn(batch, len(spec.layers), spec.hidden, device=device).to(queries.STORED).float()
    with torch.no_grad():
        expected = indexer.pack(hidden, positions)
    found = queries.QueryWeights(indexer.query_encoder).pack(hidden, positions)
    assert found.shape == expected.shape and torch.equal(found[:, -1], expected[:, -1])
    pairs = zip(*(each[:, :-1].unflatten(1, (len(spec.layers), -1)) for each in (found, expected)), strict=True)
    for one, other in pairs:
        for part, wanted in zip(one.split(spec.packed.sizes, -1), other.split(spec.packed.sizes, -1), strict=True):
            assert (part - wanted).norm() <= tolerance * wanted.norm()


@in_interpreter
@pytest.mark.parametrize(("bumps", "terms", "layers"), [(12, True, 2), (0, False, 1)])
@pytest.mark.parametrize("batch", [1, 17])
def test_as_the_indexer_packs(monkeypatch, bumps, terms, layers, batch):
    monkeypatch.setattr(queries, "STORED", torch.float16)
    check(make_indexer(bumps=bumps, terms=terms, layers=layers), batch, 4e-3)


@in_interpreter
def test_positions_beyond_the_backbone_are_refused():
    indexer = make_indexer()
    weights = queries.QueryWeights(indexer.query_encoder)
    with pytest.raises(InputError, match="outside"):
        weights.pack(torch.zeros(1, 3, 24), torch.tensor([1 << 24]))


@compiled_only
def test_compiled_for_sm_90():
    """The release's shape: 16 bytes a load, three programs of the second launch an SM."""
    first = compile_sm90(
        queries.first_kernel,
        dict.fromkeys(["states", "weights"], "*bf16:16") | dict.fromkeys(["added", "latents", "packed"], "*fp32:16")
        | {"batch": "i32", "depth": "i32:16"},
        {"LAYERS": 3, "RANK": 2048, "REST": 128, "SIZE": 16512, "ROWS": queries.ROWS, "DEPTH": queries.DEPTH},
        num_warps=4,
    )  # fmt: skip
    assert first.spilled == 0 and first.load_bytes[16] >= 8
    head = compile_sm90(
        queries.head_kernel,
        {"latents": "*fp32:16", "norms": "*fp32:16", "weights": "*bf16:16", "positions": "*i64:16",
         "frequencies": "*fp32:16", "signs": "*fp16:16", "crossed": "*fp16:16", "packed": "*fp32:16", "batch": "i32"},
        {"LAYERS": 3, "RANK": 2048, "HEADS": 128, "WIDTH": 128, "SIZE": 16512, "UNIT": 128**-0.5,
         "DEPTH": queries.HEAD_DEPTH},
        **queries.HEAD_OPTIONS,
    )  # fmt: skip
    # what lies on the stack are the digits of pi that the cosine of a large angle needs
    assert head.spilled <= 32 and 3 * (head.shared + 1024) <= 228 * 1024 and head.load_bytes[16] >= 16
    assert head.registers <= 168 and head.tensor_core["wgmma"]


@pytest.mark.gpu
@compiled_only
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device():
    for batch in (1, 8, 17):
        check(make_indexer(heads=128, width=128).cuda(), batch, 1e-2)
    indexer = make_indexer(bumps=0, terms=False, heads=128, width=128).cuda()
    weights = queries.QueryWeights(indexer.query_encoder)
    hidden, positions = torch.randn(1, 3, 24, device="cuda"), torch.tensor([4095], device="cuda")
    us = do_bench_cudagraph(lambda: weights.pack(hidden, positions)) * 1e3
    print(f"\nqueries, rank 16, hidden 24: {speed(us, weights.first.nbytes + weights.second.nbytes)}")


@compiled_only
def test_in_the_interpreter():
    run_interpreted(__file__)
