"""An indexer's weights and its score in plain torch: all that serving needs of it."""

import torch
from torch import nn

from data_gen.core.cpu import SteadyLinear, product
from data_gen.core.keys import KEY_RECIPES
from indexer_train.scoring import TILE_ELEMENTS
from indexer_train.spec import IndexerSpec


def turn(spec: IndexerSpec, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Queries [B, H, key_width] at `positions` [B] -> the same turned the way the keys are.

    Without a gradient the CPU turns a few at a time, in its cache and in the memory of `query`. Raises InputError at
    positions beyond the backbone's range.
    """
    if query.requires_grad or not query.is_cpu:
        return _turn(spec, query, positions)
    few = max(1, TILE_ELEMENTS // max(1, query[:1].numel()))
    for part, place in zip(query.split(few), positions.split(few), strict=True):
        part.copy_(_turn(spec, part, place))
    return query


def _turn(spec: IndexerSpec, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if spec.rope is not None:
        query = spec.rope.rotate(query, positions[:, None])
    return KEY_RECIPES[spec.key].turn(query)


class LayerEncoder(nn.Module):
    """One layer's query encoder: c = RMSNorm(h W_a) g; q = turn(c W_b); w = h W_w (d H)^-0.5; extras = h W_e + b_e."""

    def __init__(self, spec: IndexerSpec) -> None:
        super().__init__()
        self.spec = spec
        packed = spec.packed
        self.wq_a = SteadyLinear(spec.hidden, spec.shape.rank)
        self.q_norm = nn.RMSNorm(spec.shape.rank, eps=1e-6)
        self.wq_b = SteadyLinear(spec.shape.rank, packed.heads * packed.width)
        self.weights_proj = SteadyLinear(spec.hidden, packed.heads)
        extras = packed.bumps + packed.scale + packed.slot
        self.extras = nn.Linear(spec.hidden, extras) if extras else None
        if self.extras is not None:
            nn.init.zeros_(self.extras.weight)
            nn.init.zeros_(self.extras.bias)
        self.heads = packed.heads
        self.weight_scale = (packed.width * packed.heads) ** -0.5

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """hidden: [B, hidden], positions: [B] -> the packed query's parts without the bias, [B, size] together."""
        latent = self.q_norm(_project(self.wq_a, hidden).float())
        query = _project(self.wq_b, latent).unflatten(-1, (self.heads, -1))
        parts = [turn(self.spec, query, positions).flatten(1), self.weights_proj(hidden) * self.weight_scale]
        if self.extras is not None:
            parts.append(self.extras(hidden))
        return parts


def _project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x), faster where the CPU needs no gradient of it."""
    return product(x, layer.weight) if x.is_cpu and not torch.is_grad_enabled() else layer(x)


class Scorer(nn.Module):
    """Hidden states -> packed queries -> logits of chunks. Training, evaluation and serving use this one."""

    bias: nn.Parameter | None

    def __init__(self, spec: IndexerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoders = nn.ModuleDict({str(layer): LayerEncoder(spec) for layer in spec.layers})
        self.register_parameter("bias", nn.Parameter(torch.zeros(1)) if spec.shape.bias else None)

    def encoder(self, layer: int) -> LayerEncoder:
        """Of one of the backbone's layers, by its number there."""
        found = self.encoders[str(layer)]
        assert isinstance(found, LayerEncoder)
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def pack(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, hidden] at `positions` [B] -> packed queries, layer after layer: [B, L * size + 1].

        The last column is the query's position (exact in fp32 up to 2^24), which the score needs.
        """
        bias = [] if self.bias is None else [self.bias.expand(len(positions), 1)]
        states = hidden.transpose(0, 1).contiguous().to(next(self.parameters()).dtype)
        packed = []
        for encoder, state in zip(self.encoders.values(), states, strict=True):
            packed += [*encoder(state, positions), *bias]
        return torch.cat([*packed, positions[:, None].float()], dim=-1)

    def layer_logits(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        chunks: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Logits per layer. queries: [B, L * size + 1]; keys: [N, L * key_width]. Returns [L, B, N] fp32.

        chunks: [N], which chunk each key belongs to (by default 0 .. N-1); candidates: [B, M], the keys that each
        query is scored against (by default all): returns [L, B, M] at a cost of B x M; dtype: of the products of
        queries and keys.
        """
        spec, layers = self.spec, len(self.spec.layers)
        *packed, positions = queries.float().split([spec.packed.size] * layers + [1], dim=1)
        chunks = torch.arange(len(keys), device=keys.device) if chunks is None else chunks
        first_tokens = (chunks if candidates is None else chunks[candidates]) * spec.chunking.tokens
        distance = (positions - first_tokens).clamp_min(1)  # future chunks are masked later
        by_layer = zip(packed, keys.to(dtype).chunk(layers, dim=1), strict=True)
        return torch.stack([spec.packed.logits(query, key, distance, candidates) for query, key in by_layer])
