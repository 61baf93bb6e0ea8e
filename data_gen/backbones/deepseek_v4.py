"""DeepSeek-V4 as Hugging Face implements it (V4-Flash, V4-Pro or any config) as a backbone."""

import torch
from transformers import DynamicCache, PreTrainedModel

from data_gen.backbones.deepseek_v4_hooks import CSA, CsaCall, csa_layers, observe_csa
from data_gen.backbones.deepseek_v4_oracles import AttentionOracle, CsaOracle, IndexerOracle, count_near_ties
from data_gen.backbones.dense import fingerprint
from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys, hadamard
from data_gen.core.rope import Rope
from data_gen.core.tensors import tiled_scores
from data_gen.traces.types import BackboneInfo, NativeRow, RawTrace

PIECE_TOKENS, PIECE_TOKENS_CPU = 512, 192
"""Most tokens read at once. Of the tokens x (tokens + window) scores of a sliding window tokens x window are used: on a
CPU long pieces cost more by that than they save in calls."""
PIECE_ELEMENTS, PIECE_ELEMENTS_CPU = 1 << 28, 1 << 22
"""Most scores, tokens x heads x keys, of one layer in one piece (1 GiB in fp32; 16 MiB on a CPU, whose allocator keeps
freed blocks); the stock modules hold several such tensors at a time. Pieces shrink as the document grows."""
SAMPLED_ROWS = 3
"""Query tokens of each traced layer whose native logits are kept, as the release does."""


class DeepseekV4Backbone:
    """A causal LM with compressed sparse attention (CSA); layers are named by CSA ordinal."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.layers = csa_layers(model)
        config = model.config
        if not self.layers:
            raise InputError("the backbone has no compressed sparse attention layer: there is nothing to index")
        self.chunk_tokens = config.compress_rates[CSA]
        self.info = BackboneInfo(
            model_type=config.model_type,
            fingerprint=fingerprint(model),
            full_layers=list(range(len(self.layers))),
            hidden=config.hidden_size,
            key_width=config.index_head_dim,
            context=config.max_position_embeddings,
            key="fp8_rope_hadamard",
            rope=_rope(model, self.layers[0]),
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
        reader = _Reader(self, positions, config)
        reader.read(tokens)
        return reader.finish()

    @torch.no_grad()
    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """Read `prompt`, let the model write up to `config.own_tokens` tokens greedily, and trace those on the way.

        Returns (prompt and written tokens, trace): the trace that `trace` would give for these tokens, each of them
        read once; the query tokens start `config.answer_lead` before the prompt's end.
        """
        tokens = list(prompt)
        first, last = max(0, len(prompt) - config.answer_lead), len(prompt) + config.own_tokens - 1
        reader = _Reader(self, torch.arange(first, last), config)
        stop = self.model.generation_config.eos_token_id
        stops = stop if isinstance(stop, list) else [stop]
        unread = tokens
        for _ in range(config.own_tokens):
            state = reader.read(unread)
            unread = [int(self.model.get_output_embeddings()(state).argmax())]
            tokens = tokens + unread
            if unread[0] in stops:
                break
        return tokens, reader.finish()


class _Reader:
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
        layers = {layer: self.cache.layers[self.backbone.layers[layer]] for layer in self.config.layers}
        return RawTrace(
            hidden={layer: torch.cat(pieces) for layer, pieces in self.hidden.items()},
            keys={layer: encode_keys(hadamard(csa.compressed_kv["indexer"][0])).cpu() for layer, csa in layers.items()},
            positions=self.positions[self.positions < self.length],
            oracle=self.oracle.finish(),
            native=self.native,
            near_ties=self.near_ties,
        )


def piece_tokens(model: PreTrainedModel, length: int, sequences: int = 1) -> int:
    """How many tokens to read at once behind `length` so that no layer holds more than PIECE_ELEMENTS scores."""
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
    theirs = model.get_decoder().layers[layer].self_attn.compressor.indexer.rotary_emb
    same = torch.allclose(rope.frequencies(), theirs.compress_inv_freq.float().cpu(), rtol=1e-6, atol=0)
    if not same or theirs.compress_attention_scaling != 1.0:
        raise InputError(f"the backbone's RoPE is not its config's ({rope}); was it cast to bf16 after loading?")
    return rope
