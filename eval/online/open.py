"""The session of a model's family."""

from transformers import PreTrainedModel

from eval.online.csa_session import CsaSession
from eval.online.session import Session
from indexer_train.spec import IndexerSpec


def open_session(model: PreTrainedModel, spec: IndexerSpec) -> Session:
    """A new session of `model`, for an indexer of `spec`."""
    if model.config.model_type == "deepseek_v4":
        return CsaSession(model, spec.chunking, spec.layers)
    return Session(model, spec.chunking)
