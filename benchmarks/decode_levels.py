"""Benchmark rows of the two levels of selection, and of the attention after them."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.timing import Hardware, Row, microseconds, require
from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import encode_keys, rows_to_pages
from data_gen.core.rope import Rope
from eval.serving import level2
from eval.serving.entries import V4, encode_entries, entries_to_pages
from eval.serving.kernels.device import lacks
from eval.serving.level1 import Level1, PagedKeys
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Cut, Threshold

LAYERS, WIDTH, KEY = 3, 128, 132


def make_indexer(heads: int, hidden: int, rank: int, device: torch.device) -> MemoryIndexer:
    """The paper's shape of score, with random weights."""
    spec = IndexerSpec(
        shape=IndexerConfig(heads=heads, rank=rank, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=list(range(LAYERS)),
        hidden=hidden,
        key_width=WIDTH,
        chunking=Chunking(tokens=4, sink=1, recent=16),
        window=64,
        backbone="none: random weights",
        key="fp8_rope_hadamard",
        rope=Rope(dims=64, theta=160000.0, positions=1 << 20, factor=16.0),
    )
    return MemoryIndexer.from_spec(spec, device=str(device)).eval()


def projection_rows(indexer: MemoryIndexer, machine: Hardware) -> Iterator[Row]:
    """Hidden states of one token -> packed queries: torch from the weights as they are kept, Triton from bf16."""
    device = indexer.device
    hidden = torch.randn(1, LAYERS, indexer.spec.hidden, device=device)
    positions = torch.tensor([4095], device=device)
    packed = Level1(indexer, Limits(cap=64)).pack(hidden, positions)
    stage = f"Level-1 queries, {sum(weight.numel() for weight in indexer.parameters()) / 1e6:.1f} M parameters"
    for name, backend in _backends(indexer, Limits(cap=64), Threshold(cuts=[Cut(score=0.0)])).items():
        if name.endswith("fp8"):
            continue  # rounds what the other packs
        found = backend.pack(hidden, positions)
        error = float((found - packed)[:, :-1].norm() / packed[:, :-1].norm())
        require(error < 0.01, f"queries by {name}: relative error {error:.4f}")
        us = microseconds(partial(backend.pack, hidden, positions), device, graph=device.type == "cuda")
        kind = "fp32" if name == "torch" else "bf16"
        moved = sum(weight.nbytes for weight in indexer.parameters()) // (1 if kind == "fp32" else 2)
        yield Row(stage, f"{name.split()[0]} {kind} (error {error:.4f})", us, moved, moved / machine.memory)


def _backends(indexer: MemoryIndexer, limits: Limits, rule: Threshold) -> dict[str, Level1]:
    """Those that this device runs, by name; torch is the reference."""
    backends = {"torch": Level1(indexer, limits, rule)}
    if not lacks(indexer.device):
        from eval.serving.level1_triton import TritonLevel1

        backends["triton fp16"] = TritonLevel1(indexer, limits, rule)
        backends["triton fp8"] = TritonLevel1(indexer, limits, rule, fp8=True)
    return backends


def level1_rows(
    indexer: MemoryIndexer, machine: Hardware, histories: tuple[int, ...], batches: tuple[int, ...], cap: int
) -> Iterator[Row]:
    """Score all chunks of all layers, join, select: a threshold that keeps 9 % of the chunks."""
    device, spec = indexer.device, indexer.spec
    for chunks in histories:
        for batch in batches:
            pages = torch.cat(
                [PagedKeys.from_rows(encode_keys(_random(device, chunks, LAYERS, WIDTH))).pages for _ in range(batch)]
            )
            table = torch.randperm(len(pages), dtype=torch.int32, device=device).view(batch, -1)
            keys = PagedKeys(pages, table)
            positions = torch.full((batch,), 4 * chunks - 1, device=device)
            reference = Level1(indexer, Limits(cap=cap), Threshold(cuts=[Cut(score=0.0)]))
            hidden = _random(device, batch, LAYERS, spec.hidden)
            scores = reference.joined_scores(reference.pack(hidden, positions), keys)
            cut = scores.flatten().kthvalue(int(scores.numel() * 0.91)).values
            backends = _backends(indexer, Limits(cap=cap), Threshold(cuts=[Cut(score=float(cut))]))
            expected = backends["torch"].resident(backends["torch"].pack(hidden, positions), keys)
            moved = batch * chunks * LAYERS * KEY
            for name, backend in backends.items():
                if name == "torch" and len(backends) > 1:
                    continue  # too slow to be worth its time
                queries = backend.pack(hidden, positions)
                alike = _alike(backend.resident(queries, keys).ids, expected.ids)
                require(alike > (0.7 if name.endswith("fp8") else 0.98), f"Level 1 by {name}: Jaccard {alike:.3f}")
                us = microseconds(partial(backend.resident, queries, keys), device, graph=name != "torch")
                stage = f"Level-1 score + select, N {chunks}, H {spec.shape.heads}, {LAYERS} layers, B {batch}"
                yield Row(stage, f"{name} (Jaccard {alike:.3f})", us, moved, moved / machine.memory)


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device)


