"""Any Hugging Face decoder with ordinary attention (Llama, Qwen, Gemma, Mistral ...) as a backbone."""

from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from data_gen.backbones.layers import attention_modules, config_digest, context_of, decoder_of
from data_gen.backbones.observe import AttentionCall, observe, run_again
from data_gen.config import TraceConfig
from data_gen.core.entry_bytes import BF16
from data_gen.core.errors import InputError
from data_gen.core.fingerprint import fingerprint
from data_gen.core.keys import KeyKind, KeyPooler, flatten_heads, mean_pooled_scores
from data_gen.traces.labels import pooled_attention
from data_gen.traces.types import BackboneInfo, RawTrace, SparseAttention


class DenseBackbone:
    """A decoder whose attention goes through the attention interface; hybrids contribute their full layers.

    chunk_tokens: None, any chunk will do. Raises InputError for attention that the adapter does not know.
    """

    chunk_tokens: int | None = None
    key: KeyKind = "mean_pre_rope"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.modules = attention_modules(model)
        for layer, held in enumerate(DynamicCache(config=model.config).layers):
            if isinstance(held, DynamicLayer) and not held.is_sliding and layer not in self.modules:
                raise InputError(
                    f"{type(model).__name__}: layer {layer} keeps the whole history, but no adapter knows its attention"
                )
        config = model.config.get_text_config(decoder=True)
        full_layers, width, stored = self.widths
        self.info = BackboneInfo(
            model_type=config.model_type,
            fingerprint=fingerprint(model.state_dict().items()),
            full_layers=full_layers,
            hidden=config.hidden_size,
            key_width=width,
            context=context_of(model),
            config=config_digest(model),
            key=self.key,
            entry_bytes=stored,
        )

    @property
    def widths(self) -> tuple[list[int], int, int]:
        """(layers that can be traced, numbers of a chunk's key, `BackboneInfo.entry_bytes`)."""
        module: Any = next(iter(self.modules.values()))
        width = key_width(self.model, module)
        cached = width + module.qk_rope_head_dim if hasattr(module, "expand_kv") else 2 * width
        return sorted(self.modules), width, BF16 * cached * len(self.modules)

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the model."""
        self.check_layers(config)
        if config.oracle != "attention":
            raise InputError(f"trace.oracle `{config.oracle}`: the backbone has no indexer; use `attention`")

    def check_layers(self, config: TraceConfig) -> None:
        """Raise InputError for layers that cannot be traced."""
        if unknown := sorted(set(config.layers) - set(self.info.full_layers)):
            raise InputError(
                f"trace.layers: {unknown} are not full-attention layers; choose from {self.info.full_layers}"
            )

    @torch.no_grad()
    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, and keep the query tokens at `positions` ([T], ascending).

        Peak memory is that of the forward pass plus [T, N, layers]; attention is recomputed for the T query tokens
        only, a few at a time. Raises when the recomputed attention is not the model's own.
        """
        if len(tokens) > self.info.context:
            raise InputError(f"the document has {len(tokens)} tokens, the backbone's context is {self.info.context}")
        self.check(config)
        return self._record(tokens, _Recorder(positions.to(self.model.device), config))

    @torch.no_grad()
    def probe(self, tokens: list[int], config: TraceConfig) -> None:
        """Trace the last of a few tokens. Raises InputError unless positions can be taken out of every key."""
        self._record(tokens, _Recorder(torch.tensor([len(tokens) - 1], device=self.model.device), config, probing=True))
        entered: list[torch.Tensor] = []
        thread = get_ident()

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if get_ident() == thread:  # the model may be in use in others
                entered.append(args[0] if args else kwargs["hidden_states"])

        hook = decoder_of(self.model).layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            decoder_of(self.model)(torch.tensor([tokens[:1] * len(tokens)], device=self.model.device), use_cache=False)
        finally:
            hook.remove()
        if not _alike(entered[0][0], entered[0][0, :1]):
            raise InputError(
                "positions are added to its token embeddings, so keys without positions cannot be computed"
            )

    def _record(self, tokens: list[int], recorder: "_Recorder") -> RawTrace:
        with observe(self.model, recorder):
            decoder_of(self.model)(torch.tensor([tokens], device=self.model.device), use_cache=False)
        if unseen := sorted(set(self.modules) - recorder.seen):
            raise InputError(f"layers {unseen}: their attention does not go through transformers' attention interface")
        return recorder.finish()

    @torch.no_grad()
    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """Let the model write up to `config.own_tokens` tokens after `prompt`, greedily, then trace those.

        Returns (prompt and written tokens, trace).
        """
        ids = torch.tensor([prompt], device=self.model.device)
        model: Any = self.model
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.own_tokens, do_sample=False
        )[0].tolist()
        positions = torch.arange(max(0, len(prompt) - config.answer_lead), len(tokens) - 1)
        return tokens, self.trace(tokens, positions, config)


