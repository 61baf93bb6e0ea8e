"""Builds the stock DeepSeek-V4 class from the recipe, and opens, narrows or closes its sparse attention."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from recipes.pocket_v4 import attention
from recipes.pocket_v4.config import PocketConfig

OPEN = 1 << 30  # a top-k no document reaches: every visible entry


def build_model(config: PocketConfig, tokenizer: PreTrainedTokenizerFast) -> DeepseekV4ForCausalLM:
    """A freshly initialised model (seeded) whose vocabulary is the tokenizer's, using the `pocket` attention."""
    torch.manual_seed(config.seed)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
    settings = DeepseekV4Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        num_hidden_layers=len(config.model["layer_types"]),
        **special,
        **config.model,
    )
    return DeepseekV4ForCausalLM._from_config(
        settings, attn_implementation=attention.NAME, experts_implementation=attention.NAME
    )


def hardware(device: torch.device) -> str:
    """What a run ran on, for its records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def indexers(model: nn.Module) -> Iterator[DeepseekV4Indexer]:
    """The lightning indexers, in layer order."""
    return (module for module in model.modules() if isinstance(module, DeepseekV4Indexer))


def set_topk(model: nn.Module, topk: int) -> None:
    """Let every CSA layer see its indexer's `topk` best entries: OPEN for all of them, 0 to close CSA."""
    for indexer in indexers(model):
        indexer.index_topk = topk


def save_model(model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, bf16 weights and tokenizer, loadable with `from_pretrained`. `model` itself is not changed.

    Generation ends with the sentence: every answer does.
    """
    state = {name: tensor.detach().cpu().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = DeepseekV4ForCausalLM(model.config).bfloat16()
    copy.load_state_dict(state)
    copy.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(".")]
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
