"""A random model with one token per character, made on the spot: the whole path in seconds, from nothing."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHARACTERS = 128
END = "\x03"


def tiny_backbone() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(a Llama of three layers, its tokenizer), the same on every call; its attention is sharp, its words are noise."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=ord(END),
    )
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(generator)
    raw = Tokenizer(models.WordLevel({chr(code): code for code in range(CHARACTERS)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return model, PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, unk_token="?")