def key_width(model: PreTrainedModel, module: Any) -> int:
    """Numbers of a chunk's key: those of what a layer caches first of a token, all heads of them."""
    if (latent := getattr(module, "kv_lora_rank", None)) is not None:
        return latent
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads * getattr(module, "head_dim", config.hidden_size // config.num_attention_heads)


def content_keys(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    """Keys of heads before RoPE of pooled chunks, [KV, N, d] fp32; pooled: [KV, N, c], what a layer caches, averaged.

    Of MLA, whose heads make their keys of the latent by a linear map: the map of the mean is the mean. The part that
    turns with the position is left at zero.
    """
    if not hasattr(module, "expand_kv"):
        return pooled
    latent = pooled[None].to(module.kv_b_proj.weight.dtype)
    still = latent.new_zeros(*latent.shape[:3], module.qk_rope_head_dim)
    return module.expand_kv(latent, still)[0][0].float()


class _Recorder:
    """Collects one document's trace, a layer at a time. probing: checks what only a few tokens are cheap for."""

    def __init__(self, positions: torch.Tensor, config: TraceConfig, probing: bool = False) -> None:
        self.positions = positions
        self.config, self.probing = config, probing
        self.seen: set[int] = set()
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
        check_finite(call.hidden, f"layer {call.layer}")
        check_attention(call, int(rows[-1]))
        if self.probing:
            _check_content(call)
        content = call.content()
        assert content.query is not None
        self.seen.add(call.layer)
        self.mean.append(probability.mean(dim=0).cpu())
        self.peak.append(probability.amax(dim=0).cpu())
        pooler = KeyPooler(chunk_tokens)
        pooler.append(content.cached[0])
        keys = content_keys(call.module, pooler.pooled)
        self.mean_pooled.append(mean_pooled_scores(content.query[0, :, rows], keys, call.scaling, self.visible).cpu())
        if call.layer in self.config.layers:
            self.hidden[call.layer] = call.hidden[0, rows].to("cpu", torch.bfloat16)
            self.keys[call.layer] = stored_keys(flatten_heads(pooler.pooled), call.layer)

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
    """Raise InputError where hidden states, of any shape, are not numbers."""
    if not bool(torch.stack(hidden.aminmax()).isfinite().all()):
        raise InputError(
            f"{where}: the model's own hidden states are NaN or infinite; its weights are damaged, or do not fit the "
            "dtype that they were loaded in"
        )


def stored_keys(keys: torch.Tensor, layer: int) -> torch.Tensor:
    """Keys [N, d] fp32 as a trace stores them, fp16 on the CPU. Raises InputError where they do not fit."""
    largest = float(keys.abs().max()) if keys.numel() else 0.0
    if not largest <= torch.finfo(torch.float16).max:
        raise InputError(
            f"layer {layer}: its keys reach {largest:.3g}, more than fp16 can hold, in which traces store keys"
        )
    return keys.to("cpu", torch.float16)


def check_attention(call: AttentionCall, row: int, past: int = 0, seen: torch.Tensor | None = None) -> None:
    """Raise unless attention recomputed from what the layer reported is the layer's own at `row` of the new tokens.

    past: tokens read before; seen: [1, T] bool, the keys attended to where not all are.
    """
    query = call.query[0, :, row : row + 1]
    position = torch.tensor([past + row], device=query.device)
    probability = pooled_attention(query, call.key[0], position, 1, call.scaling, call.softcap, call.sinks, seen)
    value = call.value[0].float().repeat_interleave(query.shape[0] // call.value.shape[1], dim=0)
    output = call.output[0, row].float()  # [H, d]
    error = ((probability @ value)[:, 0] - output).norm() / output.norm().clamp_min(1e-6)
    limit = _limit(call.query)
    if not error <= limit:
        raise InputError(
            f"layer {call.layer}: recomputed attention differs from the model's by {error:.1e} (limit {limit:.0e}); "
            "its attention has a term that the dense adapter does not know"
        )


def _check_content(call: AttentionCall) -> None:
    """Raise unless the block, run again, makes the same keys, and keys that say nothing of positions before RoPE."""
    again = run_again(call, call.hidden, turned=True)
    if again.key is None or again.key.shape != call.key.shape or not _alike(again.key, call.key):
        raise InputError(f"layer {call.layer}: a second run on the same hidden states gives other keys")
    same = run_again(call, call.hidden[:, -1:].expand_as(call.hidden), turned=False)
    if not _alike(same.cached, same.cached[:, :, :1]):
        raise InputError(
            f"layer {call.layer}: its keys depend on the position even where rotary tables do not rotate them"
        )


def _limit(states: torch.Tensor) -> float:
    return 1e-3 if states.dtype == torch.float32 else 3e-2


def _alike(states: torch.Tensor, others: torch.Tensor) -> bool:
    return bool((states - others).float().norm() <= _limit(states) * states.float().norm().clamp_min(1e-6))
