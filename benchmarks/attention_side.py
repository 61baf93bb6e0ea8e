"""The attention side of a decode step at a model's own widths, on random caches: with full attention, and under LSA.

Every layer has caches of its own, so that no layer finds the one before in the GPU's cache. Kernels are those of
eval/serving where the device runs them, else their torch references; decode.py compares the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.decode_levels import make_indexer
from benchmarks.timing import captured, microseconds
from data_gen.core.key_bytes import PAGE, SCALE_BYTES
from eval.plan.deepseek_v4 import CSA, HCA
from eval.serving import level2
from eval.serving.entries import EntryShape
from eval.serving.kernels.device import lacks
from eval.serving.level1 import Level1, PagedKeys, open_level1
from eval.serving.pools import ColdPool, HotPool, index_copy
from eval.serving.select import Limits
from indexer_train.selection import Cut, Threshold

COLD_BYTES = 1 << 30
"""Host memory that fetches read from, at most: where more would lie there, its units are read several times."""
SMALL_BITS = -0x4040404040404041
"""In each byte of a word all bits but the exponent's highest: values below 2 in fp8 and bf16, and none that is NaN."""

Work = Callable[[], Any]
Way = TypeVar("Way", bound=Callable[..., torch.Tensor])


@dataclass(frozen=True)
class Side:
    """The work of one decode step of one batch. step: all of it; stages: its parts, by name; refresh: what chooses the
    resident sets again, fetch: what brings the new chunks, each once a lookahead window (None under full attention);
    resident, fetched: bytes of the caches on the device, and of one fetch."""

    step: Work
    stages: dict[str, Work]
    refresh: Work | None
    fetch: Work | None
    resident: int
    fetched: int


@dataclass(frozen=True)
class Shape:
    """Sizes of DeepSeek-V4. heads, entry: of attention; index_heads, index_width, top: of the native indexer; window:
    tokens of the sliding window; csa, hca, layers: how many there are, the last of all kinds; csa_tokens, hca_tokens:
    after one entry; indexer: heads, hidden and rank of the memory indexer."""

    heads: int
    entry: EntryShape
    index_heads: int
    index_width: int
    top: int
    window: int
    csa: int
    hca: int
    layers: int
    csa_tokens: int
    hca_tokens: int
    indexer: tuple[int, int, int]

    @classmethod
    def of(cls, config: Any, heads: int, rank: int) -> "Shape":
        """Of a `DeepseekV4Config`, and a memory indexer of so many heads and such a rank."""
        return cls(
            heads=config.num_attention_heads,
            entry=EntryShape(config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim),
            index_heads=config.index_n_heads,
            index_width=config.index_head_dim,
            top=config.index_topk,
            window=config.sliding_window,
            csa=config.layer_types.count(CSA),
            hca=config.layer_types.count(HCA),
            layers=len(config.layer_types),
            csa_tokens=config.compress_rates[CSA],
            hca_tokens=config.compress_rates[HCA],
            indexer=(heads, config.hidden_size, rank),
        )


