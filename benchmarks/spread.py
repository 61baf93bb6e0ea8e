"""A DeepSeek-V4 of real widths on one GPU and spread over two: are its traces the same, and how long do they take?

    python -m benchmarks.spread [--layers 6] [--tokens 8192] [--output spread.json]

The first layers of DeepSeek-V4-Flash in bf16 with random weights, each module's own by a seed: six of them take 76 GiB,
more than half of an H200. Each side runs in a process of its own: the weights of both would not fit one card.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import dispatch_model, init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.machine import origin
from data_gen.backbones.load import adapter
from data_gen.config import TraceConfig
from data_gen.traces.types import GoldenChunks, RawTrace
from eval.plan.load import SHIPPED
from recipes import load_recipe

OUTPUT = Path(__file__).parent / "results" / "spread.json"
ROWS = 512
"""Query tokens that are traced: the document's last."""


def real_widths(layers: int) -> PreTrainedConfig:
    """DeepSeek-V4-Flash's configuration, cut to its first layers."""
    told = json.loads((SHIPPED / "deepseek-v4-flash.json").read_text())
    del told["quantization_config"]
    told |= {"num_hidden_layers": layers, "compress_ratios": told["compress_ratios"][:layers]}
    return AutoConfig.for_model(told.pop("model_type"), **told)


def random_model(config: PreTrainedConfig, devices: list[str]) -> PreTrainedModel:
    """A bf16 model whose layers lie on `devices`, as many on each; its weights do not depend on which they are."""
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    count = config.num_hidden_layers
    places = {f"model.layers.{each}": devices[each * len(devices) // count] for each in range(count)}
    ends = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    rest = {f"model.{name}": devices[-1] for name, _ in model.model.named_children()} | {"lm_head": devices[-1]}
    del rest["model.layers"]
    places = rest | ends | places
    for number, (name, module) in enumerate(model.named_modules()):
        device = next((place for prefix, place in places.items() if f"{name}.".startswith(f"{prefix}.")), devices[0])
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
        torch.manual_seed(number)
        model._init_weights(module)
    placed = dispatch_model(model, places, force_hooks=True) if len(devices) > 1 else model.to(devices[0])
    return cast(PreTrainedModel, placed).eval()


def digest(trace: RawTrace) -> str:
    """SHA-256 of all that a trace holds."""
    found = hashlib.sha256()
    oracle = trace.oracle
    assert isinstance(oracle, GoldenChunks)
    for tensor in (*trace.hidden.values(), *trace.keys.values(), *(oracle.votes, oracle.chunks, oracle.pointers)):
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def traced(layers: int, tokens: int, devices: list[str]) -> dict[str, Any]:
    """One document on a model that lies on `devices`; of the few layers with an indexer every vote counts."""
    backbone = adapter(random_model(real_widths(layers), devices))
    recipe = load_recipe("deepseek-v4-flash").trace
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(0, 100_000, (tokens,), generator=generator).tolist()
    settings = TraceConfig(chunking=recipe.chunking, layers=backbone.info.full_layers, oracle=recipe.oracle, votes=1)
    began = time.perf_counter()
    trace = backbone.trace(document, torch.arange(tokens - ROWS, tokens), settings)
    held = [torch.cuda.max_memory_allocated(each) / 2**30 for each in range(torch.cuda.device_count())]
    return {"seconds": time.perf_counter() - began, "gib": held, "digest": digest(trace),
            "fingerprint": backbone.info.fingerprint}  # fmt: skip


def main() -> None:
    """Trace on one GPU, then on two, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--devices", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.devices:
        print(json.dumps(traced(options.layers, options.tokens, options.devices)))
        return
    found = {}
    for devices in (["cuda:0"], ["cuda:0", "cuda:1"]):
        command = [sys.executable, "-m", "benchmarks.spread", "--layers", str(options.layers)]
        command += ["--tokens", str(options.tokens), "--devices", *devices]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[len(devices)] = json.loads(printed.splitlines()[-1])
    same = all(found[1][name] == found[2][name] for name in ("digest", "fingerprint"))
    text = json.dumps({"origin": origin("cuda"), "gpus_1": found[1], "gpus_2": found[2], "same": same}, indent=1)
    options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
