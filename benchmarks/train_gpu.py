"""Training speed on a GPU: samples per second, arithmetic per second, and how long the device waits for the host.

    python -m benchmarks.train_gpu [--heads 128 --rank 2048 --chunks 16384 --steps 60] [--batches device] [--batch 64]
                                   [--loss listwise_peak] [--accumulation 1] [--data FOLDER] [--output FILE]

Data as benchmarks/train.py writes it, of 16,384 chunks, in bf16: steps of the stock trainer as `lookahead train` runs
them, in wall time between two waits for the device, once every document has been read. Losses on single chunks compare
sampled candidates, the others all of them. Operations are counted by torch on one step (matrix products of
forward and backward). Device time is the sum of its kernels over profiled steps; the rest of those steps' wall time is
the host's. Under torchrun each process trains on a GPU of its own, with --data for all; `waits` is then the share of a
step in the kernels that add up gradients, in which a GPU waits for the others. --output writes the figures, their
settings and their origin as JSON. A CPU runs it too, in fp32 and without the device columns: that shows only that it
works.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage] - no public name has it
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from benchmarks.documents import GOLDEN, write_store
from benchmarks.machine import origin
from benchmarks.train import BATCH, LEARNING_RATE, NEGATIVES
from data_gen.traces.store import TraceStore
from indexer_train.config import CandidatesConfig, IndexerConfig, TrainConfig
from indexer_train.losses import LOSSES
from indexer_train.processes import count, rank
from indexer_train.training.trainer import prepare, stock_trainer

COUNTED, PROFILED = 1, 8
"""Steps whose operations are counted, after the first epoch, and those profiled after the timed ones."""


class Clock(TrainerCallback):
    """Counts, times and profiles steps, then stops the run before anything is saved. found: the figures."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.cuda = torch.cuda.is_available()
        self.warm_up = warm_up
        self.begin = warm_up + COUNTED
        self.end = self.begin + steps
        self.flops = FlopCounterMode(display=False)
        self.profiler = profile(activities=[ProfilerActivity.CUDA]) if self.cuda else contextlib.nullcontext()
        self.found: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm_up:
            self.flops.__enter__()
        elif state.global_step == self.begin:
            self.flops.__exit__(None, None, None)
            self.found["flop_a_step"] = self.flops.get_total_flops() / COUNTED
            self.found["start"] = self.now()
        elif state.global_step == self.end:
            seconds = self.now() - self.found.pop("start")
            self.found["seconds_a_step"] = seconds / (self.end - self.begin)
            self.profiler.__enter__()
            self.found["start"] = self.now()
        elif state.global_step == self.end + PROFILED:
            seconds = self.now() - self.found.pop("start")
            self.profiler.__exit__(None, None, None)
            if isinstance(self.profiler, profile):
                watched = self.profiler.events()
                assert watched is not None  # it has run
                events = [e for e in watched if e.device_type == DeviceType.CUDA]
                busy = sum(event.device_time for event in events) / 1e6
                self.found |= {"device_seconds_a_step": busy / PROFILED, "profiled_seconds_a_step": seconds / PROFILED}
                adding = sum(event.device_time for event in events if "nccl" in event.name.lower()) / 1e6
                self.found |= {"waits": adding / seconds} if count() > 1 else {}
            raise KeyboardInterrupt


def measure(folder: Path, settings: argparse.Namespace) -> dict[str, float]:
    """The figures of one run on the store in `folder`. settings: as `main` reads them."""
    store, cuda = TraceStore.open(folder / "store"), torch.cuda.is_available()
    steps = (len(store.paths()) - 1) // (settings.accumulation * count())  # of an epoch; one document is held back
    epochs = 1 + -(-(COUNTED + settings.steps + PROFILED) // steps)
    if LOSSES[settings.loss].pointwise:
        candidates = CandidatesConfig(kind="sampled", negatives=NEGATIVES, common_weight=0.5)
    else:
        candidates = CandidatesConfig(kind="all")
    config = TrainConfig(
        loss=settings.loss,
        candidates=candidates,
        epochs=epochs,
        eval_epochs=epochs + 1,
        windows_per_document=settings.batch,
        accumulation=settings.accumulation,
        learning_rate=LEARNING_RATE,
        golden=GOLDEN,
        precision="bfloat16" if cuda else "float32",
        validation_every=len(store.paths()),
        batches=settings.batches,
    )
    shape = IndexerConfig(
        heads=settings.heads, rank=settings.rank, distance_bumps=0, scale=False, slot=False, join="max"
    )
    out = folder / f"run-{settings.batches}-{settings.batch}-{settings.accumulation}-{count()}"
    clock = Clock(steps, settings.steps)
    trainer = stock_trainer(prepare(store, shape, config, out), config, out)
    trainer.add_callback(clock)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    found = clock.found
    found["samples_a_second"] = settings.batch * settings.accumulation * count() / found["seconds_a_step"]
    found["tflop_a_second"] = found["flop_a_step"] / found["seconds_a_step"] / 1e12
    if cuda:
        # Profiling slows the host, not the kernels: their time is set against steps that nobody watched.
        found["host_share"] = max(0.0, 1 - found["device_seconds_a_step"] / found["seconds_a_step"])
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    """Write the documents, train on them, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--rank", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=16_384)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--loss", default="focal", choices=sorted(LOSSES))
    parser.add_argument("--batches", default="host", choices=["host", "device"], help="as `train.batches`")
    parser.add_argument("--batch", type=int, default=BATCH, help="as `train.windows_per_document`")
    parser.add_argument("--accumulation", type=int, default=1, help="as `train.accumulation`")
    parser.add_argument("--data", type=Path, help="documents of an earlier call, or where to write them")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    where = origin("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        data = arguments.data or Path(name) / "data"
        if not data.exists():
            write_store(data, arguments.documents, arguments.chunks)
        found = measure(data, arguments)
    if rank():
        return  # the first process writes
    shape = f"H {arguments.heads}, R {arguments.rank}, N {arguments.chunks}"
    print(f"{where['device']}, torch {where['torch']}, {shape}, {arguments.loss}, batches by the {arguments.batches}")
    for figure, value in found.items():
        print(f"{figure}: {value:.4g}")
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "data")}
        settings["processes"] = count()
        arguments.output.write_text(json.dumps({"origin": where, **settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
