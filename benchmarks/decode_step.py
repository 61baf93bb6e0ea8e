"""The paper's claim, measured: one decode step with full attention and under LSA, at a model's own widths.

    python -m benchmarks.decode_step [--output decode-step.json] [--toy]

DeepSeek-V4-Flash's attention side at 256K, 512K and 1M tokens (random weights and caches, every layer for real, in CUDA
graphs), batches from one to what fits beside a GPU's share of the weights:

- full: native indexers over all chunks, their best 512, sparse MQA, HCA, sliding windows;
- LSA: the same over the resident chunks, Level 1 once a lookahead window of 64 steps and the fetch of its churn beside
  the steps. A row's time is that of a whole window over 64; its worst step is one with the refresh in front.

And a dense model (32 layers, 32 heads, 8 of keys and values, 128K tokens), with PyTorch's own attention as `full`.
Tokens a second are of the whole model on `gpus` GPUs with the requests spread over them: everything else of a step is
the planner's count of operations at the rate of a bf16 product with as many rows as one GPU has requests. That leaves
out communication, the planning of fetches on the host (benchmarks/decode.py times it) and sampling, in both modes.
What LSA does not save is in the rows too: HCA and window attention, and host memory. Prefill reads the whole history in
either mode. Needs a GPU; without one, or with --toy, small sizes show that it works.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig

from benchmarks.attention_dense import DenseShape, dense
from benchmarks.attention_side import Shape, Side, Work, v4_full, v4_lsa
from benchmarks.machine import origin
from benchmarks.timing import captured, check_output, microseconds
from eval.plan.dense import dense_model
from eval.plan.load import SHIPPED, load_model
from eval.plan.plan import GIB, GIGA, HistoryShare, PlanSettings, plan_row, work
from eval.plan.shapes import Model
from eval.serving.entries import EntryShape

PAPER = {2**18: 2759 / 1584, 2**19: 2008 / 1028, 2**20: 1266 / 455}
"""Throughput under LSA over that with full attention, on eight H20 (arXiv 2606.09079)."""
USABLE = 0.9
"""Of a GPU's memory: the rest is for activations and the engine's workspace."""
PRODUCT = (4096, 1 << 16)
"""Weights of the product whose rate stands for everything that is not attention: more than any cache holds."""


@dataclass(frozen=True)
class Case:
    """What is measured of one model. side: builds (context, batch, resident chunks or None for full attention)."""

    model: Model
    settings: PlanSettings
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    side: Callable[[int, int, int | None], Side]
    paper: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One row. ms: a step, of the attention side; stages: its parts alone; worst_ms: a step that refreshes first;
    refresh_ms, fetch_ms: each alone, once a window; rest_ms: all else of the model, see the module; resident_gib:
    caches on the GPU as allocated; host_gib: all chunks of all requests; tokens_a_second: of the whole model on all
    GPUs, `batch` requests on each."""

    model: str
    context: int
    mode: str
    batch: int
    ms: float
    stages: dict[str, float]
    worst_ms: float
    refresh_ms: float
    fetch_ms: float
    rest_ms: float
    resident_gib: float
    host_gib: float
    tokens_a_second: float

    def line(self) -> str:
        """As a row of a Markdown table."""
        parts = ", ".join(f"{name} {ms / sum(self.stages.values()):.0%}" for name, ms in self.stages.items())
        return (
            f"| {self.model} | {self.context // 1024}K | {self.mode} | {self.batch} | {self.ms:.2f} | "
            f"{self.ms / self.batch:.3f} | {self.worst_ms:.2f} | {self.refresh_ms:.2f} | {self.fetch_ms:.1f} | {parts} "
            f"| {self.rest_ms:.2f} | {self.resident_gib:.2f} | {self.host_gib:.1f} | {self.tokens_a_second:.0f} |"
        )


HEADING = (
    "| model | context | mode | batch | ms a step | a token | worst step | refresh | fetch | stages | rest | GiB | "
    "host GiB | tokens/s |\n" + "|---" * 14 + "|"
)


