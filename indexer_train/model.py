"""MemoryIndexer: a query encoder per backbone layer beside frozen keys, made of sentence-transformers modules."""

from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Router
from torch import nn

from data_gen.chunks import Chunking
from data_gen.key_codec import hadamard
from data_gen.keys import key_vectors
from data_gen.products import product
from data_gen.rope import Rope
from data_gen.store import write_atomically
from data_gen.trace import KeyKind
from indexer_train.card import Provenance, model_card
from indexer_train.config import IndexerConfig
from indexer_train.memory import SteadyLinear
from indexer_train.scoring import TILE_ELEMENTS, PackedQuery, join_layers
from indexer_train.selection import Budget, Cut, Selection, Threshold


class IndexerSpec(BaseModel):
    """All that an indexer must know besides its weights.

    layers: backbone layers it reads; hidden, key_width: widths there; window: tau; backbone: fingerprint of the model
    whose traces trained it; key, rope: how its keys were made (data_gen/trace.py BackboneInfo), queries follow suit;
    selections: ways to choose chunks by their scores, the served one first; provenance: where it comes from.
    """

    model_config = ConfigDict(extra="forbid")

    shape: IndexerConfig
    layers: list[int]
    hidden: int
    key_width: int
    chunking: Chunking
    window: int
    backbone: str
    key: KeyKind = "mean_pre_rope"
    rope: Rope | None = None
    selections: list[Selection] = []
    provenance: Provenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, values: Any) -> Any:
        """Earlier files say `thresholds`: score by share kept."""
        if isinstance(values, dict) and "thresholds" in values:
            selections = [
                Threshold(target="budget", value=float(share), cuts=[Cut(score=score)])
                for share, score in values["thresholds"].items()
            ]
            return {name: value for name, value in values.items() if name != "thresholds"} | {"selections": selections}
        return values

    @property
    def selection(self) -> Budget | Threshold:
        """How the indexer is served: what was chosen in training or by `lookahead calibrate`, else the paper's 0.5."""
        return self.selections[0] if self.selections else Threshold(cuts=[Cut(score=0.0)])

    @property
    def thresholds(self) -> dict[str, float]:
        """The score that keeps a share of the chunks of contexts of any length, by share."""
        found = [each for each in self.selections if isinstance(each, Threshold) and each.target == "budget"]
        return {str(each.value): each.cuts[0].score for each in found if len(each.cuts) == 1}

    @property
    def packed(self) -> PackedQuery:
        shape = self.shape
        return PackedQuery(shape.heads, self.key_width, shape.distance_bumps, shape.scale, shape.slot, shape.bias)

    def turn(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries [B, H, key_width] at `positions` ([B]) -> the same turned the way the keys are.

        Without a gradient the CPU turns a few at a time, in its cache and in the memory of `query`. Raises InputError
        at positions beyond the backbone's range.
        """
        if query.requires_grad or not query.is_cpu:
            return self._turn(query, positions)
        few = max(1, TILE_ELEMENTS // max(1, query[:1].numel()))
        for part, place in zip(query.split(few), positions.split(few), strict=True):
            part.copy_(self._turn(part, place))
        return query

    def _turn(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.rope is not None:
            query = self.rope.rotate(query, positions[:, None])
        return hadamard(query) if self.key == "fp8_rope_hadamard" else query


class LayerEncoder(nn.Module):
    """One layer's query encoder: c = RMSNorm(h W_a) g; q = turn(c W_b); w = h W_w (d H)^-0.5; extras = h W_e + b_e."""

    def __init__(self, spec: IndexerSpec) -> None:
        super().__init__()
        packed = spec.packed
        self.turn = spec.turn
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
        parts = [self.turn(query, positions).flatten(1), self.weights_proj(hidden) * self.weight_scale]
        if self.extras is not None:
            parts.append(self.extras(hidden))
        return parts


def _project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x), faster where the CPU needs no gradient of it."""
    return product(x, layer.weight) if x.is_cpu and not torch.is_grad_enabled() else layer(x)


class QueryEncoder(InputModule):
    """The query route: hidden states of all layers -> packed queries, layer after layer, and the position."""

    save_in_root = False
    config_file_name = "spec.json"

    def __init__(self, spec: IndexerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoders = nn.ModuleDict({str(layer): LayerEncoder(spec) for layer in spec.layers})
        self.register_parameter("bias", nn.Parameter(torch.zeros(1)) if spec.shape.bias else None)

    @property
    def modalities(self) -> list[str]:
        return ["hidden_states"]

    def preprocess(self, inputs: list[tuple[torch.Tensor, int]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Batch (hidden states [L, hidden], position) pairs; a pair, because a bare tensor is taken for audio."""
        hidden, positions = zip(*inputs, strict=True)
        return {"input_features": torch.stack(hidden), "positions": torch.tensor(positions)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """features["input_features"]: [B, L, hidden], ["positions"]: [B] -> ["sentence_embedding"]: [B, L * size + 1].

        The last column is the query's position (exact in fp32 up to 2^24), which the score needs.
        """
        positions = features["positions"]
        bias = [] if self.bias is None else [self.bias.expand(len(positions), 1)]
        hidden = features["input_features"].to(next(self.parameters()).dtype).unbind(dim=1)
        packed = []
        for encoder, state in zip(self.encoders.values(), hidden, strict=True):
            packed += [*encoder(state, positions), *bias]
        features["sentence_embedding"] = torch.cat([*packed, positions[:, None].float()], dim=-1)
        return features

    def get_embedding_dimension(self) -> int:
        return len(self.spec.layers) * self.spec.packed.size + 1

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        (Path(output_path) / self.config_file_name).write_text(self.spec.model_dump_json(indent=2))
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:
        hub = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **hub)
        module = cls(IndexerSpec.model_validate(config))
        return cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module, **hub)


