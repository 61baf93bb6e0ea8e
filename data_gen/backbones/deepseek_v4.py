"""DeepSeek-V4 as Hugging Face implements it (V4-Flash, V4-Pro or any config) as a backbone."""

from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from data_gen.backbones.deepseek_v4_hooks import CSA, CsaCall, csa_attention, csa_layers, observe_csa
from data_gen.backbones.dense import check_finite
from data_gen.backbones.layers import config_digest, context_of
from data_gen.config import TraceConfig
from data_gen.core.entry_bytes import compressed_bytes, index_key_bytes
from data_gen.core.errors import InputError
from data_gen.core.fingerprint import fingerprint
from data_gen.core.key_bytes import encode_keys, hadamard
from data_gen.core.rope import Rope
from data_gen.core.tensors import tiled_scores
from data_gen.traces.labels import native_picks
from data_gen.traces.types import BackboneInfo, GoldenChunks, NativeRow, RawTrace, SparseAttention

PIECE_TOKENS, PIECE_TOKENS_CPU = 512, 192
"""Most tokens read at once. Of the tokens x (tokens + window) scores of a sliding window tokens x window are used: on a
CPU long pieces cost more by that than they save in calls."""
PIECE_ELEMENTS, PIECE_ELEMENTS_CPU = 1 << 28, 1 << 22
"""Most scores, tokens x heads x keys, of one layer in one piece (1 GiB in fp32; 16 MiB on a CPU, whose allocator keeps
freed blocks); the stock modules hold several such tensors at a time. Pieces shrink as the document grows."""
SAMPLED_ROWS = 3
"""Query tokens of each traced layer whose native logits are kept, as the release does."""
NEAR = 1e-4
"""Scores closer than this share of a row's largest are a tie that rounding may break either way."""


