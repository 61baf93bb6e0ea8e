"""Attention backends whose metadata builder hands decode rows a shorter block table and length."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from dataclasses import fields
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from eval.serving.vllm.blocks import LookaheadSpec
from eval.serving.vllm.sequences import NOTHING
from eval.serving.vllm.tables import Tables
from eval.serving.vllm.worker import current


class SparseTables:
    """Mixed into an AttentionMetadataBuilder, before its own class. persistent: tables and lengths are always at this
    builder's own addresses, where captured CUDA graphs read them.

    A hybrid model has a builder a group of layers: those of sliding layers change nothing, and among those of full
    layers the one that is asked first in a step has the sets chosen.
    """

    persistent = False
    supports_update_block_table = False  # a full table would be put into another group's shorter metadata

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # pyright: ignore[reportCallIssue]
        self._full = isinstance(kv_cache_spec, FullAttentionSpec)
        self._rows, self._device = vllm_config.scheduler_config.max_num_seqs, device
        self._tokens = kv_cache_spec.block_size
        self._tables: Tables | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """The backend's metadata of a step [B rows], with tables and lengths (in tokens) of what each row may read."""
        meta = self._restrict(common_attn_metadata) if self._full else common_attn_metadata
        return super().build(common_prefix_len, meta, fast_build)

    def _restrict(self, meta: CommonAttentionMetadata) -> CommonAttentionMetadata:
        worker = current()
        if worker is None or worker.keys is None:  # a run that measures memory: the caches are none or others
            return meta
        read = worker.sets(self, meta)
        sets = [chosen for chosen in read if chosen is not None and chosen is not NOTHING]
        if not self.persistent and not sets:
            return meta
        if self._tables is None:
            self._tables = Tables(self._rows, meta.block_table_tensor.shape[1], self._tokens, self._device)
        table, lengths, bounds = self._tables.fill(
            meta.block_table_tensor, meta.seq_lens, meta.seq_lens_cpu_upper_bound, read
        )
        # A capture of CUDA graphs names a longer context than it has, on purpose, and reads no set.
        longest = int(bounds.max()) if sets and None not in read else meta.max_seq_len
        return meta.replace(
            block_table_tensor=table, seq_lens=lengths, seq_lens_cpu_upper_bound=bounds, max_seq_len=longest,
            _num_computed_tokens_cache=None,
        )  # fmt: skip


class LookaheadCPUBuilder(SparseTables, CPUAttentionMetadataBuilder):
    """The stock CPU builder, given shorter tables."""


def with_memory(spec: Any) -> Any:
    """A layer's cache under this plugin's block manager, where cold blocks are to leave the pool."""
    worker = current()
    if type(spec) is not FullAttentionSpec or worker is None or worker.settings.host_gib is None:
        return spec
    return LookaheadSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})


class LookaheadCPUBackend(CPUAttentionBackend):
    """The stock backend, with blocks of 16 tokens: it declares multiples of 32, its kernels know 16 as well."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
        """Tokens of a block that the kernels take."""
        return [MultipleOf(16)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A layer's cache as the stock backend wants it, then `with_memory`."""
        return with_memory(super().customize_spec(spec))

    @staticmethod
    def get_builder_cls() -> type[LookaheadCPUBuilder]:
        """The builder of a step's metadata."""
        return LookaheadCPUBuilder