def flash_case(device: torch.device, memory: float) -> Case:
    """DeepSeek-V4-Flash with the planner's (the paper's) settings, spread over eight GPUs."""
    name = "deepseek-v4-flash"
    settings = PlanSettings(gpu_memory=memory, gpus=8)
    shape = Shape.of(AutoConfig.from_pretrained(str(SHIPPED / f"{name}.json")), settings.heads, settings.rank)
    model = load_model(name, None)
    return Case(model, settings, tuple(PAPER), (1, 8, 64), partial(v4_side, shape, settings, device), PAPER)


def dense_case(device: torch.device, memory: float) -> Case:
    """A dense model of 8 billion weights on one GPU, a tenth of its chunks resident."""
    shape = DenseShape(layers=32, heads=32, kv_heads=8, width=128, hidden=4096)
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=shape.hidden,
        intermediate_size=14_336,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 17,
        dtype="bfloat16",
    )
    heads, rank = shape.indexer
    settings = PlanSettings(kept=0.1, heads=heads, rank=rank, chunk_tokens=shape.tokens, gpu_memory=memory)
    model = dense_model("dense 8B", config, shape.tokens)
    return Case(model, settings, (1 << 17,), (1, 4, 16), partial(dense_side, shape, settings, device))


def toy_cases(device: torch.device) -> list[Case]:
    """Both models in small."""
    flash = Shape(4, EntryShape(64, 64), 4, 128, 16, 8, 2, 1, 4, 4, 8, (16, 32, 16))
    thin = DenseShape(layers=2, heads=4, kv_heads=2, width=8, hidden=32)
    settings = PlanSettings(kept=0.25, window=4, gpu_memory=400.0, gpus=8)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, dtype="float32",
    )  # fmt: skip
    model = load_model("deepseek-v4-flash", None)
    alone = settings.model_copy(update={"gpus": 1, "chunk_tokens": 16})
    return [
        Case(model, settings, (512,), (1, 2), partial(v4_side, flash, settings, device), {512: 1.0}),
        Case(dense_model("dense", config, 16), alone, (512,), (1, 2), partial(dense_side, thin, alone, device)),
    ]


def v4_side(
    shape: Shape, settings: PlanSettings, device: torch.device, context: int, batch: int, resident: int | None
) -> Side:
    if resident is None:
        return v4_full(shape, context, batch, device)
    return v4_lsa(shape, context, batch, resident, settings.churn, device)


def dense_side(
    shape: DenseShape, settings: PlanSettings, device: torch.device, context: int, batch: int, resident: int | None
) -> Side:
    return dense(shape, context, batch, resident, settings.churn, device)


