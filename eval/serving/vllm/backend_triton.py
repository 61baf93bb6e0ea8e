"""The same around vLLM's Triton backend (GPUs: `--attention-backend CUSTOM`): written from its source, run nowhere."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadataBuilder

from eval.serving.vllm.backend import SparseTables, with_memory


class LookaheadTritonBuilder(SparseTables, TritonAttentionMetadataBuilder):
    """Captured CUDA graphs read tables and lengths where they lay: always at this builder's own addresses."""

    persistent = True


class LookaheadTritonBackend(TritonAttentionBackend):
    """The stock Triton backend, under the name that `--attention-backend` knows for others'."""

    @staticmethod
    def get_name() -> str:
        """The name it is registered under."""
        return "CUSTOM"

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A layer's cache as the stock backend wants it, then `with_memory`."""
        return with_memory(super().customize_spec(spec))

    @staticmethod
    def get_builder_cls() -> type[LookaheadTritonBuilder]:
        """The builder of a step's metadata."""
        return LookaheadTritonBuilder
