"""The selection kernels against a sort: any values, ties, absent chunks, lists in which the first cut is of no use."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the selection kernel needs triton")

from triton.testing import do_bench_cudagraph

from data_gen.core.errors import InputError
from eval.serving import level2
from eval.serving.kernels import nvrtc, score, topk
from eval.serving.level2 import NONE
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only, in_interpreter, run_interpreted
from tests.eval.serving.kernels.speed import speed
from tests.eval.serving.kernels.test_score import problem


def lists(listed, k, device="cpu"):
    """Scores by kind, each [listed]."""
    generator = torch.Generator(device).manual_seed(listed + k)
    normal = torch.randn(listed, generator=generator, device=device)
    columns = max(topk.FEWEST, 1 << (2 * k - 1).bit_length())
    in_one_column = -normal.abs()
    in_one_column[:: columns // 2] = 1 + normal[:: columns // 2].abs()  # two columns hold all large scores
    outlier = normal.clone()
    outlier[-1] = 1e30  # no score is above the mean of the column maxima, but one
    plateau = torch.ones_like(normal)
    plateau[::7] = 2
    return {
        "normal": normal,
        "rounded": normal.mul(4).round(),
        "absent": torch.where(normal > 0.5, normal, -torch.inf),
        "all absent": torch.full_like(normal, -torch.inf),
        "equal": torch.zeros_like(normal),
        "two zeros": torch.where(normal > 0, 0.0, -0.0),
        "plateau": plateau,
        "columns": in_one_column,
        "outlier": outlier,
        "large and small": normal * 10.0 ** torch.linspace(-38, 37, listed, device=device),
        "ascending": torch.arange(listed, device=device) / 7 - 3,
    }


def check(listed, k, device="cpu"):
    """Chosen scores are the k largest; slots are the list's own, none twice."""
    scores = torch.stack(list(lists(listed, k, device).values()))
    slots = torch.stack([torch.randperm(2 * listed, device=device)[:listed].int() for _ in scores])
    found = topk.select_resident(scores, slots, k)
    for name, row, slot, chosen in zip(lists(1, 1), scores, slots, found, strict=True):
        present = int((row > -torch.inf).sum())
        count = min(k, present)
        assert (chosen[count:] == NONE).all() and len(set(chosen[:count].tolist())) == count, name
        where = (slot[None] == chosen[:count, None]).int().argmax(dim=1)
        assert torch.equal(slot[where], chosen[:count]), name
        expected = row.sort(descending=True).values[:count]
        assert torch.equal(row[where].sort(descending=True).values, expected), name


SOURCE = Path(topk.__file__).with_name("topk.cu")
EMULATED = """
#include "{folder}/emulate.h"
#include "{source}"
extern "C" void run(const float* scores, const int* slots, int* best, int batch, int listed, int k) {{
    launch(batch, THREADS, [=] {{ select_kernel(scores, slots, best, listed, k); }});
}}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """topk.cu as a function of this CPU."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("topk")
    (folder / "topk.cpp").write_text(EMULATED.format(folder=Path(__file__).parent, source=SOURCE))
    library = folder / "topk.so"
    subprocess.run([compiler, "-O1", "-std=c++17", "-shared", "-fPIC", folder / "topk.cpp", "-o", library], check=True)

    def run(scores, slots, k):
        best = torch.full((len(scores), k), 7, dtype=torch.int32)
        ctypes.CDLL(str(library)).run(*(ctypes.c_void_p(t.data_ptr()) for t in (scores, slots, best)), *scores.shape, k)
        return best

    return run


@compiled_only
@pytest.mark.parametrize(
    ("listed", "k"), [(24576, 512), (6144, 512), (300, 512), (24573, 1024), (100, 8), (24576, 1), (1, 1)]
)
def test_cuda_source_against_the_torch_selection(emulated, listed, k):
    """To the order and the ties: those of the list, which Triton's columns do not keep."""
    scores = torch.stack(list(lists(listed, k).values()))
    slots = torch.stack([torch.randperm(2 * listed).int() for _ in scores])[:, :listed].contiguous()
    assert torch.equal(emulated(scores, slots, k), level2.select_resident(scores, slots, k))


@compiled_only
def test_in_the_interpreter():
    run_interpreted(__file__)


@in_interpreter
@pytest.mark.parametrize(("listed", "k"), [(300, 8), (5, 8), (1, 1), (128, 64)])
def test_interpreted_against_a_sort(listed, k):
    check(listed, k)


def test_other_layouts_are_refused():
    scores, slots = torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.int32)
    for bad, what in [
        ((scores, slots, 0), "best 0"),
        ((scores, slots, topk.MOST), "best 2048"),
        ((scores.double(), slots, 3), "float64"),
        ((scores, slots.long(), 3), "int64"),
        ((scores, slots[:, 1:], 3), "one shape"),
    ]:
        with pytest.raises(InputError, match=what):
            topk.select_resident(*bad)


@compiled_only
@pytest.mark.parametrize("columns", [1024, 2048])
def test_compiled_for_sm_90(columns):
    pointers = dict.fromkeys(["scores"], "*fp32:16") | dict.fromkeys(["slots", "kept", "best"], "*i32:16")
    constants = {"COLUMNS": columns, "STEPS": 3, "STEP": topk.TILE // columns}
    found = compile_sm90(
        topk._select, pointers | {"listed": "i32:16", "k": "i32:16"}, constants, num_warps=8, maxnreg=255
    )
    # four scores a load wherever the list is read; what was kept and the slots of the chosen come one by one
    assert found.spilled == 0 and set(found.load_bytes) == {4, 16} and found.load_bytes[16] >= 4 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda", [False, True])
def test_on_a_device(monkeypatch, cuda):
    if not cuda:
        monkeypatch.setattr(nvrtc, "has_nvrtc", lambda device: False)
    elif not nvrtc.has_nvrtc(torch.device("cuda")):
        pytest.skip("needs cuda.bindings")
    for listed, k in [(24576, 512), (6144, 512), (300, 512), (24576, 1024), (100, 8), (24576, 1), (1, 1)]:
        check(listed, k, "cuda")
    for batch in (1, 32):
        given = problem(batch, 24576, 64, 128, device="cuda")
        scores, slots = score.score_resident(*given), given[3]
        ties = scores.mul(16).round()
        assert torch.equal(topk.select_resident(ties, slots, 512), topk.select_resident(ties, slots, 512))
        select = do_bench_cudagraph(lambda a=scores, b=slots: topk.select_resident(a, b, 512)) * 1e3
        sort = do_bench_cudagraph(lambda a=scores: a.topk(512)) * 1e3
        both = do_bench_cudagraph(lambda a=given: topk.select_resident(score.score_resident(*a), a[3], 512)) * 1e3
        listed = batch * 24576
        print(
            f"\nLevel-2 top-512 in {'CUDA' if cuda else 'Triton'}, {batch} x 24,576 resident: "
            f"{speed(select, listed * 4)}; torch.topk {sort:.1f} us; "
            f"score and top-512 {speed(both, listed * (132 + 8))}, target 14 us for one"
        )
