"""Lookahead sparse attention around a Hugging Face model: generate as usual, a resident set every tau tokens.

runtime = LSARuntime.from_bundle("runs/quickstart/bundle", model)
ids = runtime.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=200)
runtime.save_trace("trace.json")
"""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from data_gen.backbones.families import Family, family_of
from data_gen.core.errors import InputError
from data_gen.core.files import sweep, write_atomically
from eval.runtime.calls import check_call, model_state
from eval.runtime.correction import NO_KEYS, Correction
from eval.runtime.cycle import Choice, DecodeCycle, Refresh
from eval.runtime.hosts.base import Host
from eval.runtime.hosts.deepseek_v4 import DeepseekV4Host
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dsa import DsaHost
from eval.runtime.hosts.graph import GraphHost
from eval.serving.level1 import Backend, open_level1
from eval.serving.select import Fallback, Limits, Resident, resident_chunks, serve
from indexer_train.formats.bundle import load_bundle
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Coverage, Selection, Threshold
from indexer_train.spec import IndexerSpec

OPTIONS: dict[str, tuple[type, ...]] = {
    "limits": (Limits,),
    "selection": (Budget, Threshold, Coverage),
    "fallback": (Fallback,),
    "correction": (Correction,),
}
"""Options of a runtime that are settings of their own; each may be None."""
NOTHING = torch.empty(0, 0, dtype=torch.int64)
"""No sequence, no token."""


def _of_every_token(
    kind: type[DenseHost],
    model: PreTrainedModel,
    spec: IndexerSpec,
    pageable: bool | None,
    correction: Correction | None,
) -> DenseHost:
    return kind(model, spec.chunking.tokens, spec.layers, pageable, correction)


def _deepseek_v4(
    model: PreTrainedModel, spec: IndexerSpec, pageable: bool | None, correction: Correction | None
) -> DeepseekV4Host:
    if correction is not None:
        raise InputError(NO_KEYS)
    return DeepseekV4Host(model, spec.layers, pageable)


HOSTS: dict[Family, Callable[[PreTrainedModel, IndexerSpec, bool | None, Correction | None], Host]] = {
    "deepseek_v4": _deepseek_v4,
    "dsa": partial(_of_every_token, DsaHost),
    "dense": partial(_of_every_token, DenseHost),
}
"""What opens a host of a model of each family."""


def open_host(
    model: PreTrainedModel,
    spec: IndexerSpec,
    pageable: bool | None = None,
    correction: Correction | None = None,
    graph: bool = False,
) -> Host:
    """A new batch of sequences of `model`, for an indexer of `spec`; pageable: as ColdPool's; graph: a GraphHost.
    Raises InputError for a correction of a DeepSeek-V4, or of a model with MLA, and for what a GraphHost refuses."""
    if graph:
        return _of_every_token(GraphHost, model, spec, pageable, correction)
    return HOSTS[family_of(model)](model, spec, pageable, correction)