class DeepseekV4Backbone:
    """A causal LM with compressed sparse attention (CSA); layers are named by CSA ordinal.

    Raises InputError for a model without a CSA layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.layers = csa_layers(model)
        config = model.config
        if not self.layers:
            raise InputError("the backbone has no compressed sparse attention layer: there is nothing to index")
        self.chunk_tokens: int = config.compress_rates[CSA]
        entry = compressed_bytes(config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim)
        self.info = BackboneInfo(
            model_type=config.model_type,
            fingerprint=fingerprint(model.state_dict().items()),
            full_layers=list(range(len(self.layers))),
            hidden=config.hidden_size,
            key_width=config.index_head_dim,
            context=context_of(model),
            config=config_digest(model),
            key="fp8_rope_hadamard",
            rope=_rope(model, self.layers[0]),
            entry_bytes=len(self.layers) * (index_key_bytes(config.index_head_dim) + entry),
        )

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the model."""
        layers = self.info.full_layers
        if unknown := sorted(set(config.layers) - set(layers)):
            raise InputError(f"trace.layers: {unknown} are not among the {len(layers)} CSA layers (from 0)")
        if config.chunking.tokens != self.chunk_tokens:
            raise InputError(f"trace.chunking.tokens must be {self.chunk_tokens}, the backbone's compression rate")
        if config.oracle == "indexer" and config.votes > len(layers):
            raise InputError(
                f"trace.votes: {config.votes} CSA layers have to agree, but the backbone has {len(layers)}; "
                "ask for fewer, or use oracle `attention`"
            )

    @torch.no_grad()
    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, in cached pieces, and keep the query tokens at `positions`.

        positions: [T], ascending. Memory beside the model and its cache is that of one piece, whatever the length.
        Raises InputError when the document is too long, `config` does not fit the backbone, or the recomputed top-k is
        not the model's own.
        """
        reader = _EntryReader(self, positions, config)
        reader.read(tokens)
        return reader.finish()

    def probe(self, tokens: list[int], config: TraceConfig) -> None:
        """Trace the last ones of a few tokens, with all that tracing checks."""
        self.trace(tokens, torch.arange(len(tokens) - 2, len(tokens)), config)

    @torch.no_grad()
    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """Read `prompt`, let the model write up to `config.own_tokens` tokens greedily, and trace those on the way.

        Returns (prompt and written tokens, trace): the trace that `trace` would give for these tokens, each of them
        read once; the query tokens start `config.answer_lead` before the prompt's end.
        """
        tokens = list(prompt)
        first, last = max(0, len(prompt) - config.answer_lead), len(prompt) + config.own_tokens - 1
        reader = _EntryReader(self, torch.arange(first, last), config)
        stop = self.model.generation_config.eos_token_id
        stops = stop if isinstance(stop, list) else [stop]
        unread = tokens
        head: Any = self.model.get_output_embeddings()
        for _ in range(config.own_tokens):
            state = reader.read(unread)
            unread = [int(head(state).argmax())]
            tokens = tokens + unread
            if unread[0] in stops:
                break
        return tokens, reader.finish()


class _EntryReader:
    """Reads one document piece by piece and keeps its trace."""

    def __init__(self, backbone: DeepseekV4Backbone, positions: torch.Tensor, config: TraceConfig) -> None:
        self.backbone, self.config, self.positions = backbone, config, positions
        backbone.check(config)
        self.model = backbone.model
        self.cache = DynamicCache(config=self.model.config)
        self.length = 0
        self.rows = torch.empty(0, dtype=torch.int64)
        self.oracle: CsaOracle = (
            IndexerOracle(self.model.config.index_topk, config.votes)
            if config.oracle == "indexer"
            else AttentionOracle(config.top_chunks)
        )
        self.hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in config.layers}
        self.native: dict[tuple[int, int], NativeRow] = {}
        self.near_ties = 0

    def read(self, tokens: list[int]) -> torch.Tensor:
        """Read the next tokens; returns the last one's final hidden state [hidden]."""
        if self.length + len(tokens) > self.backbone.info.context:
            raise InputError(
                f"the document has {self.length + len(tokens)} tokens, the backbone's context is "
                f"{self.backbone.info.context}"
            )
        start = 0
        with observe_csa(self.model, self._keep):
            while start < len(tokens):
                piece = tokens[start : start + piece_tokens(self.model, self.length)]
                self.rows = self._traced(len(piece))
                ids = torch.tensor([piece], device=self.model.device)
                states = self.model.get_decoder()(ids, past_key_values=self.cache, use_cache=True).last_hidden_state
                self.oracle.end_piece()
                self.length += len(piece)
                start += len(piece)
        return states[0, -1]

    def _traced(self, tokens: int) -> torch.Tensor:
        """Rows of the next `tokens` tokens that are query tokens."""
        first, last = torch.searchsorted(self.positions, torch.tensor([self.length, self.length + tokens])).tolist()
        return self.positions[first:last] - self.length

    def _keep(self, call: CsaCall) -> None:
        if not len(self.rows):
            return
        check_finite(call.hidden, f"CSA layer {call.ordinal}")
        rows = self.rows.to(call.hidden.device)
        visible = (rows + self.length + 1) // self.backbone.chunk_tokens
        query, weights, picks = call.query[rows], call.weights[rows], call.picks[rows]
        scores = tiled_scores(query, weights, call.keys)
        self.near_ties += count_near_ties(scores, visible, picks, where=f"CSA layer {call.ordinal}")
        self.oracle.add(scores, visible, picks, call.attention[:, rows])
        if call.ordinal not in self.hidden:
            return
        done = sum(map(len, self.hidden[call.ordinal]))
        for row in range(min(SAMPLED_ROWS - done, len(rows))):
            self.native[call.ordinal, done + row] = NativeRow(
                scores[row, : visible[row]].clone().cpu(), hadamard(query[row]).cpu(), weights[row].clone().cpu()
            )
        self.hidden[call.ordinal].append(call.hidden[rows].to("cpu", torch.bfloat16))

    def finish(self) -> RawTrace:
        """The trace of all that was read."""
        layers: dict[int, Any] = {layer: self.cache.layers[self.backbone.layers[layer]] for layer in self.config.layers}
        return RawTrace(
            hidden={layer: torch.cat(pieces) for layer, pieces in self.hidden.items()},
            keys={layer: encode_keys(hadamard(csa.compressed_kv["indexer"][0])).cpu() for layer, csa in layers.items()},
            positions=self.positions[self.positions < self.length],
            oracle=self.oracle.finish(),
            native=self.native,
            near_ties=self.near_ties,
        )


