"""Many policies after one prompt at once: what is not resident is masked, so a whole window is read in one pass.

Decoding as it is served (eval/online) reads a token at a time under every policy. Here the sets are masks over one
shared prompt, so that an ablation of dozens of indexers costs seconds a document; next-token distributions are the same
up to rounding (tests/benchmarks/test_masked.py). After the prompt at most `chunking.recent` chunks may be read: they
stay resident, as they do when served.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_gen.backbones.layers import attention_modules
from data_gen.backbones.observe import AttentionCall, observe
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.keys import KeyPooler
from data_gen.traces.labels import candidates
from eval.runtime.correction import Correction
from eval.runtime.hosts.corrector import correction_scores
from eval.runtime.hosts.dense import PIECE_TOKENS
from eval.runtime.hosts.dense_cache import ResidentLayer
from indexer_train.scoring import select

Score = Callable[["Continuation", int], torch.Tensor]
"""(continuation, row) -> scores of the prompt's complete chunks, made from what that row has read: [N] for one set that
all full-attention layers share, [layers, N] for a set of each."""


@dataclass
class Prompt:
    """What a prompt of `tokens` tokens left behind: the stock cache, chunk keys of each full-attention layer
    [KV, N, d], their means after RoPE [KV, N, d] fp16, the newest state entering its attention [hidden], the newest
    query [H, 1, d], and the same before RoPE times the attention's scaling."""

    tokens: int
    cache: Cache
    keys: dict[int, torch.Tensor]
    means: dict[int, torch.Tensor]
    newest: dict[int, torch.Tensor]
    queries: dict[int, torch.Tensor]
    contents: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Policy:
    """One row of a continuation. score: None keeps everything; budget: share of the visible chunks, beside the
    protected ones; extra: another share of them, in place of keys that others choose by; correction: of every step, its
    chunks are taken off the budget; every: tokens between refreshes, None for those of `refresh`; key_layers: layers of
    whose chunk keys it needs all to choose by."""

    name: str
    score: Score | None
    budget: float
    extra: float = 0.0
    correction: Correction | None = None
    every: int | None = None
    key_layers: int = 0