class KeyDecoder(InputModule):
    """The document route, without parameters: stored keys -> fp32 keys of all layers."""

    save_in_root = False

    @property
    def modalities(self) -> list[str]:
        return ["keys"]

    def preprocess(self, inputs: list[tuple[torch.Tensor]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Stack (keys [L, ...] as stored,) of N chunks into [N, L, ...]."""
        return {"input_values": torch.stack([keys for (keys,) in inputs])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """features["input_values"]: [N, L, ...] as stored -> features["sentence_embedding"]: [N, L * key_width]."""
        features["sentence_embedding"] = key_vectors(features["input_values"]).flatten(1)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing to save: it has no weights and no settings."""

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        return cls()


class MemoryIndexer(SentenceTransformer):
    """The trained model; a document is the chunks of one history, in order.

    Usage:
        queries = indexer.encode_query([(hidden, position), ...])  # hidden: [L, hidden]
        chunks = indexer.encode_document([(keys,), ...])  # keys: [L, key_width], one entry per chunk
        scores = indexer.similarity(queries, chunks)  # [B, N], what serving ranks by
    """

    _module_classes = {  # noqa: RUF012 - the attribute the base class reads to load without remote code
        "indexer_train.model.QueryEncoder": QueryEncoder,
        "indexer_train.model.KeyDecoder": KeyDecoder,
    }
    accepts_loss_kwargs = False

    @classmethod
    def from_spec(cls, spec: IndexerSpec, device: str | None = None) -> Self:
        """A new indexer with random weights (seed torch first)."""
        router = Router.for_query_document([QueryEncoder(spec)], [KeyDecoder()])
        return cls(modules=[router], device=device)

    @property
    def query_encoder(self) -> QueryEncoder:
        return self[0].sub_modules["query"][0]

    @property
    def spec(self) -> IndexerSpec:
        return self.query_encoder.spec

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
        packed, positions = queries.float().split([queries.shape[1] - 1, 1], dim=1)
        chunks = torch.arange(len(keys), device=keys.device) if chunks is None else chunks
        first_tokens = (chunks if candidates is None else chunks[candidates]) * spec.chunking.tokens
        distance = (positions - first_tokens).clamp_min(1)  # future chunks are masked later
        by_layer = zip(packed.chunk(layers, dim=1), keys.to(dtype).chunk(layers, dim=1), strict=True)
        return torch.stack([spec.packed.score(query, key, distance, candidates) for query, key in by_layer])

    def surrogate(self, queries: torch.Tensor) -> torch.Tensor:
        """The layers' sum as one inner product with a chunk's keys, ReLU and distance left out.

        queries: [B, L * size + 1] -> [B, L * key_width]: finds candidates, never ranks them.
        """
        packed = queries[:, :-1].float().chunk(len(self.spec.layers), dim=1)
        return torch.cat([self.spec.packed.surrogate(query) for query in packed], dim=1)

    @torch.no_grad()
    def layer_scores(self, hidden: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Before layers are joined: hidden [B, L, hidden], stored keys [N, L, ...], positions [B] -> [L, B, N] fp32."""
        features = {"input_features": hidden.to(self.device), "positions": positions.to(self.device)}
        queries = self.query_encoder(features)["sentence_embedding"]
        return self.layer_logits(queries, key_vectors(keys.to(self.device)).flatten(1))

    def scores(self, hidden: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What serving ranks by: the joined `layer_scores`, [B, N] fp32."""
        return join_layers(self.layer_scores(hidden, keys, positions), self.spec.shape.join)

    def similarity(self, embeddings1: torch.Tensor, embeddings2: torch.Tensor) -> torch.Tensor:
        """Chunk scores, layers joined. embeddings1: [B, L * size + 1]; embeddings2: [N, L * key_width] -> [B, N]."""
        logits = self.layer_logits(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2))
        return join_layers(logits, self.spec.shape.join)

    def save_spec(self, folder: Path) -> None:
        """Bring the saved indexer in `folder` up to date with `spec`: all but the weights."""
        (path,) = folder.rglob(QueryEncoder.config_file_name)
        write_atomically(path, lambda file: file.write_text(self.spec.model_dump_json(indent=2)))
        self._create_model_card(str(folder))

    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        (Path(path) / "README.md").write_text(model_card(self.spec), encoding="utf-8")
