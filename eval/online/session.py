"""One sequence being decoded: its cache, its chunk keys, and what its newest token asked for."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from data_gen.backbones.observe import AttentionCall, attention_modules, observe
from data_gen.core.chunks import Chunking
from data_gen.traces.labels import candidates, pooled_attention
from eval.runtime.hosts.dense import DenseHost, ResidentCache
from eval.runtime.hosts.together import read_together
from indexer_train.scoring import select


class Session:
    """A host with one sequence, and the state a policy may look at.

    newest: layer -> the newest token's attention call.
    """

    def __init__(self, model: PreTrainedModel, chunking: Chunking) -> None:
        self.model, self.chunking = model, chunking
        self.host = DenseHost(model, chunking.tokens, sorted(attention_modules(model)))
        self.newest: dict[int, AttentionCall] = {}

    @property
    def cache(self) -> ResidentCache:
        return self.host.cache

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based."""
        return self.host.position

    def fork(self) -> "Session":
        """An independent continuation of the same history."""
        twin = copy.copy(self)
        twin.host, twin.newest = self.host.fork(), dict(self.newest)
        return twin

    def read(self, tokens: list[int]) -> torch.Tensor:
        """Read tokens with what is resident now; returns the logits behind the last one, [vocabulary].

        Raises InputError beyond the model's context.
        """
        with observe(self.model, self._remember):
            return self.host.read(torch.tensor([tokens]))[0]

    @staticmethod
    def read_each(sessions: Sequence["Session"], tokens: Sequence[int]) -> torch.Tensor:
        """Read a token into each session, all of one model and at the same position: logits [sessions, vocabulary].

        Several are read in one forward pass, which costs little more than that of one.
        """
        if len(sessions) == 1:
            return sessions[0].read([tokens[0]])[None]
        caches = [session.cache for session in sessions]
        return read_together(sessions[0].model, caches, tokens, lambda call: sessions[call.sequence]._remember(call))

    def _remember(self, call: AttentionCall) -> None:
        self.newest[call.layer] = call

    def asked(self, layers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What an indexer of `layers` scores: newest hidden state [1, L, hidden] bf16, keys [N, L, ...]."""
        hidden = torch.stack([self.cache.newest[layer] for layer in layers], dim=1)
        return hidden, self.cache.chunk_keys(layers)[0]

    def mass(self) -> torch.Tensor:
        """Attention of the newest token on each complete chunk [N], averaged over heads and full-attention layers.

        Raises ValueError unless everything is resident.
        """
        total = torch.zeros(self.chunking.visible(self.position))
        for call in self.newest.values():
            if call.key.shape[2] != self.position + 1:
                raise ValueError("full attention only: what evicted chunks would get is not known")
            row = torch.tensor([self.position], device=call.query.device)
            pooled = pooled_attention(
                call.query[0, :, -1:], call.key[0], row, self.chunking.tokens, call.scaling, call.softcap, call.sinks
            )
            total += pooled[:, 0, : len(total)].mean(dim=0).cpu()
        return total / len(self.newest)

    @property
    def resident_tokens(self) -> int:
        return self.cache.full[0].rows

    def keep(self, scores: torch.Tensor, budget: float) -> None:
        """Fix the resident set: the best unprotected chunks under `budget`, the protected ones, the unfinished one.

        scores: [N] of the complete chunks at the newest position; those of -inf are not kept, whatever the budget.
        """
        candidate = candidates(torch.tensor([self.position]), self.chunking, len(scores))
        count = torch.tensor([self.chunking.kept(budget, self.position)])
        chosen = select(scores[None], candidate & (scores > -torch.inf), count)
        self.keep_chunks((chosen | ~candidate)[0].nonzero().flatten())

    def keep_chunks(self, chunks: torch.Tensor) -> None:
        """Make exactly these complete chunks ([R], ascending) resident, beside the unfinished one."""
        self.host.keep([chunks])
