"""Peak memory of tracing long documents through a tiny DeepSeek-V4, every token a query token.

Usage: python -m benchmarks.trace_memory [--tokens 16384 32768 65536] [--oracle indexer]
Each length runs in a fresh process, whose C allocator is told to hand freed blocks back at once: the figures are memory
in use, not what the allocator keeps for later (with glibc's defaults a 64K document ends some 500 MB higher). Prints
commit and machine, then of each length seconds, the growth of the peak resident set over the loaded model, what of it
the finished trace takes, and what one S x T and one S x H x T score matrix of that document would take.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from benchmarks.machine import machine
from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking

CSA, HCA, SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
HEADS = 4


def tiny_model() -> DeepseekV4ForCausalLM:
    """Random weights: one sliding-window layer, three CSA layers, one HCA layer."""
    torch.manual_seed(0)
    kinds = [SLIDING, CSA, HCA, CSA, CSA]
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=["moe"] * len(kinds),
        num_attention_heads=2,
        head_dim=32,
        partial_rotary_factor=0.5,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=HEADS,
        index_head_dim=32,
        index_topk=64,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        initializer_range=0.2,
    )
    return DeepseekV4ForCausalLM(config).eval()


def peak_memory() -> float:
    """MB, the most this process ever held (Linux)."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


def measure(tokens: int, oracle: Literal["indexer", "attention"]) -> None:
    """Trace one random document in this process and print the figures."""
    backbone = DeepseekV4Backbone(tiny_model())
    settings = TraceConfig(chunking=Chunking(tokens=4), layers=[2], oracle=oracle, top_chunks=64)
    document = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    first = document[:2048]
    backbone.trace(first, torch.arange(len(first)), settings)  # libraries and pieces of full size
    before = peak_memory()
    start = time.perf_counter()
    raw = backbone.trace(document, torch.arange(tokens), settings)
    seconds = time.perf_counter() - start
    kept = [*raw.hidden.values(), *raw.keys.values(), *vars(raw.oracle).values(), raw.positions]
    matrix = tokens * (tokens // 4) * 4 / 1e6
    print(
        f"{tokens} tokens, oracle {oracle}: {seconds:.0f} s, peak memory +{peak_memory() - before:.0f} MB "
        f"(the trace itself {sum(tensor.nbytes for tensor in kept) / 1e6:.0f} MB); S x T scores would be "
        f"{matrix:.0f} MB, S x H x T {matrix * HEADS:.0f} MB; near-ties {raw.near_ties}",
        flush=True,
    )


def main() -> None:
    """One fresh process a length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--oracle", choices=["indexer", "attention"], default="indexer")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.measure:
        print(machine(), flush=True)
    for tokens in arguments.tokens:
        if arguments.measure:
            measure(tokens, arguments.oracle)
        else:
            call = ["--measure", "--tokens", str(tokens), "--oracle", arguments.oracle]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
            subprocess.run([sys.executable, "-m", "benchmarks.trace_memory", *call], check=True, env=environment)


if __name__ == "__main__":
    main()
