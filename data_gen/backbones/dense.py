"""Any Hugging Face decoder with ordinary attention (Llama, Qwen, Gemma, Mistral ...) as a backbone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.observe import AttentionCall, attention_modules, context_of, observe
from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.fingerprint import fingerprint
from data_gen.core.keys import KeyPooler, flatten_heads, mean_pooled_scores
from data_gen.traces.labels import pooled_attention
from data_gen.traces.types import BackboneInfo, RawTrace, SparseAttention

TERMS: dict[str, Callable[[Any, Any], bool]] = {
    "sparse attention chosen by an indexer of its own (DSA)": lambda attention, _: (
        getattr(attention, "indexer", None) is not None or hasattr(attention, "skip_topk")
    ),
    "multi-head latent attention (MLA), whose cache holds no keys of heads": lambda attention, _: (
        hasattr(attention, "kv_a_proj_with_mqa") or hasattr(attention, "kv_b_proj")
    ),
    "differential attention": lambda attention, _: hasattr(attention, "lambda_q1"),
    "a mask that it learned (dynamic mask attention)": lambda attention, _: hasattr(attention, "dt_proj"),
    "partial rotary positions, which turn a part of each head outside of apply_rotary_pos_emb": lambda attention, _: (
        getattr(attention, "rotary_ndims", None) is not None
    ),
    "learned positions, which no key can be freed of": lambda attention, decoder: (
        hasattr(decoder, "embed_positions") or hasattr(decoder, "wpe")
    ),
    "a norm of keys without weight": lambda attention, _: (
        hasattr(attention, "k_norm") and getattr(attention.k_norm, "weight", None) is None
        and not isinstance(attention.k_norm, nn.Identity)
    ),
}  # fmt: skip
"""Parts of an attention block that this adapter cannot undo, by name: (attention, decoder) -> whether it has one."""


def refuse_terms(model: PreTrainedModel) -> None:
    """Raise InputError, which names the term, when attention has a part that the dense adapter does not know."""
    decoder: Any = model.get_decoder()
    for index, layer in enumerate(getattr(decoder, "layers", None) or []):
        for term, has in TERMS.items():
            if hasattr(layer, "self_attn") and has(layer.self_attn, decoder):
                raise InputError(f"{type(model).__name__} is not supported: layer {index} has {term}")


class DenseBackbone:
    """A decoder whose attention goes through the attention interface; hybrids contribute their full layers.

    chunk_tokens: None, any chunk will do. Raises InputError for attention that the adapter does not know.
    """

    chunk_tokens: int | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_terms(model)
        self.model = model.eval()
        self.modules = attention_modules(model)
        config = model.config.get_text_config(decoder=True)
        module = next(iter(self.modules.values()))
        head_dim = getattr(module, "head_dim", config.hidden_size // config.num_attention_heads)
        self.info = BackboneInfo(
            model_type=config.model_type,
            fingerprint=fingerprint(model.state_dict().items()),
            full_layers=sorted(self.modules),
            hidden=config.hidden_size,
            key_width=(config.num_key_value_heads or config.num_attention_heads) * head_dim,
            context=context_of(model),
        )

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the model."""
        if config.oracle != "attention":
            raise InputError(f"trace.oracle `{config.oracle}`: only DeepSeek-V4 has an indexer; use `attention`")
        if unknown := sorted(set(config.layers) - set(self.info.full_layers)):
            raise InputError(
                f"trace.layers: {unknown} are not full-attention layers; choose from {self.info.full_layers}"
            )

    @torch.no_grad()
    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, and keep the query tokens at `positions` ([T], ascending).

        Peak memory is that of the forward pass plus [T, N, layers]; attention is recomputed for the T query tokens
        only, in key tiles. Raises when the recomputed attention is not the model's own.
        """
        if len(tokens) > self.info.context:
            raise InputError(f"the document has {len(tokens)} tokens, the backbone's context is {self.info.context}")
        self.check(config)
        recorder = _Recorder(positions.to(self.model.device), config)
        with observe(self.model, recorder):
            self.model.get_decoder()(torch.tensor([tokens], device=self.model.device), use_cache=False)
        return recorder.finish()

    @torch.no_grad()
    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """Let the model write up to `config.own_tokens` tokens behind `prompt`, greedily, then trace those.

        Returns (prompt and written tokens, trace).
        """
        ids = torch.tensor([prompt], device=self.model.device)
        model: Any = self.model
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.own_tokens, do_sample=False
        )[0].tolist()
        positions = torch.arange(max(0, len(prompt) - config.answer_lead), len(tokens) - 1)
        return tokens, self.trace(tokens, positions, config)


class _Recorder:
    """Collects one document's trace, a layer at a time."""

    def __init__(self, positions: torch.Tensor, config: TraceConfig) -> None:
        self.positions = positions
        self.config = config
        self.visible = (positions + 1) // config.chunking.tokens
        self.hidden: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.mean: list[torch.Tensor] = []
        self.peak: list[torch.Tensor] = []
        self.mean_pooled: list[torch.Tensor] = []

    def __call__(self, call: AttentionCall) -> None:
        rows = self.positions
        query = call.query[0, :, rows]
        chunk_tokens = self.config.chunking.tokens
        chunks = call.key.shape[2] // chunk_tokens
        probability = pooled_attention(query, call.key[0], rows, chunk_tokens, call.scaling, call.softcap, call.sinks)[
            ..., :chunks
        ]
        keys = call.new_keys()[0]
        check_finite(call.hidden, f"layer {call.layer}")
        _check(call, keys, int(rows[-1]))
        self.mean.append(probability.mean(dim=0).cpu())
        self.peak.append(probability.amax(dim=0).cpu())
        pooler = KeyPooler(chunk_tokens)
        pooler.append(keys)
        content = call.unrotated(call.query[:, :, rows], rows)[0]
        self.mean_pooled.append(mean_pooled_scores(content, pooler.pooled, call.scaling, self.visible).cpu())
        if call.layer in self.config.layers:
            self.hidden[call.layer] = call.hidden[0, rows].to("cpu", torch.bfloat16)
            self.keys[call.layer] = _stored(flatten_heads(pooler.pooled), call.layer)

    def finish(self) -> RawTrace:
        mean, peak = torch.stack(self.mean, dim=-1), torch.stack(self.peak, dim=-1)
        visible = self.visible.cpu()
        return RawTrace(
            hidden=self.hidden,
            keys=self.keys,
            positions=self.positions.cpu(),
            oracle=SparseAttention.from_dense(mean, peak, visible, self.config.top_chunks),
            mean_pooled=torch.stack(self.mean_pooled).mean(dim=0).half(),
        )


