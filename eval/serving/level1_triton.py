"""The Triton backend of Level 1: two launches, or three, nothing read back by the host, outputs allocated once.

Opened by `open_level1`. Programs of a launch wait for one another, so launches are cooperative: the driver starts all
programs at once or refuses, and no wait depends on the order in which a GPU starts them. A batch that does not fit goes
in parts.
"""

from dataclasses import dataclass, fields

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
import torch
import triton

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE
from eval.serving.kernels.device import check_fp8
from eval.serving.kernels.level1 import round_kernel, score_kernel
from eval.serving.kernels.limits import SCRATCH, STEPS, limit_kernel
from eval.serving.kernels.queries import QueryWeights
from eval.serving.level1_torch import Indexer, Level1, PagedKeys, check_keys
from eval.serving.select import Limits, Resident
from indexer_train.scorer import Scorer
from indexer_train.selection import Budget, Coverage, Selection
from indexer_train.spec import IndexerSpec

PROGRAMS_AN_SM = 3
"""Of the first launch, at most: all share an SM's 65,536 registers."""
REGISTERS = 65536 // (128 * PROGRAMS_AN_SM) // 8 * 8
"""What a thread may use so that they fit, 128 threads each; the hardware's steps are of 8."""
ROUNDED = 16
"""Heads that a program rounds to fp8."""
STAGES = 6
"""Depth of the pipeline that gives two pages in flight: a page's address is loaded first."""
LIMIT_PROGRAMS = 128
"""Of the second launch, together, at most."""
LIMIT_TILE = 2048
SCORE_OPTIONS = {"num_warps": 4, "maxnreg": REGISTERS, "launch_cooperative_grid": True}
LIMIT_OPTIONS = {"num_warps": 8, "launch_cooperative_grid": True}
"""How the two kernels with waits are compiled and launched."""
FOREVER = 2**31 - 1


@dataclass(frozen=True)
class Buffers:
    """What a call writes, for B sequences of T pages, [B, ...] each; status is zero between calls."""

    operands: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor
    scores: torch.Tensor
    status: torch.Tensor
    scratch: torch.Tensor
    shares: torch.Tensor
    found: torch.Tensor
    ids: torch.Tensor
    counts: torch.Tensor
    demand: torch.Tensor

    def part(self, sequences: slice) -> "Buffers":
        """Those of some sequences: the memory itself."""
        return Buffers(**{field.name: getattr(self, field.name)[sequences] for field in fields(self)})


