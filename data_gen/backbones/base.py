"""What every backbone adapter offers to the generate step."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from data_gen.config import TraceConfig
from data_gen.traces.types import BackboneInfo, RawTrace


class Backbone(Protocol):
    """A frozen LLM that can be traced."""

    model: PreTrainedModel
    info: BackboneInfo

    def check(self, config: TraceConfig) -> None:
        """Raise InputError unless the settings fit the backbone: its layers, its oracles, its chunks."""
        ...

    def trace(self, tokens: list[int], positions: torch.Tensor, config: TraceConfig) -> RawTrace:
        """Read a document once, teacher-forced, and keep the query tokens at `positions`."""
        ...

    def trace_own(self, prompt: list[int], config: TraceConfig) -> tuple[list[int], RawTrace]:
        """On-policy: let the model write up to `config.own_tokens` tokens behind `prompt`, greedily, and trace those.

        Returns (prompt and written tokens, trace); the query tokens start `config.answer_lead` before the prompt's end
        and leave out the last token, which answers none.
        """
        ...
