"""DeepSeek sparse attention as Hugging Face implements it (DeepSeek-V3.2, GLM-5 and their relatives) as a backbone."""

from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from data_gen.backbones.deepseek_v4 import count_near_ties
from data_gen.backbones.dense import DenseBackbone, check_attention, check_finite, stored_keys
from data_gen.backbones.dsa_hooks import IndexCall, indexers, observe_indexers
from data_gen.backbones.layers import decoder_of
from data_gen.backbones.observe import AttentionCall, observe
from data_gen.config import TraceConfig
from data_gen.core.entry_bytes import index_key_bytes, latent_bytes
from data_gen.core.errors import InputError
from data_gen.core.keys import KeyKind, KeyPooler
from data_gen.core.tensors import tiled_scores
from data_gen.traces.labels import native_picks, pooled_attention
from data_gen.traces.types import GoldenChunks, RawTrace, SparseAttention

PIECE_TOKENS = 512
"""Most tokens read at once."""
PIECE_ELEMENTS, PIECE_ELEMENTS_CPU = 1 << 28, 1 << 23
"""Most scores, tokens x heads x keys, of one layer in one piece; the stock modules hold several such tensors."""


class DsaBackbone(DenseBackbone):
    """A decoder whose layers attend to the tokens that lightning indexers pick.

    Layers are those with an indexer of their own; others take the picks of the one before. Keys are index keys before
    RoPE, averaged over a chunk. Raises InputError for an indexer of another kind.
    """

    key: KeyKind = "mean_index_key"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.indexers = indexers(model)

    @property
    def widths(self) -> tuple[list[int], int, int]:
        found = indexers(self.model)
        layer, indexer = next(iter(found.items()))
        module, index_key = cast(Any, self.modules[layer]), cast(Any, indexer).head_dim
        latents = len(self.modules) * latent_bytes(module.kv_lora_rank, module.qk_rope_head_dim)
        return sorted(found), index_key, latents + len(found) * index_key_bytes(index_key)

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the model."""
        self.check_layers(config)
        if config.oracle == "indexer" and config.votes > len(self.indexers):
            raise InputError(
                f"trace.votes: {config.votes} layers have to agree, but {len(self.indexers)} have an indexer; ask for "
                "fewer, or use oracle `attention`"
            )

    def probe(self, tokens: list[int], config: TraceConfig) -> None:
        """Trace the last ones of a few tokens, with all that tracing checks."""
        self.trace(tokens, torch.arange(len(tokens) - 2, len(tokens)), config)

    @torch.no_grad()
    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, in cached pieces, and keep the query tokens at `positions`.

        positions: [T], ascending. Raises InputError when the document is too long, `config` does not fit the backbone,
        the recomputed top-k is not the indexers' own, or the recomputed attention not the model's.
        """
        if len(tokens) > self.info.context:
            raise InputError(f"the document has {len(tokens)} tokens, the backbone's context is {self.info.context}")
        self.check(config)
        reader = _TokenReader(self, positions, config)
        with observe_indexers(self.model, self.indexers) as reader.calls, observe(self.model, reader.keep):
            while reader.length < len(tokens):
                reader.read(tokens[reader.length :][: piece_tokens(self.model, reader.length)])
        return reader.finish()