@dataclass
class Continuation:
    """Rows that go on after one prompt, each under its policy.

    resident: [rows, layers, tokens of the prompt] bool, None before the first refresh; newest: layer -> [rows, hidden];
    watched: layer -> probabilities of each token read on each complete chunk, highest and mean over heads [S, N], of a
    continuation of one row that keeps everything; queries: layer -> newest ones [rows, H, 1, d]; contents: the same
    before RoPE, scaled; complete: chunks at each row's last refresh; held: (layer, row) -> what corrected the newest
    token [N] bool; fetched: chunks [rows], of which one layer's part counts as its share of the layers; due: tokens
    read at which each row is refreshed next; refreshes: how often each was.
    """

    prompt: Prompt
    policies: Sequence[Policy]
    cache: Cache
    newest: dict[int, torch.Tensor]
    queries: dict[int, torch.Tensor]
    contents: dict[int, torch.Tensor]
    fetched: torch.Tensor
    read: int = 0
    complete: list[int] = field(default_factory=list)
    resident: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    watched: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
    held: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    due: list[int] = field(default_factory=list)
    refreshes: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the newest token read."""
        return self.prompt.tokens + self.read - 1


class MaskedModel:
    """A dense backbone whose full-attention layers attend under masks."""

    def __init__(self, model: PreTrainedModel, chunking: Chunking) -> None:
        self.model, self.chunking = model, chunking
        self.modules = {module: layer for layer, module in attention_modules(model).items()}
        self.layers = sorted(self.modules.values())

    @torch.no_grad()
    def prompt(self, tokens: list[int]) -> Prompt:
        """Read a prompt with full attention."""
        cache = DynamicCache(config=self.model.config)
        poolers = {layer: KeyPooler(self.chunking.tokens) for layer in self.layers}
        newest: dict[int, torch.Tensor] = {}
        queries: dict[int, torch.Tensor] = {}
        contents: dict[int, torch.Tensor] = {}

        def note(call: AttentionCall) -> None:
            poolers[call.layer].append(call.new_keys()[0])
            newest[call.layer] = call.hidden[0, -1]
            queries[call.layer] = call.query[0, :, -1:]
            contents[call.layer] = _content(call)[0]

        with observe(self.model, note):
            for piece in torch.tensor([tokens], device=self.model.device).split(PIECE_TOKENS, dim=1):
                self.model(piece, past_key_values=cache, logits_to_keep=1)
        keys = {layer: pooler.pooled for layer, pooler in poolers.items()}
        means = {layer: _means(_held(cache, layer)[0][0], self.chunking.tokens) for layer in self.layers}
        return Prompt(len(tokens), cache, keys, means, newest, queries, contents)

    def begin(self, prompt: Prompt, policies: Sequence[Policy], watch: bool = False) -> Continuation:
        """Nothing read yet, nothing evicted."""
        rows, cache = len(policies), DynamicCache(config=self.model.config)
        for place, layer in enumerate(prompt.cache.layers):
            if place in self.layers:
                cache.layers[place] = own = ResidentLayer()
                own.length = prompt.tokens  # the prompt's own rows are read from `prompt`
            else:
                cache.layers[place] = copy.copy(layer)
                for name in ("keys", "values"):
                    setattr(cache.layers[place], name, getattr(layer, name).expand(rows, -1, -1, -1).contiguous())
        newest = {layer: state.expand(rows, -1) for layer, state in prompt.newest.items()}
        queries, contents = (
            {layer: query.expand(rows, -1, -1, -1) for layer, query in each.items()}
            for each in (prompt.queries, prompt.contents)
        )
        fetched = torch.zeros(rows)
        return Continuation(
            prompt, policies, cache, newest, queries, contents, fetched,
            watched={} if watch else None, complete=[0] * rows, due=[0] * rows, refreshes=[0] * rows,
        )  # fmt: skip

    def refresh(self, going: Continuation, window: int) -> None:
        """Fix the resident set of every row that is due from the newest token that it has read.

        window: tokens that a set serves where the policy says nothing else.
        """
        size, chunks = self.chunking.tokens, going.prompt.tokens // self.chunking.tokens
        if going.resident is None:
            shape = len(going.policies), len(self.layers), going.prompt.tokens
            going.resident = torch.ones(shape, dtype=torch.bool, device=self.model.device)
        for row, policy in enumerate(going.policies):
            if going.read < going.due[row]:
                continue
            going.complete[row] = self.chunking.visible(going.position)
            kept = self._kept(going, row).expand(len(self.layers), -1)
            if going.refreshes[row]:
                before = going.resident[row, :, : chunks * size : size].cpu()
                going.fetched[row] += int((kept & ~before).sum()) / len(self.layers)
            unfinished = going.prompt.tokens - chunks * size
            tokens = nn.functional.pad(kept.repeat_interleave(size, dim=1), (0, unfinished), value=True)
            going.resident[row] = tokens.to(self.model.device)
            going.due[row] = going.read + (policy.every or window)
            going.refreshes[row] += 1
        corrected = [policy.correction.chunks if policy.correction else 0 for policy in going.policies]
        absent = (~going.resident[:, 0, : chunks * size : size]).sum(dim=1).cpu()
        shares = torch.minimum(torch.tensor(corrected), absent) * size / going.prompt.tokens
        going.kept.append(going.resident.float().mean(dim=(1, 2)).cpu() + shares)

    def _kept(self, going: Continuation, row: int) -> torch.Tensor:
        """The row's next set, beside what its correction will add: [1 or layers, N] bool, protected chunks too."""
        policy, position = going.policies[row], going.position
        chunks = going.prompt.tokens // self.chunking.tokens
        if policy.score is None:
            return torch.ones(1, chunks, dtype=torch.bool)
        candidate = candidates(torch.tensor([position]), self.chunking, chunks)
        corrected = 0 if policy.correction is None else policy.correction.chunks
        bought = self.chunking.kept(policy.budget + policy.extra, position)
        if bought < corrected:
            raise InputError(f"a correction of {corrected} chunks, but the budget buys {bought} of {chunks}")
        scores = policy.score(going, row).cpu().reshape(-1, chunks)
        best = select(scores, candidate.expand_as(scores), torch.full([len(scores)], bought - corrected))
        return ~candidate | best

    @torch.no_grad()
    def read(self, going: Continuation, tokens: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Read tokens [rows, S] with what is resident: logits [rows, S, vocabulary], of the last one only if asked.

        Raises ValueError where chunks after the prompt would have to be evicted.
        """
        rows, new = tokens.shape
        if going.read + new > self.chunking.recent * self.chunking.tokens:
            raise ValueError(f"{going.read + new} tokens behind the prompt: more than the protected chunks hold")
        first = going.prompt.tokens + going.read
        places = torch.arange(first, first + new, device=self.model.device).expand(rows, -1)
        with self._masked(going):
            logits = self.model(
                tokens.to(self.model.device), past_key_values=going.cache, position_ids=places, logits_to_keep=int(last)
            ).logits
        going.read += new
        return logits

    @contextmanager
    def _masked(self, going: Continuation) -> Iterator[None]:
        name = self.model.config.get_text_config(decoder=True)._attn_implementation
        earlier = ALL_ATTENTION_FUNCTIONS.get(name)
        overridden = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)

        def attention(module: nn.Module, *states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
            if module in self.modules:
                query, key, value = states[:3]
                scaling = cast(float, kwargs.get("scaling")) or cast(int, module.head_dim) ** -0.5
                return self._attend(going, module, query, key, value, scaling), None
            forward = earlier or sys.modules[type(module).__module__].eager_attention_forward
            return forward(module, *states, **kwargs)

        def note(call: AttentionCall) -> None:
            going.newest[call.layer] = call.hidden[:, -1]
            going.contents[call.layer] = _content(call)

        ALL_ATTENTION_FUNCTIONS[name] = attention
        try:
            with observe(self.model, note):
                yield
        finally:
            if overridden is None:
                del ALL_ATTENTION_FUNCTIONS[name]
            else:
                ALL_ATTENTION_FUNCTIONS[name] = overridden

    def _attend(
        self,
        going: Continuation,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attention of new tokens to the prompt's keys, under the masks, and to the rows' own.

        query: [rows, H, S, d]; key, value: [rows, KV, n, d]. Returns [rows, S, H, d]; products in fp32.
        """
        layer = self.modules[module]
        past_key, past_value = (side[0].float() for side in _held(going.prompt.cache, layer))  # [KV, P, d]
        rows, heads, new, width = query.shape
        kv, behind = key.shape[1], key.shape[2]
        grouped = query.float().reshape(rows, kv, -1, width)  # [rows, KV, groups * S, d]
        early = (grouped.transpose(0, 1).flatten(1, 2) @ past_key.transpose(1, 2) * scaling).view(
            kv, rows, heads // kv, new, -1
        )
        late = (grouped @ key.float().transpose(2, 3) * scaling).view(rows, kv, heads // kv, new, behind)
        if going.resident is not None:
            early.masked_fill_(~self._seen(going, layer, query, key, scaling)[None, :, None], -torch.inf)
        order = torch.arange(behind, device=key.device)
        late = late.masked_fill(order > order[behind - new :, None], -torch.inf).transpose(0, 1)
        top = torch.maximum(early.amax(dim=-1), late.amax(dim=-1))[..., None]
        early.sub_(top).exp_()
        late = (late - top).exp()
        total = early.sum(dim=-1, keepdim=True) + late.sum(dim=-1, keepdim=True)
        if going.watched is not None:
            size, chunks = self.chunking.tokens, going.prompt.tokens // self.chunking.tokens
            share = (early[:, 0, ..., : chunks * size] / total[:, 0]).unflatten(-1, (chunks, size)).sum(dim=-1)
            share = share.flatten(0, 1)  # [H, S, N]
            going.watched.setdefault(layer, []).append((share.amax(dim=0), share.mean(dim=0)))
        output = (early.flatten(1, 3) @ past_value).view(kv, rows, heads // kv, new, width)
        output = (output + late @ value.float().transpose(0, 1)[:, :, None]) / total
        return output.permute(1, 3, 0, 2, 4).reshape(rows, new, heads, width).to(query.dtype)

    def _seen(
        self, going: Continuation, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Which tokens of the prompt each new one attends to, [rows, S, P] bool; S is 1 where all see the same.

        query: [rows, H, S, d]; key: [rows, KV, n, d], of all tokens after the prompt.
        """
        assert going.resident is not None
        resident = going.resident[:, self.layers.index(layer)]
        size, prompt, seen = self.chunking.tokens, going.prompt, resident[:, None]
        chunks = prompt.tokens // size
        before, going.queries[layer] = going.queries[layer], query[:, :, -1:]
        for row, policy in enumerate(going.policies):
            absent = ~resident[row, : chunks * size : size]
            if policy.correction is None or not (count := min(policy.correction.chunks, int(absent.sum()))):
                continue
            asks = query[row]
            if policy.correction.query == "previous":
                asks = torch.cat([before[row], asks], dim=1)[:, :-1]
            unfinished = _held(prompt.cache, layer)[0][0, :, chunks * size :]
            later = _means(torch.cat([unfinished, key[row]], dim=1), size)[:, : going.complete[row] - chunks]
            means = torch.cat([prompt.means[layer], later], dim=1)
            scores = correction_scores(asks, means, scaling)[:, :chunks].masked_fill(~absent, -1)
            added = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count).indices, True)
            last = going.held.get((layer, row), torch.zeros_like(absent)) & absent
            missing = added & ~torch.cat([last[None], added[:-1]])
            going.fetched[row] += int(missing.sum()) / len(self.layers)
            going.held[layer, row] = added[-1]
            if seen.shape[1] == 1:
                seen = seen.repeat(1, len(added), 1)
            seen[row, :, : chunks * size] |= added.repeat_interleave(size, dim=1)
        return seen


def _held(cache: Cache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, KV, T, d] of a full-attention layer that has read something."""
    held = cast(DynamicLayer, cache.layers[layer])
    return cast(torch.Tensor, held.keys), cast(torch.Tensor, held.values)


def _content(call: AttentionCall) -> torch.Tensor:
    """The newest query before RoPE, [B, H, 1, d] fp32, times the attention's scaling."""
    query = call.content().query
    assert query is not None
    return query[:, :, -1:].float() * call.scaling


def _means(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Keys of tokens [KV, T, d] -> means of complete chunks [KV, T // size, d] fp16."""
    return keys[:, : keys.shape[1] // size * size].float().unflatten(1, (-1, size)).mean(dim=2).half()
