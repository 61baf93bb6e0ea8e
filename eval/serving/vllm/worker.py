"""One engine process: what the indexer reads is caught on the way, and every step gets its visible chunks."""

import json
import logging
import re
from typing import Any

import torch
from torch import nn

from data_gen.core.errors import InputError
from data_gen.core.tensors import send
from eval.serving.level1 import open_level1
from eval.serving.select import Limits, Resident, serve, unchecked_chunks
from eval.serving.vllm.keys import BlockKeys
from eval.serving.vllm.memory import Memory, Moves
from eval.serving.vllm.sequences import NOTHING, Chosen, Counters, Sequence, Sequences
from eval.serving.vllm.settings import Settings, load_settings
from indexer_train.formats.bundle import load_scorer

LOGGER = logging.getLogger("vllm.lookahead")
ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn$")


def capture(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """buffer[:T] = rows [T, ...], flattened after the first axis."""
    if torch.compiler.is_compiling():
        capture_opaque(buffer, rows)
    else:  # an operator of one's own costs more than the copy, several times a step
        buffer[: rows.shape[0]].copy_(rows.flatten(1))


# So that a compiled model sees one write in place and nothing of the bookkeeping.
@torch.library.custom_op("lookahead::capture", mutates_args=("buffer",))
def capture_opaque(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """`capture` of rows [T, ...] in a compiled model."""
    buffer[: rows.shape[0]].copy_(rows.flatten(1))


@capture_opaque.register_fake
def _(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    return None


class Captured:
    """What the indexer's layers were given in the newest step: [most tokens of a step, width] a layer, never moved.

    Raises InputError for a layer that is built otherwise than those that it knows.
    """

    def __init__(self, model: nn.Module, layers: list[int], hidden: int, width: int, rows: int) -> None:
        like = next(model.parameters())
        self.hidden = [like.new_zeros(rows, hidden) for _ in layers]
        self.keys = [like.new_zeros(rows, width) for _ in layers]
        modules = {int(found[1]): module for name, module in model.named_modules() if (found := ATTENTION.search(name))}
        for slot, layer in enumerate(layers):
            attention = modules.get(layer)
            if attention is None or not hasattr(attention, "qkv_proj") or not hasattr(attention, "rotary_emb"):
                raise InputError(
                    f"layer {layer} of {type(model).__name__} has no self_attn with qkv_proj and rotary_emb"
                )
            self._watch(attention, slot)

    def _watch(self, attention: Any, slot: int) -> None:
        first, last = attention.q_size, attention.q_size + attention.kv_size

        def projected(module: nn.Module, args: tuple, output: Any) -> None:
            capture(self.hidden[slot], args[0])
            if not normed:
                capture(self.keys[slot], (output[0] if isinstance(output, tuple) else output)[:, first:last])

        def normalised(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            capture(self.keys[slot], output.view(-1, last - first))

        normed = hasattr(attention, "k_norm")
        attention.qkv_proj.register_forward_hook(projected)
        if normed:  # the key before RoPE is what comes out of it
            attention.k_norm.register_forward_hook(normalised)


class Worker:
    """Sequences, keys and Level 1 of one model runner (`gpu_model_runner`'s, which the CPU's inherits)."""

    def __init__(self, runner: Any, settings: Settings) -> None:
        scorer = load_scorer(settings.bundle)
        self.runner, self.settings, self.spec = runner, settings, scorer.spec
        device = next(runner.get_model().parameters()).device
        self.cap = settings.cap or -(-runner.model_config.max_model_len // self.spec.chunking.tokens)
        self.level1 = open_level1(scorer.to(device), Limits(cap=self.cap), settings.selection, "torch")
        rows = runner.scheduler_config.max_num_batched_tokens
        spec = self.spec
        self.captured = Captured(runner.get_model(), spec.layers, spec.hidden, spec.key_width, rows)
        self.sequences = Sequences()
        self.counters = Counters()
        self.keys: BlockKeys | None = None
        self.memory: Memory | None = None
        self._leader: object = None
        self._plan: list[Chosen | None] = []
        self._said = False
        self._last: list[tuple[str, int]] = []  # of the step before, where a set is due: request and its last row
        self._slots: torch.Tensor | None = None
        self._left = False

    def sets(self, builder: object, meta: Any) -> list[Chosen | None]:
        """Before a step: the set that each row reads, None for everything. meta: vLLM's CommonAttentionMetadata.

        Of several groups of full layers, the builder that is asked first leads; the others, with tables of their own,
        read the same chunks.
        """
        self._leader = self._leader or builder
        if builder is self._leader:
            self._plan = self._step(meta)
        return self._plan

    def _step(self, meta: Any) -> list[Chosen | None]:
        """Of each row the set to read, None for everything, NOTHING where it is no request's."""
        self._take()
        self._forget()
        lengths = meta.seq_lens_cpu_upper_bound.tolist()  # exact without speculative decoding
        starts = meta.query_start_loc_cpu.tolist()
        prompt = meta.is_prefilling.tolist()
        names = self.runner.input_batch.req_ids
        decoding: list[tuple[int, Sequence, int]] = []
        due: list[tuple[str, Sequence, torch.Tensor]] = []
        plan: list[Chosen | None] = [NOTHING] * meta.num_reqs
        for row, name in enumerate(names[: meta.num_reqs]):
            new, position = starts[row + 1] - starts[row], lengths[row] - 1
            if new <= 0:
                continue
            alone, known = new == 1 and not prompt[row], self.sequences.held.get(name)
            self._left |= known is not None and known.position != position - new  # read again, or another's name by now
            sequence = self.sequences.enter(name, position, alone)
            if self.memory is not None and sequence.force is None:
                self.memory.forget(name)  # it is read again, into blocks of the engine's choice
            if not alone:
                sequence.position, plan[row] = position, None
                self._last.append((name, starts[row + 1] - 1))
                continue
            decoding.append((row, sequence, position))
            if sequence.due(self.spec.window) and sequence.newest is not None:
                due.append((name, sequence, meta.block_table_tensor[row]))
        if self._left and self.keys is not None:
            self.keys.settle()  # from this step on the blocks of who left can be others'
            self._left = False
        if due:
            self._choose(due)
        for row, sequence, position in decoding:
            plan[row] = self._count(sequence, position)
            sequence.position = position
            if sequence.due(self.spec.window):
                self._last.append((names[row], starts[row + 1] - 1))
        self._slots = meta.slot_mapping[: starts[meta.num_reqs]].clone()
        return plan

    def _take(self) -> None:
        """What the step before left behind: its keys, and the newest states where a set is due after them."""
        if self._slots is None or self.keys is None:
            return
        rows = len(self._slots)
        self.keys.add(self._slots, [keys[:rows] for keys in self.captured.keys])
        for name, row in self._last:
            if sequence := self.sequences.held.get(name):  # else it is finished meanwhile
                sequence.newest = torch.stack([hidden[row] for hidden in self.captured.hidden]).to(torch.bfloat16)
        self._last, self._slots = [], None

    def _choose(self, due: list[tuple[str, Sequence, torch.Tensor]]) -> None:
        """The sets after the newest tokens of these sequences: name, state, blocks [width]. All at once, because a GPU
        is waited for: once, for the sets."""
        assert self.keys is not None  # sets are chosen once there are caches
        self.keys.settle()
        chunking = self.spec.chunking
        positions = torch.tensor([sequence.position for _, sequence, _ in due])
        totals = [chunking.visible(place) for place in positions.tolist()]
        newest = torch.stack([sequence.newest for _, sequence, _ in due if sequence.newest is not None])
        found = self._level1(newest, positions, due, totals)
        for row, ((name, sequence, table), total) in enumerate(zip(due, totals, strict=True)):
            first, last = chunking.candidates(sequence.position)
            chunks, how = serve(found, row, total, self.cap, total - (last - first), self.settings.fallback)
            self.counters.refreshes += 1
            self.counters.capped += how == "cap"
            self.counters.full += how == "full"
            begun, blocks = sequence.force is None, None
            if self.memory is not None:
                chunks, blocks = self._settle(self.memory, name, set(chunks.tolist()), total, table)
            sequence.choose(Chosen(sequence.position, total, chunks, blocks), self.settings.lag)
            self._write(name, sequence.position, total, how, chunks, begun)

    def _level1(
        self,
        newest: torch.Tensor,
        positions: torch.Tensor,
        due: list[tuple[str, Sequence, torch.Tensor]],
        totals: list[int],
    ) -> Resident:
        """The chunks that they should read, on the CPU. newest: [B, L, hidden]; positions: [B], on the CPU."""
        scores = self._scores(self.level1.pack(newest, send(positions, newest.device)), due, totals)
        selection, limits = self.level1.selection, self.level1.limits
        return unchecked_chunks(scores, positions, self.spec.chunking, selection, limits).cpu().checked()

    def _fused(self) -> bool:
        """Are scores one Triton launch? Not where keys of freed blocks are kept aside."""
        return self.level1.indexer.device.type == "cuda" and self.memory is None

    def _scores(
        self, queries: torch.Tensor, due: list[tuple[str, Sequence, torch.Tensor]], totals: list[int]
    ) -> torch.Tensor:
        """Joined scores of their complete chunks, -inf after them, [B, most chunks]."""
        assert self.keys is not None  # sets are chosen once there are caches
        if self._fused():
            from eval.serving.kernels.block_scores import block_scores

            tables = torch.stack([table[: max(totals)] for _, _, table in due])
            return block_scores(self.spec, queries, self.keys.sums, tables)
        scores = torch.full((len(due), max(totals)), -torch.inf, device=queries.device)
        for row, ((name, _, table), total) in enumerate(zip(due, totals, strict=True)):
            keys = self._keys(name, table[:total])
            scores[row, :total] = self.level1.joined_scores(queries[row : row + 1], keys)[0]
        return scores

    def _keys(self, name: str, table: torch.Tensor) -> torch.Tensor:
        """A sequence's chunk keys, [N, L, width]. table: [N], the blocks."""
        assert self.keys is not None  # sets are chosen once there are caches
        keys = self.keys.means(table)
        if self.memory is None:
            return keys
        residence = self.memory.of(name)  # blocks that were freed hold other keys by now
        return residence.add_keys(keys[0 if residence.keys is None else len(residence.keys) :])

    def _settle(
        self, memory: Memory, name: str, wanted: set[int], total: int, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move blocks towards a new set of `total` chunks; returns what is in the pool, and where it has moved."""
        memory.settle(name, wanted, total, table)
        if memory.full and not self._said:
            self._said = True
            LOGGER.warning(
                "lookahead: host memory of %.3f GiB is full; more cold blocks stay in the pool", self.settings.host_gib
            )
        return memory.of(name).visible(total)

    def _count(self, sequence: Sequence, position: int) -> Chosen | None:
        """What token `position` reads, the unfinished chunk too; None: everything."""
        if sequence.force is None:
            return None
        made = position // self.spec.chunking.tokens + 1
        sequence.reads = made - sequence.force.left_out
        self.counters.rows += 1
        self.counters.read += sequence.reads
        self.counters.made += made
        return sequence.force

    def _write(self, name: str, position: int, total: int, how: str, chunks: torch.Tensor, first: bool = False) -> None:
        """A line of the trace. how: as `serve` says, or "arrived" where fetched chunks join the set in force; first:
        the first set of a request, or of one that was read again after a preemption."""
        if self.settings.trace is not None:
            line = {"request": name, "position": position, "chunks": total, "how": how, "first": first}
            line["resident"] = chunks.tolist()
            with open(self.settings.trace, "a") as file:
                file.write(json.dumps(line) + "\n")

    # --- called by the connector ---

    def register_caches(self, caches: list[torch.Tensor]) -> None:
        """The engine's keys and values, one tensor [blocks, ...] per layer: those that stay, not a measurement's."""
        self.keys = BlockKeys(
            self.runner.kv_cache_config.num_blocks, len(self.spec.layers), self.spec.key_width,
            self.spec.chunking.tokens, self.level1.indexer.device, self.captured.keys[0].dtype,
        )  # fmt: skip
        if self.settings.host_gib is not None:
            self.memory = Memory(caches, int(self.settings.host_gib * 2**30))
        if self._fused():
            self._warm_up()

    def _warm_up(self) -> None:
        """Level 1 once, for one chunk: its kernel is compiled now, not in the first request. It is compiled for any
        number of sequences and chunks."""
        spec = self.spec
        newest = torch.zeros(1, len(spec.layers), spec.hidden, dtype=torch.bfloat16, device=self.level1.indexer.device)
        table = torch.zeros(1, dtype=torch.int32, device=newest.device)
        self._level1(newest, torch.tensor([spec.chunking.tokens - 1]), [("", Sequence(), table)], [1])

    def load(self, places: dict[str, dict[int, int]]) -> None:
        """Bring chunks back into the blocks that the scheduler gave them."""
        if self.memory is None:
            return
        for name, chunks in places.items():
            if self.memory.load(name, chunks):
                sequence = self.sequences.held[name]
                total = self.spec.chunking.visible(sequence.position)
                visible, blocks = self.memory.of(name).visible(total)
                if sequence.force is not None:
                    sequence.force = Chosen(sequence.force.position, total, visible, blocks)
                self._write(name, sequence.position, total, "arrived", visible)

    def take_moves(self) -> dict[str, Moves]:
        """What the scheduler is to be told, by request; nothing without host memory."""
        return self.memory.take_moves() if self.memory is not None else {}

    def leave(self, names: set[str]) -> None:
        """These requests are finished, aborted or preempted: their blocks will be others'."""
        for name in names:
            self._drop(name)

    def report(self) -> dict[str, int]:
        """Counters since the start and gauges."""
        counted, memory = dict(vars(self.counters)), self.memory
        if memory is not None:
            counted |= {"evicted": memory.evicted, "fetched": memory.fetched}
        return counted | {
            "sequences": len(self.sequences.held),
            "resident_blocks": sum(sequence.reads for sequence in self.sequences.held.values()),
            "host_bytes": memory.used if memory is not None else 0,
        }

    def _forget(self) -> None:
        """The engine's own list of requests is the truth."""
        for name in self.sequences.held.keys() - self.runner.requests.keys():
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._left |= self.sequences.held.pop(name, None) is not None
        if self.memory is not None:
            self.memory.forget(name)


_workers: dict[int, Worker] = {}


def attach(runner: Any) -> None:
    """Give a runner whose model was just loaded its worker."""
    _workers[0] = Worker(runner, load_settings(runner.vllm_config.additional_config))


def current() -> Worker | None:
    """The worker of this process, once its model is loaded: backends and connectors are not told their runner."""
    return _workers.get(0)
