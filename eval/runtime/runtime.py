"""Lookahead sparse attention around a Hugging Face model: generate as usual, a resident set every tau tokens.

runtime = LSARuntime.from_bundle("runs/quickstart/bundle", model)
ids = runtime.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=200)
runtime.save_trace("trace.json")
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from eval.runtime.fallback import Fallback, Served, serve
from eval.runtime.hosts.moving import Prepared
from eval.runtime.hosts.resident import Move
from eval.runtime.open import open_host
from eval.runtime.options import check_call
from eval.serving.level1 import Backend, PagedKeys, open_level1
from eval.serving.select import Limits
from indexer_train.formats.bundle import load_bundle
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Threshold

NOTHING = torch.empty(0, 0, dtype=torch.int64)
"""No sequence, no token."""


@dataclass(frozen=True)
class Window:
    """One refresh. position: the newest token read when the set was chosen; chunks: made by then; resident, fetched,
    evicted: chunks, summed over sequences, since the window before: what a new turn brought back is counted with its
    first window; bytes: of the resident chunks beside the model when the set came into force; fetched_bytes: brought
    from the cold side; demand: what the rule asked for beside the protected chunks; served: how, one word a
    sequence."""

    position: int
    chunks: int
    resident: int
    fetched: int
    evicted: int
    bytes: int
    fetched_bytes: int
    demand: list[int]
    served: list[Served]


@dataclass(frozen=True)
class _Choice:
    """A resident set [R] a sequence that is not in force yet; the rest as `Window` says."""

    position: int
    chunks: int
    resident: list[torch.Tensor]
    demand: list[int]
    served: list[Served]


class LSARuntime:
    """A model, its memory indexer, and the batch of sequences in their cache.

    limits: floor and cap of the resident set, by default no cap; selection: instead of the bundle's; fallback: what to
    do with windows that ask for more than the cap; backend: of Level 1 (open_level1); pageable: True keeps the cold
    side in pageable memory, for machines that cannot pin as much, and fetches get slower; lag: tokens that are read
    with the old set after a new one was chosen. With 1 the fetch runs beside that token and needs memory of its own;
    with 0 it is waited for. The set chosen at the end of a prompt has no lag, for nothing is missing there. Raises
    InputError for a bundle of another model, a cap below the protected chunks, a fallback without a threshold.
    """

    def __init__(
        self,
        indexer: MemoryIndexer,
        model: PreTrainedModel,
        limits: Limits | None = None,
        selection: Budget | Threshold | None = None,
        fallback: Fallback | None = None,
        backend: Backend = "auto",
        pageable: bool | None = None,
        lag: Literal[0, 1] = 0,
    ) -> None:
        if lag not in (0, 1):
            raise InputError(f"lag: {lag}, but a fetch is waited for (0) or runs beside one token (1)")
        self.indexer, self.model, self.spec = indexer.to(model.device), model, indexer.spec
        self.host = open_host(model, self.spec, pageable)
        if self.spec.backbone != self.host.info.fingerprint:
            raise InputError(
                f"the bundle is for a backbone with fingerprint {self.spec.backbone}, "
                f"this model has {self.host.info.fingerprint}"
            )
        if limits is not None and limits.unit != "chunks":
            raise InputError("limits: the runtime's hosts keep single chunks; count the cap in chunks")
        self.limits = limits or Limits(cap=-(-self.host.info.context // self.spec.chunking.tokens))
        self.level1 = open_level1(self.indexer, self.limits, selection, backend)
        if fallback is not None:
            fallback.check(self.spec, self.level1.selection)
        self.fallback, self.lag = fallback, lag
        self.windows: list[Window] = []
        self._forget()

    @classmethod
    def from_bundle(cls, bundle: str | Path, model: PreTrainedModel, **options: Any) -> Self:
        """The runtime of an exported bundle; options as the constructor takes them."""
        return cls(load_bundle(Path(bundle)), model, **options)

    def reset(self) -> None:
        """Forget all sequences and statistics."""
        self.host.cache.reset()
        self.windows = []
        self._forget()

    def _forget(self) -> None:
        self._moves: list[Move] = []  # since the newest window
        self._coming: tuple[_Choice, Prepared] | None = None
        self._read = NOTHING

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """The model's own `generate` under lookahead sparse attention; options as it takes them.

        input_ids: [B, S], sequences of equal length. A call whose ids go on from what was read before, as a second turn
        does, reads only the new ones; any other starts anew. The prompt is read with full attention but for its last
        token, so that every new token comes from sparse attention. Raises InputError for what it does not do: padding,
        beams, assisted decoding, another cache (eval/runtime/options.py), more tokens than the model's context.
        """
        check_call(self.model, self.host.info.context, input_ids, attention_mask, options)
        read, self._read = self._read, NOTHING  # a turn that is broken off leaves nothing to go on from
        have = self.host.position + 1
        # Where all was read there is no token left to read sparsely, and none can be taken back.
        goes_on = 0 < have < input_ids.shape[1] and torch.equal(read, input_ids[:, :have].cpu())
        if not goes_on:
            self.reset()
            have = 0
        if have < input_ids.shape[1] - 1:
            self._keep_everything(len(input_ids))
            self.host.read(input_ids[:, have:-1])
        self.refresh()
        criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), _Refresh(self)])
        with self.host.attached():
            output = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=self.host.cache,
                stopping_criteria=criteria,
                **options,
            )
        self._arrive()
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        self._read = ids[:, : self.host.position + 1].cpu()
        return output

    def refresh(self) -> Window:
        """Choose the resident set of the next tau tokens from the newest token read, and put it in force at once.

        Raises InputError before any is read.
        """
        self._arrive()
        choice = self._choose()
        return self._enforce(choice, choice.resident)

    def advance(self) -> None:
        """To be called after every token read: puts a set in force that was on its way, and begins the next window
        when one is over."""
        self._arrive()
        if self.host.position - self.windows[-1].position < self.spec.window:
            return
        if self.lag:
            choice = self._choose()
            self._coming = choice, self.host.prepare(choice.resident)
        else:
            self.refresh()

    def _choose(self) -> _Choice:
        """What should be resident behind the newest token."""
        if self.host.position < 0:
            raise InputError("refresh: nothing was read yet; generate first")
        position, cap = self.host.position, self.limits.cap
        total = self.spec.chunking.visible(position)
        first, last = self.spec.chunking.candidates(position)
        hidden, keys = self.host.hidden(), self.host.keys()
        positions = torch.full((len(hidden),), position)
        queries = self.level1.pack(hidden, positions)
        kept, served, demand = [], [], []
        for sequence, rows in enumerate(keys):
            paged = _paged(rows) if rows.dtype == torch.uint8 else rows
            resident = self.level1.resident(queries[sequence : sequence + 1], paged)
            chunks, how = serve(resident, 0, total, cap, total - (last - first), self.fallback)
            kept.append(chunks)
            served.append(how)
            demand.append(int(resident.demand[0]))
        return _Choice(position, total, kept, demand, served)

    def _arrive(self) -> None:
        """Put the set in force that is on its way, if one is."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            self._enforce(*coming)

    def _enforce(self, choice: _Choice, wanted: list[torch.Tensor] | Prepared) -> Window:
        self._moves.append(self.host.keep(wanted))
        fetched, evicted = (sum(getattr(move, name) for move in self._moves) for name in ("fetched", "evicted"))
        self._moves = []
        resident, held = sum(map(len, choice.resident)), self.host.resident_bytes().tensors
        brought = fetched * self.host.chunk_bytes
        window = Window(
            choice.position, choice.chunks, resident, fetched, evicted, held, brought, choice.demand, choice.served
        )
        self.windows.append(window)
        return window

    def save_trace(self, path: str | Path) -> None:
        """Write what every window did, and the totals, as JSON."""
        totals = {
            "windows": len(self.windows),
            "fetched_bytes": sum(window.fetched_bytes for window in self.windows),
            "full_attention_windows": sum("full" in window.served for window in self.windows),
        }
        trace = {
            "tau": self.spec.window,
            "lag": self.lag,
            "layers": self.spec.layers,
            "selection": str(self.level1.selection),
            "cap": self.limits.cap,
            "totals": totals,
            "windows": [asdict(window) for window in self.windows],
        }
        write_atomically(Path(path), lambda target: target.write_text(json.dumps(trace, indent=1) + "\n"))

    def summary(self) -> str:
        """One plain sentence on all windows so far."""
        made = sum(window.chunks * len(window.served) for window in self.windows)
        kept = sum(window.resident for window in self.windows) / max(1, made)
        fetched = sum(window.fetched_bytes for window in self.windows)
        full = sum("full" in window.served for window in self.windows)
        return (
            f"{len(self.windows)} windows of {self.spec.window} tokens with {kept:.1%} of the chunks resident, "
            f"{fetched / 1e6:.2f} MB fetched, {full} windows under full attention"
        )

    def _keep_everything(self, sequences: int) -> None:
        """Bring back all chunks: what the user says next is read with full attention."""
        if self.host.position >= 0:
            everything = torch.arange(self.spec.chunking.visible(self.host.position))
            self._moves.append(self.host.keep([everything] * sequences))


def _paged(rows: torch.Tensor) -> PagedKeys:
    """Keys with a table of a power of two of pages: the Triton backend keeps buffers for every width it is given."""
    keys = PagedKeys.from_rows(rows)
    pages = keys.table.shape[1]
    return PagedKeys(keys.pages, torch.nn.functional.pad(keys.table, (0, (1 << (pages - 1).bit_length()) - pages)))


class _Refresh(StoppingCriteria):
    """Never stops; lets the runtime see to the resident set after each new token."""

    def __init__(self, runtime: LSARuntime) -> None:
        self.runtime = runtime

    def __call__(self, input_ids: torch.Tensor, scores: Sequence[torch.Tensor], **kwargs: Any) -> torch.Tensor:
        self.runtime.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