def measure(case: Case, device: torch.device) -> Iterator[Step]:
    """All rows of one model, full attention first; each batch that fits, and the largest one of either mode."""
    model, settings = case.model, case.settings
    for context in case.contexts:
        plan = plan_row(model, settings, context)
        fits = {mode: plan[f"requests_{mode}"] // settings.gpus for mode in ("full", "lsa")}
        resident = HistoryShare.at(model, settings, context).resident
        for mode, most in fits.items():
            for batch in sorted({*case.batches, *fits.values()}):
                if not 0 < batch <= most or (device.type == "cpu" and batch > max(case.batches)):
                    continue
                side = case.side(context, batch, None if mode == "full" else resident)
                rest = rest_ms(model, settings, context, batch, device)
                yield timed(case, context, mode, batch, side, rest, plan["host_gb"] if mode == "lsa" else 0.0, device)
                del side
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def timed(
    case: Case, context: int, mode: str, batch: int, side: Side, rest: float, host: float, device: torch.device
) -> Step:
    """Measure one side. host: GiB of one request's chunks; rest: see `Step`."""
    steps, cuda = case.settings.window, device.type == "cuda"
    step = captured(side.step, device)
    alone = microseconds(step, device, rounds=5) / 1e3
    refresh = fetch = 0.0
    whole = worst = alone
    if side.refresh is not None and side.fetch is not None:
        refresh, fetch = (microseconds(work, device, rounds=5) / 1e3 for work in (side.refresh, side.fetch))
        worst = alone + refresh
        beside = torch.cuda.Stream(device) if cuda else None
        whole = microseconds(partial(window, step, steps, side, beside), device, rounds=1) / 1e3 / steps
    stages = {name: microseconds(captured(work, device), device, rounds=5) / 1e3 for name, work in side.stages.items()}
    tokens = case.settings.gpus * batch / (whole + rest) * 1e3
    return Step(case.model.name, context, mode, batch, whole, stages, worst, refresh, fetch, rest,
                side.resident / GIB, batch * host, tokens)  # fmt: skip


def window(step: Work, steps: int, side: Side, beside: "torch.cuda.Stream | None") -> None:
    """A lookahead window under LSA: Level 1, then its steps, with the fetch beside them."""
    assert side.refresh is not None and side.fetch is not None
    side.refresh()
    if beside is None:
        side.fetch()
    else:
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            side.fetch()
    for _ in range(steps):
        step()
    if beside is not None:
        torch.cuda.current_stream().wait_stream(beside)


def rest_ms(model: Model, settings: PlanSettings, context: int, batch: int, device: torch.device) -> float:
    """Everything of a step that is not attention: its operations, at the rate of a product of `batch` rows."""
    inner, columns = PRODUCT if device.type == "cuda" else (64, 64)
    weights = torch.randn(inner, columns, device=device).bfloat16()
    rows = torch.randn(batch, inner, device=device).bfloat16()
    us = microseconds(partial(torch.mm, rows, weights), device, rounds=5)
    return fixed_flops(model, settings, context) * us / (2 * inner * columns) / 1e3


def fixed_flops(model: Model, settings: PlanSettings, context: int) -> float:
    """Operations of one token that no mode and no context changes: matrix products with the model's weights."""
    fixed = {weight.term for weight in model.weights} | set(model.extra_flops)
    return sum(term.full for term in work(model, settings, HistoryShare.at(model, settings, context))
               if term.term in fixed)  # fmt: skip


def summary(case: Case, steps: list[Step]) -> list[dict[str, Any]]:
    """A row a context: requests that fit, and how many times full attention's tokens a second LSA makes: in the largest
    batch that fits full attention, and each with the batch that suits it best."""
    rows = []
    for context in case.contexts:
        plan = plan_row(case.model, case.settings, context)
        full, lsa = ([step for step in steps if (step.context, step.mode) == (context, mode)]
                     for mode in ("full", "lsa"))  # fmt: skip
        if not full or not lsa:
            continue
        at = {step.batch: step.tokens_a_second for step in full}
        equal = max(step.batch for step in lsa if step.batch in at)
        best = [max(step.tokens_a_second for step in mode) for mode in (full, lsa)]
        one = [min(mode, key=lambda step: step.batch).ms for mode in (full, lsa)]
        rows.append({
            "model": case.model.name,
            "context": context,
            "gpus": case.settings.gpus,
            "requests_full": plan["requests_full"],
            "requests_lsa": plan["requests_lsa"],
            "gflop_of_the_rest": fixed_flops(case.model, case.settings, context) / GIGA,
            "attention_ratio_alone": one[0] / one[1],
            "equal_batch": equal,
            "ratio_at_equal_batch": next(step.tokens_a_second for step in lsa if step.batch == equal) / at[equal],
            "tokens_a_second_full": best[0],
            "tokens_a_second_lsa": best[1],
            "ratio_at_best": best[1] / best[0],
            "ratio_in_the_paper": case.paper.get(context),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--toy", action="store_true", help="small sizes; the default without a CUDA device")
    args = parser.parse_args()
    if args.output:
        check_output(args.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if args.toy or device.type == "cpu":
        cases = toy_cases(device)
    else:
        memory = USABLE * torch.cuda.get_device_properties(device).total_memory / GIB
        cases = [flash_case(device, memory), dense_case(device, memory)]
    print(HEADING)
    report: dict[str, Any] = origin(device) | {"settings": [], "rows": [], "summary": []}
    for case in cases:
        report["settings"].append({"model": case.model.name, **case.settings.model_dump()})
        steps = []
        for step in measure(case, device):
            print(step.line(), flush=True)
            steps.append(step)
            report["rows"].append(asdict(step))
            if args.output:  # what is measured is kept, whatever comes after
                args.output.write_text(json.dumps(report, indent=1) + "\n")
        report["summary"] += summary(case, steps)
    for row in report["summary"]:
        print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()))  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
