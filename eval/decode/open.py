"""The session and the host of a model's family."""

from transformers import PreTrainedModel

from eval.decode.hosts.base import Host
from eval.decode.hosts.deepseek_v4 import DeepseekV4Host
from eval.decode.hosts.deepseek_v4_session import CsaSession
from eval.decode.hosts.dense import DenseHost
from eval.decode.session import Session
from indexer_train.spec import IndexerSpec


def open_session(model: PreTrainedModel, spec: IndexerSpec) -> Session:
    """A new session of `model`, for an indexer of `spec`."""
    if model.config.model_type == "deepseek_v4":
        return CsaSession(model, spec.chunking, spec.layers)
    return Session(model, spec.chunking)


def open_host(model: PreTrainedModel, spec: IndexerSpec, pageable: bool | None = None) -> Host:
    """A new batch of sequences of `model`, for an indexer of `spec`; pageable: as ColdPool's."""
    if model.config.model_type == "deepseek_v4":
        return DeepseekV4Host(model, spec.layers, pageable)
    return DenseHost(model, spec.chunking.tokens, spec.layers, pageable)
