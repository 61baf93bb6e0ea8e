"""The host of a model's family."""

from transformers import PreTrainedModel

from eval.runtime.hosts.base import Host
from eval.runtime.hosts.deepseek_v4 import DeepseekV4Host
from eval.runtime.hosts.dense import DenseHost
from indexer_train.spec import IndexerSpec


def open_host(model: PreTrainedModel, spec: IndexerSpec, pageable: bool | None = None) -> Host:
    """A new batch of sequences of `model`, for an indexer of `spec`; pageable: as ColdPool's."""
    if model.config.model_type == "deepseek_v4":
        return DeepseekV4Host(model, spec.layers, pageable)
    return DenseHost(model, spec.chunking.tokens, spec.layers, pageable)
