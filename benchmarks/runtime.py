"""A model decoding through the runtime: tokens per second, memory and fetches, full attention beside LSA.

    python -m benchmarks.runtime --bundle runs/pocket/bundle --model recipes/pocket_v4/model --prompt PROMPT.jsonl

The prompt is the first `input` of a RULER file. Every row reads what full attention wrote behind it, so that resident
sets can be compared: `windows_as_torch` counts those that equal the torch backend's. Time is that of decoding alone.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eval.decode.runtime import LSARuntime
from indexer_train.bridge.bundle import load_bundle
from indexer_train.selection import Budget


def decode(runtime: LSARuntime, ids: torch.Tensor, follow: torch.Tensor) -> dict[str, Any]:
    """Read the prompt, then time reading `follow` [1, T]. Returns figures and the resident chunks of every window."""
    runtime.reset()
    runtime.generate(
        ids, max_new_tokens=1, do_sample=False, eos_token_id=None
    )  # prefill, and what is compiled on the way
    chosen, keep = [], runtime.host.keep
    runtime.host.keep = lambda resident: chosen.append(resident[0].clone()) or keep(resident)
    if ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started, windows = time.perf_counter(), len(runtime.windows)
    runtime.refresh()
    with runtime.host.attached(), torch.no_grad():
        for step, token in enumerate(follow.split(1, dim=1)):
            if step and step % runtime.spec.window == 0:
                runtime.refresh()
            logits = runtime.host.read(token)
    logits.cpu()
    seconds = time.perf_counter() - started
    del runtime.host.keep
    done = runtime.windows[windows:]
    return {
        "tokens_per_second": follow.shape[1] / seconds,
        "resident_share": sum(w.resident for w in done) / sum(w.chunks for w in done),
        "resident_mb": max(w.bytes for w in done) / 1e6,
        "fetched_mb_a_window": sum(w.fetched_bytes for w in done[1:]) / max(1, len(done) - 1) / 1e6,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if ids.is_cuda else None,
        "chosen": chosen,
    }


def measure(
    model: PreTrainedModel, bundle: Path, ids: torch.Tensor, tokens: int, budget: float
) -> list[dict[str, Any]]:
    """A row each for everything resident, and for `budget` with every backend that the machine has."""
    rows, indexer = [], load_bundle(bundle)
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)[:, ids.shape[1] :]
    for share, backend in [(1.0, "torch"), (budget, "torch"), *([(budget, "triton")] if ids.is_cuda else [])]:
        runtime = LSARuntime(indexer, model, selection=Budget(budget=share), backend=backend)
        rows.append({"budget": share, "backend": backend, **decode(runtime, ids, written)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=Path, required=True, help="a RULER file")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--budget", type=float, default=0.13)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(device).eval()
    with open(arguments.prompt) as file:
        text = json.loads(file.readline())["input"]
    ids = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt").input_ids.to(device)
    rows = measure(model, arguments.bundle, ids, arguments.tokens, arguments.budget)
    reference = rows[1].pop("chosen")
    rows[0].pop("chosen")
    name = torch.cuda.get_device_name() if ids.is_cuda else "CPU"
    print(f"{name}; {ids.shape[1]} tokens read, {arguments.tokens} behind them, what full attention wrote")
    for row in rows:
        if (chosen := row.pop("chosen", None)) is not None:
            pairs = list(zip(reference, chosen, strict=True))
            row["windows_as_torch"] = f"{sum(torch.equal(a, b) for a, b in pairs)} of {len(pairs)}"
        print(json.dumps(row))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
