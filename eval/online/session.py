"""One sequence being decoded, dense or DeepSeek-V4: its cache, its chunk keys, and what its newest token asked for."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.deepseek_v4_hooks import arguments
from data_gen.backbones.dsa_hooks import indexers
from data_gen.backbones.families import Family, family_of
from data_gen.backbones.layers import attention_modules
from data_gen.backbones.observe import AttentionCall, observe
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.traces.labels import candidates, pooled_attention
from eval.runtime.correction import Correction
from eval.runtime.cycle import Choice
from eval.runtime.hosts.deepseek_v4 import DeepseekV4Host, ResidentCsaCache
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dense_cache import ResidentCache
from eval.runtime.hosts.dsa import DsaCache, DsaHost
from eval.runtime.hosts.together import read_together
from indexer_train.scoring import select
from indexer_train.spec import IndexerSpec


class Session(ABC):
    """A host with one sequence, and the state that a policy may look at.

    chunking: of the history; host: reads, and keeps what is resident.
    """

    chunking: Chunking
    host: DenseHost | DeepseekV4Host

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based."""
        return self.host.position

    @property
    @abstractmethod
    def resident_tokens(self) -> int:
        """Tokens whose keys and values are resident in the layers that attend to all of the history."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of resident keys and values."""
        return self.host.cache.resident_bytes()

    @property
    def corrected(self) -> float:
        """Chunks that a correction brought from the cold side; one layer's part counts as its share of the layers."""
        return 0

    @abstractmethod
    def fork(self) -> Self:
        """An independent continuation of the same history."""

    @abstractmethod
    def read(self, tokens: list[int]) -> torch.Tensor:
        """Read tokens with what is resident now; returns the logits after the last one, [vocabulary].

        Raises InputError beyond the model's context.
        """

    @staticmethod
    def read_each(sessions: Sequence["Session"], tokens: Sequence[int]) -> torch.Tensor:
        """Read a token into each session, all of one model and at the same position: logits [sessions, vocabulary]."""
        return torch.stack([session.read([token]) for session, token in zip(sessions, tokens, strict=True)])

    @abstractmethod
    def asked(self, layers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What an indexer of `layers` scores: newest hidden state [1, L, hidden] bf16, keys [N, L, ...]."""

    @abstractmethod
    def mass(self) -> torch.Tensor:
        """Attention of the newest token on each complete chunk [N], averaged over heads and full-attention layers.

        Raises ValueError unless everything is resident.
        """

    def best(self, scores: torch.Tensor, budget: float, less: int = 0) -> Choice:
        """The best unprotected chunks under `budget`, and the protected ones; the unfinished one is beside any choice.

        scores: [N] of the complete chunks at the newest position; those of -inf are not kept, whatever the budget;
        less: chunks of the budget that a correction is left. Raises InputError for a budget of fewer.
        """
        candidate = candidates(torch.tensor([self.position]), self.chunking, len(scores))
        bought = self.chunking.kept(budget, self.position)
        if bought < less:
            raise InputError(
                f"correction: {less} chunks, but a budget of {budget} keeps only {bought} of {len(scores)}; correct by "
                "fewer chunks, or raise the budget"
            )
        count = torch.tensor([bought - less])
        chosen = select(scores[None], candidate & (scores > -torch.inf), count)
        return Choice([(chosen | ~candidate)[0].nonzero().flatten()], [int(chosen.sum())], ["demand"])


class DenseSession(Session):
    """Of a model whose full-attention layers keep a key a token. newest: layer -> the newest token's attention call."""

    kind: type[DenseHost] = DenseHost

    def __init__(self, model: PreTrainedModel, chunking: Chunking) -> None:
        self.model, self.chunking = model, chunking
        layers = sorted(indexers(model) or attention_modules(model))
        self.host: DenseHost = self.kind(model, chunking.tokens, layers)
        self.newest: dict[int, AttentionCall] = {}

    @property
    def cache(self) -> ResidentCache:
        """Keys and values of all layers."""
        return self.host.cache

    @property
    def resident_tokens(self) -> int:
        held = 0 if self.cache.corrector is None else self.cache.corrector.chunks_held
        return self.cache.full[0].rows + held * self.chunking.tokens

    @property
    def corrected(self) -> float:
        corrector = self.cache.corrector
        return 0 if corrector is None else corrector.fetched / len(self.cache.full)

    def correct(self, correction: Correction) -> None:
        """Correct every step from the next choice on."""
        self.cache.correct(correction, {layer: call.query[0, :, -1:] for layer, call in self.newest.items()})

    def fork(self) -> "DenseSession":
        twin = copy.copy(self)
        twin.host, twin.newest = self.host.fork(), dict(self.newest)
        return twin

    def read(self, tokens: list[int]) -> torch.Tensor:
        with observe(self.model, self._remember):
            return self.host.read(torch.tensor([tokens]))[0]

    @staticmethod
    def read_each(sessions: Sequence["DenseSession"], tokens: Sequence[int]) -> torch.Tensor:
        """Several are read in one forward pass, which costs little more than that of one."""
        if len(sessions) == 1 or sessions[0].host.latent:
            return Session.read_each(sessions, tokens)
        caches = [session.cache for session in sessions]
        return read_together(sessions[0].model, caches, tokens, lambda call: sessions[call.sequence]._remember(call))

    def _remember(self, call: AttentionCall) -> None:
        self.newest[call.layer] = call

    def asked(self, layers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.stack([self.cache.newest[layer] for layer in layers], dim=1)
        return hidden, self.cache.chunk_keys(layers)[0]

    def mass(self) -> torch.Tensor:
        total = torch.zeros(self.chunking.visible(self.position))
        for call in self.newest.values():
            if call.key.shape[2] != self.position + 1:
                raise ValueError("full attention only: what evicted chunks would get is not known")
            row = torch.tensor([self.position], device=call.query.device)
            pooled = pooled_attention(
                call.query[0, :, -1:], call.key[0], row, self.chunking.tokens, call.scaling, call.softcap, call.sinks,
                self.host.picked(call.layer, call.key.shape[2]),
            )  # fmt: skip
            total += pooled[:, 0, : len(total)].mean(dim=0).cpu()
        return total / len(self.newest)


class DsaSession(DenseSession):
    """Of a model whose layers attend to the tokens that lightning indexers pick (DSA).

    native: what the newest token asked of each layer's own indexer: layer -> (query [1, H, d], weights [1, H]).
    """

    host: DsaHost
    kind = DsaHost

    def __init__(self, model: PreTrainedModel, chunking: Chunking) -> None:
        super().__init__(model, chunking)
        self.native: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cache(self) -> DsaCache:
        """What is cached of a token in all layers."""
        return self.host.cache

    def fork(self) -> "DsaSession":
        twin = cast(DsaSession, super().fork())
        twin.native = dict(self.native)
        return twin

    def _remember(self, call: AttentionCall) -> None:
        super()._remember(call)
        if call.layer in self.cache.observed:
            self.native[call.layer] = self.cache.asked(call.layer)


class CsaSession(Session):
    """Of a DeepSeek-V4, on compressed entries. layers: CSA ordinals that the indexer reads.

    attention: probabilities of the newest token on the resident chunks: layer -> [N], averaged over heads;
    native: what the newest token asked of each CSA layer's own indexer: layer -> (query [1, H, d], weights [1, H]).
    """

    def __init__(self, model: PreTrainedModel, chunking: Chunking, layers: Sequence[int]) -> None:
        self.model, self.chunking = model, chunking
        self.host: DeepseekV4Host = DeepseekV4Host(model, layers)
        self.attention: dict[int, torch.Tensor] = {}
        self.native: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cache(self) -> ResidentCsaCache:
        """Compressed entries and windows of all layers."""
        return self.host.cache

    def fork(self) -> "CsaSession":
        twin = copy.copy(self)
        twin.host = self.host.fork()
        twin.attention, twin.native = dict(self.attention), dict(self.native)
        return twin

    def read(self, tokens: list[int]) -> torch.Tensor:
        layers: Any = self.model.get_decoder().layers
        with ExitStack() as stack:
            for layer in self.cache.csa:
                attention = layers[layer].self_attn
                scorer = attention.compressor.indexer.scorer
                asks = scorer.register_forward_pre_hook(partial(self._asks, layer), with_kwargs=True)
                stack.callback(asks.remove)
                stack.callback(attention.register_forward_hook(partial(self._attends, layer)).remove)
            return self.host.read(torch.tensor([tokens]))[0]

    def _asks(self, layer: int, module: Any, args: tuple, kwargs: dict) -> None:
        given = arguments(module, args, kwargs)
        query = given["q"][:, -1].float()
        weights = module.weights_proj(given["hidden_states"][:, -1]).float()
        self.native[layer] = query, weights * (query.shape[1] * query.shape[2]) ** -0.5

    def _attends(self, layer: int, module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
        probability = output[1][0, :, -1]
        cached: Any = self.cache.layers[layer]
        rows = cached.compressed_kv["compressor"].shape[1]
        self.attention[layer] = probability[:, probability.shape[-1] - rows :].float().mean(dim=0)

    def mass(self) -> torch.Tensor:
        if self.cache.table.evicted():
            raise ValueError("full attention only: what evicted chunks would get is not known")
        return torch.stack([attention.cpu() for attention in self.attention.values()]).mean(dim=0)

    def asked(self, layers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.host.hidden(), self.host.keys()[0]

    @property
    def resident_tokens(self) -> int:
        rate, total = self.chunking.tokens, self.cache.total
        return len(self.cache.resident()[0]) * rate + self.position + 1 - total * rate


SESSIONS: dict[Family, Callable[[PreTrainedModel, IndexerSpec], Session]] = {
    "deepseek_v4": lambda model, spec: CsaSession(model, spec.chunking, spec.layers),
    "dsa": lambda model, spec: DsaSession(model, spec.chunking),
    "dense": lambda model, spec: DenseSession(model, spec.chunking),
}
"""What opens a session of a model of each family."""


def open_session(model: PreTrainedModel, spec: IndexerSpec) -> Session:
    """A new session of `model`'s family, for an indexer of `spec`."""
    return SESSIONS[family_of(model)](model, spec)