def piece_tokens(model: PreTrainedModel, length: int, sequences: int = 1) -> int:
    """How many tokens to read at once after `length` so that no layer holds more than PIECE_ELEMENTS scores."""
    config = model.config.get_text_config(decoder=True)
    # Of several sequences the stock indexer copies its keys for every row.
    heads = max(config.num_attention_heads, config.index_n_heads, config.index_head_dim if sequences > 1 else 0)
    elements = PIECE_ELEMENTS_CPU if model.device.type == "cpu" else PIECE_ELEMENTS
    return max(1, min(PIECE_TOKENS, elements // (sequences * heads * (length + PIECE_TOKENS))))


class _TokenReader:
    """Reads one document piece by piece and keeps its trace. calls: the indexers' newest, by layer."""

    calls: dict[int, IndexCall]

    def __init__(self, backbone: DsaBackbone, positions: torch.Tensor, config: TraceConfig) -> None:
        self.backbone, self.config, self.positions = backbone, config, positions
        self.model = backbone.model
        self.cache = DynamicCache(config=self.model.config)
        self.length, self.near_ties = 0, 0
        self.rows = torch.empty(0, dtype=torch.int64)
        self.hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in config.layers}
        self.keys = {layer: KeyPooler(config.chunking.tokens) for layer in config.layers}
        self.mean: list[torch.Tensor] = []
        self.peak: list[torch.Tensor] = []
        self.votes: list[torch.Tensor] = []
        self.pieces: list[Any] = []

    def read(self, tokens: list[int]) -> None:
        """Read the next tokens."""
        device = self.model.device
        first, last = torch.searchsorted(
            self.positions, torch.tensor([self.length, self.length + len(tokens)])
        ).tolist()
        self.rows = (self.positions[first:last] - self.length).to(device)
        decoder_of(self.model)(torch.tensor([tokens], device=device), past_key_values=self.cache, use_cache=True)
        self.length += len(tokens)
        if not len(self.rows):
            return
        if self.config.oracle == "indexer":
            self.pieces.append(GoldenChunks.from_votes(sum(self.votes[1:], self.votes[0]), self.config.votes))
        else:
            visible = (self.positions[first:last] + 1) // self.config.chunking.tokens
            mean, peak = torch.stack(self.mean, dim=-1), torch.stack(self.peak, dim=-1)
            self.pieces.append(SparseAttention.from_dense(mean, peak, visible, self.config.top_chunks))
        self.mean, self.peak, self.votes = [], [], []

    def keep(self, call: AttentionCall) -> None:
        """One layer of the piece at work."""
        if call.layer not in self.backbone.indexers:
            return
        index, rows, past = self.calls.pop(call.layer), self.rows, self.length
        if call.layer in self.keys:
            self.keys[call.layer].append(index.content[:, None][0])
        if not len(rows):
            return
        check_finite(call.hidden, f"layer {call.layer}")
        cached: Any = self.cache.layers[call.layer]
        keys = cached.indexer_keys[0]
        query = index.turned(keys[None, past:])[0, rows]
        positions = rows + past
        picks = index.picks[0, rows].long()
        picks = picks.masked_fill(picks > positions[:, None], -1)
        scores = tiled_scores(query, index.weights[0, rows], keys)
        self.near_ties += count_near_ties(scores, positions + 1, picks, where=f"layer {call.layer}")
        seen = torch.zeros(len(rows), len(keys) + 1, dtype=torch.bool, device=keys.device)
        seen = seen.scatter_(1, torch.where(picks >= 0, picks, len(keys)), True)[:, :-1]
        check_attention(call, int(rows[-1]), past, seen[-1:])
        chunk_tokens, chunks = self.config.chunking.tokens, len(keys) // self.config.chunking.tokens
        if self.config.oracle == "indexer":
            found = native_picks(scores, positions + 1, index.picks.shape[-1])[:, : chunks * chunk_tokens]
            found = found.unflatten(1, (chunks, chunk_tokens)).any(dim=2)
            complete = torch.arange(chunks, device=found.device) < ((positions + 1) // chunk_tokens)[:, None]
            self.votes.append((found & complete).to("cpu", torch.int16))
        else:
            probability = pooled_attention(
                call.query[0, :, rows],
                call.key[0],
                positions,
                chunk_tokens,
                call.scaling,
                call.softcap,
                call.sinks,
                seen,
            )[..., :chunks]
            self.mean.append(probability.mean(dim=0).cpu())
            self.peak.append(probability.amax(dim=0).cpu())
        if call.layer in self.hidden:
            self.hidden[call.layer].append(call.hidden[0, rows].to("cpu", torch.bfloat16))

    def finish(self) -> RawTrace:
        """The trace of all that was read."""
        kind = GoldenChunks if self.config.oracle == "indexer" else SparseAttention
        return RawTrace(
            hidden={layer: torch.cat(pieces) for layer, pieces in self.hidden.items()},
            keys={layer: stored_keys(pooler.pooled[0], layer) for layer, pooler in self.keys.items()},
            positions=self.positions,
            oracle=kind.concatenate(self.pieces),
            near_ties=self.near_ties,
        )