def check_finite(hidden: torch.Tensor, where: str) -> None:
    """Raise InputError where hidden states are no numbers."""
    if not bool(torch.stack(hidden.aminmax()).isfinite().all()):
        raise InputError(
            f"{where}: the model's own hidden states are NaN or infinite; it is damaged, or its numbers do not fit the "
            "type that it was loaded in"
        )


def _stored(keys: torch.Tensor, layer: int) -> torch.Tensor:
    """Keys [N, d] fp32 as a trace stores them, fp16 on the CPU. Raises InputError where they do not fit."""
    largest = float(keys.abs().max()) if keys.numel() else 0.0
    if not largest <= torch.finfo(torch.float16).max:
        raise InputError(f"layer {layer}: its keys reach {largest:.3g}, more than the fp16 that traces store can hold")
    return keys.to("cpu", torch.float16)


def _check(call: AttentionCall, keys: torch.Tensor, row: int) -> None:
    """Raise unless attention and key recomputed from what the layer reported are the layer's own at `row`."""
    query = call.query[0, :, row : row + 1]
    position = torch.tensor([row], device=query.device)
    probability = pooled_attention(query, call.key[0], position, 1, call.scaling, call.softcap, call.sinks)
    value = call.value[0].float().repeat_interleave(query.shape[0] // call.value.shape[1], dim=0)
    output = call.output[0, row].float()  # [H, d]
    error = ((probability @ value)[:, 0] - output).norm() / output.norm().clamp_min(1e-6)
    limit = 1e-3 if call.query.dtype == torch.float32 else 3e-2
    if not error <= limit:
        raise InputError(
            f"layer {call.layer}: recomputed attention differs from the model's by {error:.1e} (limit {limit:.0e}); "
            "its attention has a term that the dense adapter does not know"
        )
    projection = getattr(call.module, "k_proj", None)
    if projection is None:  # one fused projection: there is nothing to compare with
        return
    key, norm = projection(call.hidden[:, row]), getattr(call.module, "k_norm", None)
    heads = (call.key.shape[1], call.key.shape[3])
    if norm is not None:  # over a head's width, or over all heads at once
        per_head = norm.weight.shape[-1] == heads[1]
        key = norm(key.unflatten(-1, heads)) if per_head else norm(key)
    own = key.reshape(*heads).float()
    error = (keys[:, row] - own).norm() / own.norm().clamp_min(1e-6)
    if not error <= limit:
        raise InputError(
            f"layer {call.layer}: keys before RoPE differ from the projection's by {error:.1e} (limit {limit:.0e}); "
            "it does not rotate keys the way the dense adapter undoes"
        )