def _alike(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Jaccard of the ids, all sequences together; -1 is no id."""
    left, right = (
        {(row, id) for row, ids in enumerate(t.tolist()) for id in ids if id >= 0} for t in (found, expected)
    )
    return len(left & right) / len(left | right)


def level2_rows(device: torch.device, machine: Hardware, resident: int, heads: int, k: int) -> Iterator[Row]:
    """Native selection of one layer over the resident chunks."""
    rows = encode_keys(torch.randn(resident, WIDTH, device=device))
    pages = rows_to_pages(rows)
    query = torch.randn(1, heads, WIDTH, device=device)
    weights = torch.randn(1, heads, device=device) * (heads * query.shape[-1]) ** -0.5
    slots = torch.randperm(resident, dtype=torch.int32, device=device)[None]
    scores = level2.score_resident(query, weights, pages, slots)
    chosen = level2.select_resident(scores, slots, k)
    in_triton = not lacks(device)
    name, score, select = "torch", level2.score_resident, level2.select_resident
    if in_triton:
        from eval.serving.kernels.score import score_resident
        from eval.serving.kernels.topk import select_resident

        name, score, select = "triton", score_resident, select_resident
        found = score(query, weights, pages, slots)
        require(torch.allclose(found, scores, atol=2e-3 * float(scores.abs().max()), rtol=0), "Level-2 score")
        found = select(scores, slots, k)
        require(set(found[0].tolist()) == set(chosen[0].tolist()), "Level-2 selection")
    us = microseconds(partial(score, query, weights, pages, slots), device, graph=in_triton)
    moved = resident * (KEY + 8)
    yield Row(f"Level-2 score, {resident} resident, H {heads}", name, us, moved, moved / machine.memory)
    stage, moved = f"Level-2 top {k} of {resident}", resident * 4
    us = microseconds(partial(select, scores, slots, k), device, graph=in_triton)
    yield Row(stage, name, us, moved, moved / machine.memory)
    us = microseconds(partial(torch.topk, scores, k), device, graph=device.type == "cuda")
    yield Row(stage, "torch.topk", us, moved, moved / machine.memory)


def attention_rows(
    device: torch.device, machine: Hardware, batches: tuple[int, ...], heads: int, k: int, window: int
) -> Iterator[Row]:
    """One layer's attention of one token over the chosen entries and the sliding window."""
    for batch in batches:
        pages = entries_to_pages(encode_entries(_random(device, batch * k, V4.width)))
        near = entries_to_pages(encode_entries(_random(device, batch * window, V4.width)))
        chosen, recent = (
            torch.randperm(batch * count, device=device).int().view(batch, count) for count in (k, window)
        )
        query = _random(device, batch, heads, V4.width).bfloat16()
        arguments = (query, pages, chosen, near, recent, _random(device, heads), V4.width**-0.5)
        name, attend = "torch", level2.attend
        if not lacks(device):
            from eval.serving.kernels.sparse_attention import attend

            name, expected = "triton", level2.attend(*arguments)
            error = float((attend(*arguments) - expected).abs().max() / expected.abs().max())
            require(error < 0.02, f"sparse attention: relative error {error:.3f}")
        us = microseconds(partial(attend, *arguments), device, graph=name == "triton")
        moved = batch * (k + window) * V4.bytes
        stage = f"sparse MQA, {k + window} entries, H {heads}, B {batch}"
        yield Row(stage, name, us, moved, moved / machine.memory)
