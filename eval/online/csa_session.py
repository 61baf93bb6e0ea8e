"""One sequence of a DeepSeek-V4 being decoded, for the decode check and the benchmark."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.deepseek_v4_hooks import arguments
from data_gen.core.chunks import Chunking
from data_gen.core.tensors import tiled_scores
from eval.online.session import Session
from eval.runtime.hosts.deepseek_v4 import DeepseekV4Host, ResidentCsaCache


class CsaSession(Session):
    """As `Session`, on compressed entries. layers: CSA ordinals that the indexer reads.

    attention: probabilities of the newest token on the resident chunks: layer -> [N], averaged over heads;
    native: what the newest token asked of each CSA layer's own indexer: layer -> (query [1, H, d], weights [1, H]).
    """

    def __init__(self, model: PreTrainedModel, chunking: Chunking, layers: Sequence[int]) -> None:
        self.model, self.chunking = model, chunking
        self.host = DeepseekV4Host(model, layers)
        self.attention: dict[int, torch.Tensor] = {}
        self.native: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cache(self) -> ResidentCsaCache:
        return self.host.cache

    def fork(self) -> "CsaSession":
        twin = copy.copy(self)
        twin.host = self.host.fork()
        twin.attention, twin.native = dict(self.attention), dict(self.native)
        return twin

    def read(self, tokens: list[int]) -> torch.Tensor:
        with ExitStack() as stack:
            for layer in self.cache.csa:
                attention = self.model.get_decoder().layers[layer].self_attn
                scorer = attention.compressor.indexer.scorer
                asks = scorer.register_forward_pre_hook(partial(self._asks, layer), with_kwargs=True)
                stack.callback(asks.remove)
                stack.callback(attention.register_forward_hook(partial(self._attends, layer)).remove)
            return self.host.read(torch.tensor([tokens]))[0]

    @staticmethod
    def read_each(sessions: Sequence[Session], tokens: Sequence[int]) -> torch.Tensor:
        return torch.stack([session.read([token]) for session, token in zip(sessions, tokens, strict=True)])

    def _asks(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = arguments(module, args, kwargs)
        query = given["q"][:, -1].float()
        weights = module.weights_proj(given["hidden_states"][:, -1]).float()
        self.native[layer] = query, weights * (query.shape[1] * query.shape[2]) ** -0.5

    def _attends(self, layer: int, module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
        probability = output[1][0, :, -1]
        rows = self.cache.layers[layer].compressed_kv["compressor"].shape[1]
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


def native_indexer(session: Session) -> torch.Tensor:
    """The backbone's own indexers at the newest token: softmax over chunks, averaged over the CSA layers."""
    scores = []
    entries = session.cache.index_entries(0).unbind(dim=1)
    for (query, weights), keys in zip(session.native.values(), entries, strict=True):
        keys = keys.to(query.device, torch.float32)
        scores.append(tiled_scores(query, weights, keys)[0].softmax(dim=-1).cpu())
    return torch.stack(scores).mean(dim=0)