class LSARuntime:
    """A model, its memory indexer, and the batch of sequences in their cache.

    limits: floor and cap of the resident set, by default no cap; selection: instead of the bundle's; fallback: what to
    do with windows that ask for more than the cap; backend: of Level 1 (open_level1); pageable: True keeps the cold
    side in pageable memory, for machines that cannot pin as much, and fetches get slower; lag: as DecodeCycle's. The
    set chosen at the end of a prompt has no lag, for nothing is missing there; correction: chunks that each layer adds
    at every step to a set of as many fewer, of one sequence; first_window: tokens of the first window behind a prompt,
    None: as of every other. With 1 the set is chosen again once the prompt's last token is read, from what the model
    looked for at it; graph: read tokens by one step in memory of fixed size, which a GPU replays as a CUDA graph.
    Raises InputError for a bundle of another model, a cap below the protected chunks, a fallback with a budget, a
    correction of a DeepSeek-V4 or of a model with MLA, a graph of what GraphHost refuses, or another type than these
    options have.

    A runtime holds one conversation and serves one thread; several runtimes of one model, or of several, get on side by
    side in as many threads.
    """

    def __init__(
        self,
        indexer: MemoryIndexer,
        model: PreTrainedModel,
        limits: Limits | None = None,
        selection: Selection | None = None,
        fallback: Fallback | None = None,
        backend: Backend = "auto",
        pageable: bool | None = None,
        lag: Literal[0, 1] = 0,
        correction: Correction | None = None,
        graph: bool = False,
        first_window: int | None = None,
    ) -> None:
        given = {"limits": limits, "selection": selection, "fallback": fallback, "correction": correction}
        for name, kinds in OPTIONS.items():
            if given[name] is not None and not isinstance(given[name], kinds):
                wanted = " or a ".join(kind.__name__ for kind in kinds)
                raise InputError(f"{name}: {given[name]!r} is not a {wanted}; give one, or leave {name} out")
        self.indexer, self.model, self.spec = indexer.to(model.device), model, indexer.spec
        self.host = open_host(model, self.spec, pageable, correction, graph)
        self.correction = correction
        self.cycle = DecodeCycle(self.host, self.spec.window, self._choose, lag, first_window)
        if self.spec.backbone != self.host.info.fingerprint:
            rounded = (
                "; it is loaded in float16, which rounds the weights that a backbone is known by: load it with "
                "dtype=torch.bfloat16 or torch.float32"
            )
            raise InputError(
                f"the bundle is for a backbone with fingerprint {self.spec.backbone}, "
                f"but this model has {self.host.info.fingerprint}" + (rounded if model.dtype == torch.float16 else "")
            )
        self.limits = limits or Limits(cap=-(-self.host.info.context // self.spec.chunking.tokens))
        self.level1 = open_level1(self.indexer, self.limits, selection, backend)
        if fallback is not None:
            fallback.check(self.level1.selection)
        self.fallback = fallback
        self._busy = threading.Lock()
        self._state = ""
        self._read = NOTHING

    @classmethod
    def from_bundle(cls, bundle: str | Path, model: PreTrainedModel, **options: Any) -> Self:
        """The runtime of an exported bundle; options as the constructor takes them."""
        return cls(load_bundle(Path(bundle)), model, **options)

    @property
    def windows(self) -> list[Refresh]:
        """What every refresh so far did."""
        return self.cycle.windows

    def reset(self) -> None:
        """Forget all sequences and statistics."""
        self.host.cache.reset()
        self.cycle.reset()
        self._read = NOTHING

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """The model's own `generate` under lookahead sparse attention; options as it takes them.

        input_ids: [B, S], sequences of equal length. A call whose ids continue what was read before, as in a second
        turn, reads only the new ones; any other starts again, and so does one before which the model changed: an
        adapter added or switched, a weight written. The prompt is read with full attention but for its last token, so
        that every new token comes from sparse attention. Raises InputError for what it does not do: padding, beams,
        assisted decoding, another cache (eval/runtime/calls.py), more tokens than the model's context; for a call
        inside or beside another one of this runtime, and when something else has read into its cache.
        """
        options = check_call(self.model, self.host.info.context, input_ids, attention_mask, options)
        if not self._busy.acquire(blocking=False):
            raise InputError(
                "this runtime is generating already, and it holds one conversation: wait for it, or open another "
                "LSARuntime of the model"
            )
        try:
            return self._generate(input_ids, options)
        finally:
            self._busy.release()

    def _generate(self, input_ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        read, self._read = self._read, NOTHING  # a turn that is broken off leaves nothing to continue from
        before, self._state = self._state, model_state(self.model)
        have = self.host.position + 1
        # Where all was read there is no token left to read sparsely, and none can be taken back.
        goes_on = 0 < have < input_ids.shape[1] and torch.equal(read, input_ids[:, :have].cpu())
        if goes_on and before != self._state:
            goes_on = False
            logging.getLogger(__name__).warning("the model changed since the turn before: everything is read again")
        if not goes_on:
            self.reset()
            have = 0
        if have < input_ids.shape[1] - 1:
            self.cycle.keep_everything(len(input_ids))
            self.host.read(input_ids[:, have:-1])
        self.cycle.refresh()
        criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), _AfterToken(self.cycle)])
        model: Any = self.host.model
        with self.host.attached():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=self.host.cache,
                stopping_criteria=criteria,
                **options,
            )
        self.cycle.arrive()
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        self._read = ids[:, : self.host.position + 1].cpu()
        return output

    def _choose(self) -> Choice:
        """Level 1 at the newest token; a sequence that asks for too much falls back by itself."""
        position, chunking = self.host.position, self.spec.chunking
        total, (first, last) = chunking.visible(position), chunking.candidates(position)
        hidden = self.host.hidden()
        queries = self.level1.pack(hidden, torch.full((len(hidden),), position))
        resident = self._resident(queries)
        protected = total - (last - first)
        kept = [
            serve(resident, sequence, total, self.limits.cap, protected, self.fallback)
            for sequence in range(len(hidden))
        ]
        return Choice([chunks for chunks, _ in kept], resident.demand.tolist(), [how for _, how in kept])

    def _resident(self, queries: torch.Tensor) -> Resident:
        """What Level 1 asks for, less the worst chunks where a correction takes their place."""
        keys, chunking = self.host.level1_keys(), self.spec.chunking
        if self.correction is None:
            return self.level1.resident(queries, keys)
        scores, positions = self.level1.joined_scores(queries, keys), queries[:, -1].long()
        whole = resident_chunks(scores, positions, chunking, self.level1.selection, self.limits)
        position = int(positions[0])
        first, last = chunking.candidates(position)
        left = int(whole.counts[0]) - self.correction.chunks
        if left < chunking.visible(position) - (last - first):
            raise InputError(
                f"correction: {self.correction.chunks} chunks, but of {chunking.visible(position)} only "
                f"{int(whole.counts[0])} would be resident ({self.level1.selection}), the protected ones included; "
                "correct by fewer chunks, or keep more"
            )
        return resident_chunks(scores, positions, chunking, self.level1.selection, Limits(cap=left))

    def save_trace(self, path: str | Path) -> None:
        """Write what every window did, and the totals, as JSON."""
        totals = {
            "windows": len(self.windows),
            "fetched_bytes": sum(window.fetched_bytes for window in self.windows),
            "full_attention_windows": sum("full" in window.served for window in self.windows),
        }
        trace = {
            "tau": self.spec.window,
            "lag": self.cycle.lag,
            "first_window": self.cycle.first,
            "layers": self.spec.layers,
            "selection": str(self.level1.selection),
            "cap": self.limits.cap,
            "totals": totals,
            "windows": [asdict(window) for window in self.windows],
        }
        if isinstance(self.host, DenseHost) and self.correction is not None:
            corrector = self.host.cache.corrector
            assert corrector is not None
            fetched = corrector.fetched * self.host.cold_bytes // len(self.host.info.full_layers)
            trace["correction"] = self.correction.model_dump() | {
                "fetched_bytes": fetched, "mean_key_bytes": corrector.mean_bytes(),
            }  # fmt: skip
        sweep(Path(path).parent)
        write_atomically(Path(path), lambda target: target.write_text(json.dumps(trace, indent=1) + "\n"))

    def summary(self) -> str:
        """One plain sentence on all windows so far."""
        made = sum(window.chunks * len(window.served) for window in self.windows)
        kept = sum(window.resident for window in self.windows) / max(1, made)
        fetched = sum(window.fetched_bytes for window in self.windows)
        full = sum("full" in window.served for window in self.windows)
        return (
            f"{kept:.1%} of the chunks resident, {fetched / 1e6:.2f} MB fetched; "
            f"windows of {self.spec.window} tokens: {len(self.windows)}, under full attention: {full}"
        )


class _AfterToken(StoppingCriteria):
    """Never stops; lets the cycle see to the resident set after each new token."""

    def __init__(self, cycle: DecodeCycle) -> None:
        self.cycle = cycle

    def __call__(self, input_ids: torch.Tensor, scores: Sequence[torch.Tensor], **kwargs: Any) -> torch.Tensor:
        if (read := self.cycle.host.position + 1) != input_ids.shape[1] - 1:
            raise InputError(
                f"the runtime's cache holds {read} tokens instead of {input_ids.shape[1] - 1}: something else, perhaps "
                "a logits processor, called the model with this cache; give it a cache of its own"
            )
        self.cycle.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
