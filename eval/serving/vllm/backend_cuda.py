"""The same around vLLM's backends for GPUs, under the name CUSTOM that `--attention-backend` knows for others'."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadataBuilder

from eval.serving.vllm.backend import SparseTables, with_memory


class LookaheadFlashBuilder(SparseTables, FlashAttentionMetadataBuilder):
    """The stock FlashAttention builder, given shorter tables; it plans the work of a step from their lengths."""

    persistent = True


class LookaheadTritonBuilder(SparseTables, TritonAttentionMetadataBuilder):
    """The stock Triton builder, given shorter tables."""

    persistent = True


class Custom:
    """Mixed into a stock backend, before its own class."""

    @staticmethod
    def get_name() -> str:
        """The name it is registered under."""
        return "CUSTOM"

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A layer's cache as the stock backend wants it, then `with_memory`."""
        return with_memory(super().customize_spec(spec))


class LookaheadFlashBackend(Custom, FlashAttentionBackend):
    """The stock FlashAttention backend."""

    @staticmethod
    def get_builder_cls() -> type[LookaheadFlashBuilder]:
        """The builder of a step's metadata."""
        return LookaheadFlashBuilder


class LookaheadTritonBackend(Custom, TritonAttentionBackend):
    """The stock Triton backend."""

    @staticmethod
    def get_builder_cls() -> type[LookaheadTritonBuilder]:
        """The builder of a step's metadata."""
        return LookaheadTritonBuilder