def piece_tokens(model: PreTrainedModel, length: int, sequences: int = 1) -> int:
    """How many tokens to read at once after `length` so that no layer holds more than PIECE_ELEMENTS scores."""
    config = model.config
    heads = max(config.num_attention_heads, config.index_n_heads)
    on_cpu = model.device.type == "cpu"
    most, elements = (PIECE_TOKENS_CPU, PIECE_ELEMENTS_CPU) if on_cpu else (PIECE_TOKENS, PIECE_ELEMENTS)
    keys = (length + most) // min(config.compress_rates.values()) + most + config.sliding_window
    return max(1, min(most, elements // (sequences * heads * keys)))


def _rope(model: PreTrainedModel, layer: int) -> Rope:
    """The rotation of indexer queries and keys. Raises InputError unless it is the model's own."""
    config = model.config
    rope = Rope.from_parameters(
        config.rope_parameters["compress"], config.qk_rope_head_dim, config.max_position_embeddings
    )
    theirs = csa_attention(model, layer).compressor.indexer.rotary_emb
    same = torch.allclose(rope.frequencies(), theirs.compress_inv_freq.float().cpu(), rtol=1e-6, atol=0)
    if not same or theirs.compress_attention_scaling != 1.0:
        raise InputError(f"the backbone's RoPE differs from its config ({rope}); was it cast to bf16 after loading?")
    return rope


class CsaOracle(Protocol):
    """Collects one document; R query tokens and N chunks so far in a piece."""

    def add(self, scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, attention: torch.Tensor) -> None:
        """One layer of the current piece.

        scores: [R, N] native logits; visible: [R] chunks; picks: [R, k], -1 for none; attention: [heads, R, N].
        """
        ...

    def end_piece(self) -> None:
        """All CSA layers of the piece were added."""
        ...

    def finish(self) -> GoldenChunks | SparseAttention:
        """The whole document."""
        ...


class IndexerOracle(CsaOracle):
    """The release's labels: votes of the native indexers."""

    def __init__(self, top_k: int, votes: int) -> None:
        self.top_k, self.least = top_k, votes
        self.votes: torch.Tensor | None = None
        self.pieces: list[GoldenChunks] = []

    def add(self, scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, attention: torch.Tensor) -> None:
        picked = native_picks(scores, visible, self.top_k).to(torch.int16)
        self.votes = picked if self.votes is None else self.votes + picked.to(self.votes.device)

    def end_piece(self) -> None:
        if self.votes is not None:
            self.pieces.append(GoldenChunks.from_votes(self.votes, self.least))
        self.votes = None

    def finish(self) -> GoldenChunks:
        return GoldenChunks.concatenate(self.pieces)


class AttentionOracle(CsaOracle):
    """Core attention probabilities, which are zero but for each layer's picks: kept sparse throughout.

    top: chunks kept of each query token, by head-maximum probability averaged over layers.
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self.layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.chunks = 0
        self.pieces: list[SparseAttention] = []

    def add(self, scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, attention: torch.Tensor) -> None:
        self.chunks = scores.shape[1]
        index = picks.clamp_min(0)
        probability = attention.gather(2, index.expand(len(attention), -1, -1)).float() * (picks >= 0)
        first = self.layers[0][0].device if self.layers else index.device  # layers may lie on several
        self.layers.append((index.to(first), probability.mean(dim=0).to(first), probability.amax(dim=0).to(first)))

    def end_piece(self) -> None:
        if self.layers:
            self.pieces.append(self._piece())
        self.layers = []

    def _piece(self) -> SparseAttention:
        rows = len(self.layers[0][0])
        ranking = torch.zeros(rows, self.chunks, device=self.layers[0][0].device)
        for index, _, peak in self.layers:
            ranking.scatter_add_(1, index, peak)
        best = ranking.topk(min(self.top, self.chunks), dim=1)
        kept = torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, best.indices, best.values > 0)
        row, chunk = kept.nonzero(as_tuple=True)
        slot = torch.full_like(ranking, -1, dtype=torch.int64)
        slot[row, chunk] = torch.arange(len(row), device=row.device)
        means, peaks = torch.zeros(2, len(row), len(self.layers), device=row.device)
        total = torch.zeros(rows, device=row.device)
        for layer, (index, mean, peak) in enumerate(self.layers):
            target = slot.gather(1, index)
            found = (target >= 0) & (peak > 0)
            means[target[found], layer], peaks[target[found], layer] = mean[found], peak[found]
            total += mean.sum(dim=1) / len(self.layers)
        stored = torch.zeros_like(total).index_add_(0, row, means.mean(dim=1))
        pointers = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0))
        return SparseAttention(
            pointers.cpu(),
            chunk.to("cpu", torch.int32),
            means.half().cpu(),
            peaks.half().cpu(),
            (total - stored).clamp_min(0).cpu(),
        )

    def finish(self) -> SparseAttention:
        return SparseAttention.concatenate(self.pieces)


def count_near_ties(scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, where: str) -> int:
    """Rows whose recomputed top-k differs from the backbone's own picks by ties at the cut alone.

    scores: [R, N] recomputed; visible: [R]; picks: [R, k], -1 for none. Raises InputError on any other difference:
    then the indexer computes something that the tracer does not know, and every label would be wrong.
    """
    rows, chunks = scores.shape
    if not chunks:
        return 0
    seen = torch.arange(chunks, device=scores.device) < visible[:, None]
    theirs = torch.zeros(rows, chunks + 1, dtype=torch.bool, device=scores.device)
    theirs = theirs.scatter_(1, torch.where(picks >= 0, picks, chunks), True)[:, :chunks]
    best = scores.masked_fill(~seen, -torch.inf).topk(min(picks.shape[1], chunks), dim=1)
    ours = torch.zeros_like(theirs).scatter_(1, best.indices, True) & seen
    cut = best.values.masked_fill(best.values == -torch.inf, torch.inf).amin(dim=1, keepdim=True)
    near = NEAR * scores.abs().masked_fill(~seen, 0).amax(dim=1, keepdim=True)
    differ = ours ^ theirs
    wrong = (differ & ~((scores - cut).abs() <= near)).any(dim=1) | (ours.sum(dim=1) != theirs.sum(dim=1))
    if bool(wrong.any()):
        raise InputError(
            f"{where}: the recomputed top-{picks.shape[1]} differs from the backbone's own picks at {int(wrong.sum())} "
            "tokens; its indexer has a term that the tracer does not know"
        )
    return int(differ.any(dim=1).sum())
