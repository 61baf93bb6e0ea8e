"""Two GPUs of one host beside one: is training as fast as it should be, and does it end where it would have?

    python -m benchmarks.two_gpus speed --out runs/two [--documents 32 --batches device]
    python -m benchmarks.two_gpus resume RECIPE TRACES --out runs/two
    python -m benchmarks.two_gpus trace RECIPE --out runs/two [--documents package:torch]

speed: `benchmarks.train_gpu`, with its options, on two GPUs and on one, of as many windows a step: samples a second,
their ratio, and the share of a step that one GPU waits for the other.
resume: `lookahead train` on one GPU, on two, and on two of which one is killed after the first checkpoint before both
go on: held-out figures of all, and whether the last two end with the same bytes.
trace: `lookahead generate` on one GPU, then in two shards: documents a second from the first file written to the last
(loading the model, which both wait for, is left out; `seconds` has it), their ratio, and whether the stores have the
same bytes.

NCCL's NVLink multicast is left off. Figures are written to OUT/NAME.json.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import origin
from data_gen.traces.store import TraceStore
from indexer_train.load import load_indexer
from recipes import load_recipe

ENVIRONMENT = os.environ | {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def call(processes: int, module: str, *arguments: str) -> float:
    """Seconds that a module takes in so many processes. Raises CalledProcessError where it fails."""
    began = time.monotonic()
    subprocess.run([*TORCHRUN, str(processes), "-m", module, *arguments], env=ENVIRONMENT, check=True)
    return time.monotonic() - began


def speed(out: Path, options: list[str]) -> dict[str, Any]:
    """Training on one GPU and on two, on the same documents."""
    found = {}
    for processes in (1, 2):
        file = out / f"train-{processes}.json"
        shared = ["--data", str(out / "data"), "--accumulation", str(2 // processes), "--output", str(file)]
        call(processes, "benchmarks.train_gpu", *shared, *options)
        found[f"gpus_{processes}"] = json.loads(file.read_text())
    one, two = found.values()
    return {**found, "ratio": two["samples_a_second"] / one["samples_a_second"], "waits": two.get("waits")}


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path) -> str:
    """SHA-256 of an indexer's weights; what else is written says when and where."""
    (path,) = (folder / "indexer").rglob("*.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def heldout(folder: Path) -> dict[str, float]:
    """What the documents that were held back say of a trained indexer."""
    made = load_indexer(folder / "indexer").spec.provenance
    assert made is not None
    return next(row.values for row in made.metrics if row.task == "all")


def resume(recipe: str, traces: Path, out: Path) -> dict[str, Any]:
    """Held-out figures of one GPU and of two, and of two of which one was killed."""
    settings = load_recipe(recipe)
    halved = out / "one-gpu.yaml"
    train = settings.train.model_copy(update={"accumulation": 2 * settings.train.accumulation})
    halved.write_text(json.dumps(settings.model_copy(update={"train": train}).model_dump(mode="json")))
    call(1, "cli", "train", str(halved), "--traces", str(traces), "--out", str(out / "one"))
    call(2, "cli", "train", recipe, "--traces", str(traces), "--out", str(out / "two"))
    broken = out / "killed"
    command = ["cli", "train", recipe, "--traces", str(traces), "--out", str(broken)]
    running = subprocess.Popen([*TORCHRUN, "2", "-m", *command], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while running.poll() is None and not list(broken.glob("checkpoints/checkpoint-*")):
        time.sleep(0.05)
    killed = children(running.pid)
    if killed:
        os.kill(killed[-1], signal.SIGKILL)
    running.communicate()
    finished = (broken / "indexer").exists()
    call(2, *command)
    return {
        "one": heldout(out / "one"),
        "two": heldout(out / "two"),
        "killed_before_the_end": bool(killed) and not finished,
        "resumed_to_the_same_bytes": weights(broken) == weights(out / "two"),
    }


def children(process: int) -> list[int]:
    """Processes that a process began, in order."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def trace(recipe: str, out: Path, options: list[str]) -> dict[str, Any]:
    """Tracing on one GPU and in two shards; options: of `lookahead generate`."""
    found: dict[str, Any] = {}
    stores: dict[int, list[TraceStore]] = {}
    for processes in (1, 2):
        folder = out / f"traced-{processes}"
        seconds = call(processes, "cli", "generate", recipe, "--out", str(folder), *options)
        sides = [folder / side for side in ("train", "heldout") if (folder / side).exists()]
        stores[processes] = [TraceStore.open(side) for side in sides]
        written = sorted(path.stat().st_mtime for store in stores[processes] for path in store.paths())
        rate = (len(written) - processes) / (written[-1] - written[0])  # each one's first began before the clock
        found[f"gpus_{processes}"] = {"documents": len(written), "documents_a_second": rate, "seconds": seconds}
    same = all(digest(one.root) == digest(two.root) for one, two in zip(*stores.values(), strict=True))
    ratio = found["gpus_2"]["documents_a_second"] / found["gpus_1"]["documents_a_second"]
    return {**found, "ratio": ratio, "same_bytes": same}


def main() -> None:
    """Run one of the three and write OUT/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["speed", "resume", "trace"])
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("traces", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    arguments, options = parser.parse_known_args()
    if options and arguments.name == "resume":
        parser.error(f"unknown: {' '.join(options)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.name == "speed":
        found = speed(arguments.out, options)
    elif arguments.name == "resume":
        found = resume(arguments.recipe, arguments.traces, arguments.out)
    else:
        found = trace(arguments.recipe, arguments.out, options)
    text = json.dumps({"origin": origin("cuda" if torch.cuda.is_available() else "cpu"), **found}, indent=1)
    (arguments.out / f"{arguments.name}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
