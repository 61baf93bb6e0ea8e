"""One sequence being decoded: its cache, its chunk keys, and what its newest token asked for."""

import copy

import torch
from transformers import PreTrainedModel

from data_gen.backbones.observe import AttentionCall, attention_modules, observe
from data_gen.chunks import Chunking
from data_gen.keys import KeyPooler
from eval.decode.cache import ResidentCache


class Session:
    """A decoder, one sequence, and the state a policy may look at.

    pooled: layer -> chunk keys so far; newest: layer -> the newest token's attention call.
    """

    def __init__(self, model: PreTrainedModel, chunking: Chunking) -> None:
        self.model = model
        self.chunking = chunking
        layers = sorted(attention_modules(model))
        self.cache = ResidentCache(model.config, layers)
        self.pooled = {layer: KeyPooler(chunking.tokens) for layer in layers}
        self.newest: dict[int, AttentionCall] = {}

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based."""
        return self.cache.get_seq_length() - 1

    def fork(self) -> "Session":
        """An independent continuation of the same history."""
        twin = copy.copy(self)
        twin.cache = self.cache.fork()
        twin.pooled = {layer: copy.copy(pooler) for layer, pooler in self.pooled.items()}
        twin.newest = dict(self.newest)
        return twin

    @torch.no_grad()
    def read(self, tokens: list[int]) -> torch.Tensor:
        """Read tokens with what is resident now; returns the logits behind the last one, [vocabulary]."""
        with observe(self.model, self._remember):
            output = self.model(
                torch.tensor([tokens], device=self.model.device), past_key_values=self.cache, logits_to_keep=1
            )
        return output.logits[0, -1]

    def _remember(self, call: AttentionCall) -> None:
        self.pooled[call.layer].append(call.new_keys()[0])
        self.newest[call.layer] = call

    def keep(self, scores: torch.Tensor, budget: float) -> None:
        """Fix the resident set: the best unprotected chunks under `budget`, the protected ones, the unfinished one.

        scores: [N] of the complete chunks at the newest position.
        """
        first, last = self.chunking.candidates(self.position)
        count = min(self.chunking.kept(budget, self.position), last - first)
        best = scores[first:last].argsort(descending=True, stable=True)[:count] + first
        resident = torch.ones(self.position + 1, dtype=torch.bool)
        resident[first * self.chunking.tokens : last * self.chunking.tokens] = False
        for chunk in best.tolist():
            resident[chunk * self.chunking.tokens : (chunk + 1) * self.chunking.tokens] = True
        self.cache.keep(resident.nonzero().flatten())