class Caches:
    """DeepSeek-V4's caches of `batch` sequences after `context` tokens, `resident` chunks of each on the device.

    With full attention all chunks lie in pages of 64, as serving engines keep them. Under LSA the resident ones are
    units of all layers, so that one copy fetches a chunk; a unit's parts start at multiples of 16 bytes.
    """

    def __init__(self, shape: Shape, context: int, batch: int, resident: int | None, device: torch.device) -> None:
        self.shape, self.device, self.batch = shape, device, batch
        self.chunks = context // shape.csa_tokens
        entry, key = shape.entry.bytes, shape.index_width + SCALE_BYTES
        self.page = PAGE if resident is None else 1
        if resident is None:
            pages = batch * -(-self.chunks // PAGE)
            self.keys = [key_pages(pages, shape.index_width, device) for _ in range(shape.csa)]
            self.entries = [entry_pages(pages, shape.entry, device) for _ in range(shape.csa)]
            self.hot = None
        else:
            entry, key = _aligned(entry), _aligned(key)
            self.hot = HotPool(batch * resident, (shape.csa * (entry + key),), torch.uint8, device)
            small_bytes(self.hot.storage)
            self.entries = [self.hot.storage[:, layer * entry :] for layer in range(shape.csa)]
            self.keys = [self.hot.storage[:, shape.csa * entry + layer * key :] for layer in range(shape.csa)]
            for entries, keys in zip(self.entries, self.keys, strict=True):
                entries[:, shape.entry.value_bytes : shape.entry.bytes] = 127
                keys[:, shape.index_width : key][:, :SCALE_BYTES].view(torch.float32).fill_(1 / 16)
        self.listed = self._slots(self.chunks if resident is None else resident)
        far = context // shape.hca_tokens
        self.far = [entry_pages(batch * -(-far // PAGE), shape.entry, device) for _ in range(shape.hca)]
        self.far_listed = self._slots(far, PAGE)
        near = min(shape.window, context)
        self.near = [entry_pages(batch * -(-near // PAGE), shape.entry, device) for _ in range(shape.layers)]
        self.near_listed = self._slots(near, PAGE)

    def _slots(self, count: int, page: int | None = None) -> torch.Tensor:
        """Slots of each sequence's `count` entries: [B, count] int32, each sequence in pages of its own."""
        page = page or self.page
        first = torch.arange(self.batch, device=self.device)[:, None] * (-(-count // page) * page)
        return (first + torch.arange(count, device=self.device)).int()

    @property
    def bytes(self) -> int:
        """On the device."""
        paged = [self.hot.storage] if self.hot else [*self.keys, *self.entries]
        return sum(tensor.nbytes for tensor in [*paged, *self.far, *self.near])


class V4Step:
    """One token of each sequence through the attention of all layers."""

    def __init__(self, caches: Caches) -> None:
        shape, device, batch = caches.shape, caches.device, caches.batch
        self.caches, self.shape = caches, shape
        self.query = torch.randn(batch, shape.heads, shape.entry.width, device=device).bfloat16()
        self.index_query = torch.randn(batch, shape.index_heads, shape.index_width, device=device).bfloat16()
        scale = (shape.index_heads * shape.index_width) ** -0.5
        self.index_weights = torch.randn(batch, shape.index_heads, device=device) * scale
        self.sinks = torch.zeros(shape.heads, device=device)
        self.nothing = torch.empty(batch, 0, dtype=torch.int32, device=device)
        self._score, self._attend, selections = level2.score_resident, level2.attend, [level2.select_resident]
        if not lacks(device):
            from eval.serving.kernels import score, sparse_attention, topk

            self._score, self._attend = score.score_resident, sparse_attention.attend
            selections = [topk.select_resident, torch_topk]
        self._select = fastest(selections, device, self.score(0), caches.listed, shape.top)

    def score(self, layer: int) -> torch.Tensor:
        """Native logits of every chunk on the device."""
        caches = self.caches
        return self._score(self.index_query, self.index_weights, caches.keys[layer], caches.listed, caches.page)

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """Slots of the best chunks, by whichever way is the fastest at this size."""
        return self._select(scores, self.caches.listed, self.shape.top)

    def attend(self, layer: int, pages: torch.Tensor, chosen: torch.Tensor, page: int) -> torch.Tensor:
        """Sparse attention over the chosen entries and the layer's window."""
        near, scale = self.caches.near[layer], self.shape.entry.width**-0.5
        listed = self.caches.near_listed
        return self._attend(self.query, pages, chosen, near, listed, self.sinks, scale, self.shape.entry, page)

    def csa(self, layer: int, chosen: torch.Tensor) -> torch.Tensor:
        return self.attend(layer, self.caches.entries[layer], chosen, self.caches.page)

    def hca(self) -> list[torch.Tensor]:
        """All layers that read every heavily compressed entry."""
        first = self.shape.csa
        return [self.attend(first + at, far, self.caches.far_listed, PAGE) for at, far in enumerate(self.caches.far)]

    def window(self) -> list[torch.Tensor]:
        """The layers that see the sliding window alone."""
        layers = range(self.shape.csa + self.shape.hca, self.shape.layers)
        return [self.attend(layer, self.caches.near[layer], self.nothing, PAGE) for layer in layers]

    def step(self) -> list[torch.Tensor]:
        """Everything, layer after layer."""
        layers = range(self.shape.csa)
        return [*(self.csa(layer, self.select(self.score(layer))) for layer in layers), *self.hca(), *self.window()]

    def stages(self) -> dict[str, Work]:
        """The parts of `step`, all layers of one kind together."""
        layers = range(self.shape.csa)
        scores = self.score(0)
        chosen = self.select(scores)
        return {
            "CSA scoring": lambda: [self.score(layer) for layer in layers],
            "CSA selection": lambda: [self.select(scores) for _ in layers],
            "CSA attention": lambda: [self.csa(layer, chosen) for layer in layers],
            "HCA attention": self.hca,
            "window attention": self.window,
        }


def v4_full(shape: Shape, context: int, batch: int, device: torch.device) -> Side:
    """Full attention: native indexers over all chunks."""
    caches = Caches(shape, context, batch, None, device)
    step = V4Step(caches)
    return Side(step.step, step.stages(), None, None, caches.bytes, 0)


def v4_lsa(shape: Shape, context: int, batch: int, resident: int, churn: float, device: torch.device) -> Side:
    """LSA: native indexers over the resident chunks, Level 1 over the keys of its three layers of all chunks, and
    `churn` of the resident chunks fetched from pinned memory. Fetched bytes land in slots that steps read."""
    caches = Caches(shape, context, batch, resident, device)
    step, hot = V4Step(caches), caches.hot
    assert hot is not None
    indexer = make_indexer(*shape.indexer, device)
    layers = len(indexer.spec.layers)
    pages = batch * -(-caches.chunks // PAGE)
    keys = key_pages(pages * layers, shape.index_width, device).view(pages, layers, -1)
    paged = PagedKeys(keys, torch.arange(pages, dtype=torch.int32, device=device).view(batch, -1))
    hidden = torch.randn(batch, layers, shape.indexer[1], device=device)
    positions = torch.full((batch,), context - 1, device=device)
    limits = Limits(cap=resident)
    reference = open_level1(indexer, limits, Threshold(cuts=[Cut(score=0.0)]))
    scores = reference.joined_scores(reference.pack(hidden, positions), paged)[0]
    cut = float(scores.sort(descending=True).values[resident - 1])
    level1 = open_level1(indexer, limits, Threshold(cuts=[Cut(score=cut)]))
    fetch, fetched = fetching(hot, batch * int(churn * resident))
    refresh = captured(partial(refreshed, level1, hidden, positions, paged), device)
    return Side(step.step, step.stages(), refresh, fetch, caches.bytes + keys.nbytes, fetched)


def refreshed(
    level1: Level1, hidden: torch.Tensor, positions: torch.Tensor, keys: PagedKeys | torch.Tensor
) -> torch.Tensor:
    """Queries, then the ids of the chunks that must be resident."""
    return level1.resident(level1.pack(hidden, positions), keys).ids


def fetching(hot: HotPool, count: int) -> tuple[Work, int]:
    """What brings `count` random units into random slots, and their bytes."""
    stride = hot.layout.stride
    cold = ColdPool(hot.layout.shape, torch.uint8)
    most = max(1, min(count, COLD_BYTES // stride))
    for units in hot.slots[:most].split(1 << 14):
        cold.append(units.cpu())
    random = np.random.default_rng(0)
    wanted = np.resize(random.permutation(most), count)
    slots = random.permutation(hot.capacity)[:count].astype(np.int32)
    if hot.device.type != "cuda":
        return partial(index_copy, cold, wanted, hot, slots), count * stride
    from eval.serving.kernels.gather import gather

    addresses, places = cold.addresses(wanted).to(hot.device), torch.from_numpy(slots).to(hot.device)

    def fetch() -> ColdPool:
        gather(addresses, places, hot.storage)
        return cold  # addresses alone would not keep it

    return fetch, count * stride


def fastest(ways: Sequence[Way], device: torch.device, *arguments: Any) -> Way:
    """Whichever of several ways to one result takes the least time here; PyTorch may lack one on this device."""
    times: dict[float, Way] = {}
    refused = []
    for way in ways:
        try:
            times[microseconds(partial(way, *arguments), device, graph=device.type == "cuda")] = way
        except RuntimeError as error:
            refused.append(error)
    if not times:
        raise refused[0]
    return times[min(times)]


def torch_topk(scores: torch.Tensor, slots: torch.Tensor, k: int) -> torch.Tensor:
    """The slots of the k best scores, by PyTorch; arguments as `level2.select_resident`, there are k or more."""
    return slots.gather(1, scores.topk(k, dim=1, sorted=False).indices)


def small_bytes(storage: torch.Tensor) -> None:
    """Fill bytes with random values that are small as fp8 and as bf16."""
    words = storage.view(-1).view(torch.int64)
    for part in words.split(1 << 28):
        part.random_(-(1 << 63), None).bitwise_and_(SMALL_BITS)


def key_pages(pages: int, width: int, device: torch.device) -> torch.Tensor:
    """Pages of 64 random keys: [pages, 64 (width + 4)] uint8."""
    storage = torch.empty(pages, PAGE * (width + SCALE_BYTES), dtype=torch.uint8, device=device)
    small_bytes(storage)
    storage.view(torch.float32)[:, PAGE * width // SCALE_BYTES :].uniform_(0.03, 0.1)
    return storage


def entry_pages(pages: int, shape: EntryShape, device: torch.device) -> torch.Tensor:
    """Pages of 64 random attention entries: [pages, 64 * bytes] uint8."""
    storage = torch.empty(pages, shape.page_bytes, dtype=torch.uint8, device=device)
    small_bytes(storage)
    storage[:, PAGE * shape.value_bytes :] = 127
    return storage


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
