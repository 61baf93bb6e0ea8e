"""What a pocket model of one architecture brings along, and how any of them is built, opened and closed, and saved."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipes.pocket.config import PocketConfig
from recipes.pocket.reading import Probe

OPEN = 1 << 30  # a top-k no document reaches: every visible entry

Model = Any
"""A model of a family's stock class."""


@dataclass(frozen=True)
class PocketFamily:
    """One architecture. An entry is what an indexer picks: a compressed one, or a token.

    name: of its folder in recipes; title: of the card; causal_lm, indexer: stock classes; implementations: of attention
    (and experts), equal to the stock ones in numbers; mask: batch, length, device -> what the model takes as
    `attention_mask`; probe: reads and trains the indexers; entry_tokens: config -> tokens of an entry; prepare: makes a
    built or loaded model ready for batches, in place; shape: config.json -> what the card says of it; target: and of
    what its indexers learn; closed: what is left without sparse attention, None where nothing is.
    """

    name: str
    title: str
    causal_lm: type[PreTrainedModel]
    indexer: type[nn.Module]
    implementations: dict[str, str]
    mask: Callable[[int, int, torch.device], dict[str, Tensor]]
    probe: Callable[[nn.Module, int, float, Tensor], Probe]
    entry_tokens: Callable[[Any], int]
    shape: Callable[[dict[str, Any]], str]
    target: str
    closed: str | None
    prepare: Callable[[Model], None] = lambda model: None

    def build(self, config: PocketConfig, tokenizer: PreTrainedTokenizerFast) -> Model:
        """A freshly initialised model (seeded) whose vocabulary is the tokenizer's."""
        torch.manual_seed(config.seed)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings: dict[str, Any] = {name: getattr(tokenizer, name) for name in names} | config.model
        if "layer_types" in config.model:
            settings["num_hidden_layers"] = len(config.model["layer_types"])
        made: Any = self.causal_lm
        model = made._from_config(
            made.config_class(vocab_size=-(-len(tokenizer) // 64) * 64, **settings), **self.implementations
        )
        self.prepare(model)
        return model

    def load(self, folder: Path) -> Model:
        """A saved model in fp32."""
        made: Any = self.causal_lm
        model = made.from_pretrained(folder, dtype=torch.float32, **self.implementations)
        self.prepare(model)
        return model

    def indexers(self, model: nn.Module) -> Iterator[Any]:
        """The lightning indexers, in layer order."""
        return (module for module in model.modules() if isinstance(module, self.indexer))

    def set_topk(self, model: nn.Module, topk: int) -> None:
        """Let every indexer show its `topk` best entries: OPEN for all of them, 0 to close sparse attention."""
        for indexer in self.indexers(model):
            indexer.index_topk = topk

    def logits(self, model: Model, tokens: Tensor) -> Tensor:
        """tokens: [B, L] -> [B, L, vocabulary]; bf16 inside where they lie on a GPU."""
        mask = self.mask(len(tokens), tokens.shape[1], tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda, cache_enabled=False):
            return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    def save(self, model: Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        """Write config, bf16 weights and tokenizer, loadable with `from_pretrained`. `model` itself is not changed.

        Generation ends with the sentence: every answer does.
        """
        state = {name: tensor.detach().cpu().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        made: Any = self.causal_lm
        copy = made(model.config).bfloat16()
        copy.load_state_dict(state)
        copy.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(".")]
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def hardware(device: torch.device) -> str:
    """What a run ran on, for its records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
