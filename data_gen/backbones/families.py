"""Which attention family a model is of: what traces it, what hosts it and what decodes it are chosen by that."""

from typing import Literal

from transformers import PreTrainedModel

from data_gen.backbones.dsa_hooks import indexers

Family = Literal["deepseek_v4", "dsa", "dense"]
"""The keys of `ADAPTERS`, `HOSTS` and `SESSIONS`."""


def family_of(model: PreTrainedModel) -> Family:
    """DeepSeek-V4 by its type, DSA by the indexers of its layers; any other model is read as an ordinary decoder.

    Raises InputError for a model with indexers of another kind.
    """
    if model.config.model_type == "deepseek_v4":
        return "deepseek_v4"
    return "dsa" if indexers(model) else "dense"