class TritonLevel1(Level1):
    """Scores fp8 pages with fp16 products on a GPU; fp8: rounds the queries to fp8 as well, for fp8 products.

    Every term and every join of a bundle is computed. Queries are packed from a bf16 copy of the weights, made here and
    kept on the GPU: two bytes a parameter beside the indexer's own. `resident` returns buffers that the next call
    overwrites. They are kept for each shape of the page table: give it the width of the longest context once. Key bytes
    are not checked; a sequence whose table is too short for its position gets the count -1.
    Raises InputError, by name, for what it lacks: a coverage, keys that are not fp8 pages, heads or widths not powers
    of two, a GPU that is older than fp8.
    """

    def __init__(
        self,
        indexer: Indexer,
        limits: Limits,
        selection: Selection | None = None,
        fp8: bool = False,
    ) -> None:
        super().__init__(indexer, limits, selection)
        check_terms(indexer.spec)
        if isinstance(self.selection, Coverage):
            raise InputError("selection: the Triton backend has no coverage, which needs a sort; use the torch backend")
        if indexer.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise InputError("backend: triton needs a CUDA device; use the torch backend")
        check_fp8(indexer.device)
        self.weights = QueryWeights(next(part for part in indexer.modules() if isinstance(part, Scorer)))
        self.fp8 = fp8
        budget = isinstance(self.selection, Budget)
        cuts = [] if budget else self.selection.cuts
        device = indexer.device
        ends = [cut.longest or FOREVER for cut in cuts] or [FOREVER]
        self.cut_ends = torch.tensor(ends, dtype=torch.int32, device=device)
        self.cut_scores = torch.tensor([cut.score for cut in cuts] or [torch.inf], device=device)
        share = self.selection.budget if budget else 0.0
        self.budget = torch.tensor([share], dtype=torch.float64, device=device)
        self._processors, self._programs = 12, 12 * PROGRAMS_AN_SM  # the interpreter's: a few runs, as a GPU has
        if device.type == "cuda":
            gpu = torch.cuda.get_device_properties(device)
            self._processors = gpu.multi_processor_count
            self._programs = self._processors * programs_an_sm(gpu.shared_memory_per_multiprocessor, indexer.spec)
        self._buffers: dict[tuple[int, int], Buffers] = {}

    @torch.no_grad()
    def pack(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `Level1.pack`, with products in bf16."""
        return self.weights.pack(hidden, positions)

    def joined_scores(self, queries: torch.Tensor, keys: PagedKeys | torch.Tensor) -> torch.Tensor:
        """As `Level1.joined_scores`."""
        scores = self._launch(queries, keys).scores
        seen = (queries[:, -1:].long() + 1) // self.indexer.spec.chunking.tokens
        return scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= seen, -torch.inf)

    def resident(self, queries: torch.Tensor, keys: PagedKeys | torch.Tensor) -> Resident:
        """As `Level1.resident`."""
        buffers = self._launch(queries, keys)
        return Resident(buffers.ids, buffers.counts, buffers.demand)

    def _launch(self, queries: torch.Tensor, keys: PagedKeys | torch.Tensor) -> Buffers:
        """Both launches for all sequences; what they leave in the buffers."""
        check_keys(self.indexer.spec, keys, len(queries))
        if not isinstance(keys, PagedKeys):
            raise InputError("keys: the Triton backend reads pages (PagedKeys) only; use the torch backend")
        pages, table = keys.pages, keys.table.contiguous()
        if pages.stride(2) != 1 or any(step % 16 for step in (pages.data_ptr(), *pages.stride()[:2])):
            raise InputError("key pages: each must be 16-byte aligned and without gaps; copy them into such a pool")
        buffers = self._allocated(*table.shape)
        most = sequences_at_once(self._processors, self._programs, len(self.indexer.spec.layers))
        for first in range(0, len(table), most):
            part = slice(first, first + most)
            self._launch_part(queries[part], pages, table[part], buffers.part(part))
        return buffers

    def _launch_part(self, queries: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, buffers: Buffers) -> None:
        spec = self.indexer.spec
        (sequences, width), layers = table.shape, len(spec.layers)
        runs = buffers.status.shape[1] // layers
        values, scales = pages.view(torch.float8_e4m3fn), pages.view(torch.float32)
        if self.fp8:
            shape = (spec.shape.heads, spec.key_width)
            round_kernel[(layers * shape[0] // ROUNDED, sequences)](
                queries, queries.stride(0), buffers.operands, buffers.weights,
                queries.shape[1] // layers, *shape, ROUNDED, num_warps=4,
            )  # fmt: skip
        score_kernel[(runs * layers, sequences)](
            queries, queries.stride(0), buffers.operands, buffers.weights,
            values, *values.stride()[:2], scales, *scales.stride()[:2], table, width,
            self.cut_ends, self.cut_scores, buffers.logits, buffers.scores, buffers.status, buffers.scratch,
            buffers.ids, buffers.found, self.limits.cap, **SCORE_OPTIONS,
            **score_constants(spec, len(self.cut_ends), runs, self.fp8),
        )  # fmt: skip
        parts = buffers.shares.shape[1]
        constants = limit_constants(spec, isinstance(self.selection, Budget), runs * layers, parts)
        # The interpreter runs a launch's programs one after the other: they cannot meet between two steps.
        steps = [(0, STEPS.value)] if pages.is_cuda else [(step, step + 1) for step in range(STEPS.value)]
        for first, last in steps:
            limit_kernel[(parts, sequences)](
                queries[:, -1], queries.stride(0), buffers.scores, width * PAGE, buffers.found, buffers.scratch,
                buffers.shares, buffers.status, buffers.ids, buffers.counts, buffers.demand, self.budget,
                self.limits.floor, self.limits.cap, FIRST=first, LAST=last, **LIMIT_OPTIONS, **constants,
            )  # fmt: skip

    def _allocated(self, sequences: int, width: int) -> Buffers:
        if (sequences, width) not in self._buffers:
            device, layers = self.indexer.device, len(self.indexer.spec.layers)
            at_once = min(sequences, sequences_at_once(self._processors, self._programs, layers))
            runs = max(1, min(width, self._programs // (layers * at_once)))
            parts = limit_programs(self._processors, at_once, width * PAGE)
            heads, key_width = self.indexer.spec.shape.heads, self.indexer.spec.key_width
            queries = torch.empty(sequences, layers, heads, key_width, dtype=torch.float8_e4m3fn, device=device)
            self._buffers[sequences, width] = Buffers(
                operands=queries,
                weights=torch.empty(sequences, layers, heads, device=device),
                logits=torch.empty(sequences, layers, width * PAGE, device=device),
                scores=torch.empty(sequences, width * PAGE, device=device),
                status=torch.zeros(sequences, runs * layers, dtype=torch.int32, device=device),
                scratch=torch.empty(sequences, SCRATCH.value, dtype=torch.int32, device=device),
                shares=torch.empty(sequences, parts, 2, dtype=torch.int32, device=device),
                found=torch.empty(sequences, dtype=torch.int32, device=device),
                ids=torch.empty(sequences, self.limits.cap, dtype=torch.int32, device=device),
                counts=torch.empty(sequences, dtype=torch.int32, device=device),
                demand=torch.empty(sequences, dtype=torch.int32, device=device),
            )
        return self._buffers[sequences, width]


def check_terms(spec: IndexerSpec) -> None:
    """Raise InputError for what of a bundle the kernels lack."""
    heads, width = spec.shape.heads, spec.key_width
    if spec.key != "fp8_rope_hadamard":
        raise InputError(f"key: the Triton backend reads fp8 pages, not {spec.key} keys; use the torch backend")
    if heads < 16 or heads & (heads - 1) or width < 32 or width & (width - 1) or heads * width > 1 << 15:
        raise InputError(
            f"heads, key_width: {heads} x {width}; the Triton backend takes powers of two from 16 heads and 32 values "
            f"up to {1 << 15} in all; use the torch backend"
        )


def score_constants(spec: IndexerSpec, cuts: int, runs: int, fp8: bool) -> dict[str, object]:
    """The compile-time arguments of `score_kernel`."""
    shape, chunking = spec.shape, spec.chunking
    return {
        "LAYERS": len(spec.layers),
        "HEADS": shape.heads,
        "WIDTH": spec.key_width,
        "BUMPS": shape.distance_bumps,
        "SCALE": shape.scale,
        "SLOT": shape.slot,
        "BIAS": shape.bias,
        "JOIN": shape.join,
        "CUTS": cuts,
        "TOKENS": chunking.tokens,
        "SINK": chunking.sink,
        "RECENT": chunking.recent,
        "RUNS": triton.next_power_of_2(runs),
        "BUMP_TILE": triton.next_power_of_2(max(1, shape.distance_bumps)),
        "TILE": 1024,
        "FP8": fp8,
        "STAGES": STAGES,
    }


def programs_an_sm(shared: int, spec: IndexerSpec) -> int:
    """Programs of the first launch that a multiprocessor with `shared` bytes of shared memory holds at once."""
    return max(1, min(PROGRAMS_AN_SM, shared // program_bytes(spec)))


def program_bytes(spec: IndexerSpec) -> int:
    """Shared memory of such a program, at most: a layer's queries in fp16, two pages of keys, sums, CUDA's own."""
    return 2 * spec.shape.heads * spec.key_width + 2 * PAGE * spec.key_width + 5 * 1024


def sequences_at_once(processors: int, programs: int, layers: int) -> int:
    """Sequences of one launch, at most: each takes a program a layer of the first one's, and one of the second's."""
    return max(1, min(processors, programs // layers))


def limit_programs(processors: int, sequences: int, chunks: int) -> int:
    """Programs of the second launch for each sequence.

    They wait for one another, so all must run at once: together at most one a multiprocessor (which a MIG slice has
    fewer of), or one a sequence, which waits for none.
    """
    return max(1, min(min(LIMIT_PROGRAMS, processors) // sequences, chunks // LIMIT_TILE))


def limit_constants(spec: IndexerSpec, budget: bool, status: int, parts: int) -> dict[str, object]:
    """The compile-time arguments of `limit_kernel`, but for the steps."""
    return {
        "BUDGET": budget,
        "TOKENS": spec.chunking.tokens,
        "SINK": spec.chunking.sink,
        "RECENT": spec.chunking.recent,
        "STATUS": status,
        "TILE": LIMIT_TILE,
        "PARTS": triton.next_power_of_2(parts),
    }
