"""Training speed and memory, beside the FlashMemory release's trainer on the same documents.

    git clone https://github.com/libertywing/FlashMemory-Deepseek-V4 CHECKOUT
    python -m benchmarks.train [--release CHECKOUT] [--shapes 128x2048 64x1024] [--steps 16] [--rounds 3] [--long]
                               [--output FILE.json]

Data: 8 documents, 512 query tokens, 4,096 chunks, 3 layers, hidden 4096, about 2 % of the chunks golden in a window,
batches of 64 tokens, focal loss, 3 negatives for each positive; shapes are heads x rank. Prints samples per CPU-second
of the steps alone (one thread; batches made in the same thread), how many chunks each token is compared with, peak
resident memory up to the last step, and how far the two losses are apart on one batch with the same weights.

The release's dataset, collation and model are its own code. Its loss and its loop stand inside its script, where they
cannot be called: both are written again here, with the same AdamW and clipping in the same order. `lookahead train`
asks the allocator for huge pages; the release's script does not, so it is measured both as it comes and with them.
Without --release it says so and measures ours alone. --long measures ours on documents of 262,144 chunks as well, and
what it takes to read the keys of one.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.documents import GOLDEN, LAYERS, TOKENS, WINDOW, write_store
from benchmarks.machine import origin
from data_gen.core import cpu

BATCH, NEGATIVES = 64, 3
WARM_UP = 3
HUGE_PAGES = {cpu.HUGE_PAGES: "1"}
LONG = 262_144
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2


def peak_memory() -> float:
    """GiB, the most this process ever held (Linux)."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**20


def measure_ours(folder: Path, heads: int, rank: int, steps: int) -> dict[str, float]:
    """The steps of the stock trainer as `lookahead train` runs it."""
    from transformers import TrainerCallback

    from data_gen.traces.store import TraceStore
    from indexer_train.config import CandidatesConfig, IndexerConfig, TrainConfig
    from indexer_train.training.trainer import prepare, stock_trainer

    store = TraceStore.open(folder / "store")
    documents = len(store.paths()) - 1  # one is held back
    config = TrainConfig(
        loss="focal",
        candidates=CandidatesConfig(kind="sampled", negatives=NEGATIVES, common_weight=0.5),
        epochs=-(-(WARM_UP + steps) // documents),
        eval_epochs=1000,
        windows_per_document=BATCH,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        golden=GOLDEN,
        validation_every=len(store.paths()),
    )
    found: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                found["start"] = time.process_time()
            elif state.global_step == WARM_UP + steps:
                found["seconds"] = time.process_time() - found.pop("start")
                found["memory"] = peak_memory()
                raise KeyboardInterrupt  # before anything is saved

    shape = IndexerConfig(heads=heads, rank=rank, distance_bumps=0, scale=False, slot=False, join="max")
    out = folder / f"run-{heads}"
    trainer = stock_trainer(prepare(store, shape, config, out), config, out)
    trainer.add_callback(Clock())
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    document, start = next(iter(store)), time.process_time()
    for layer in LAYERS:
        document.keys(layer).clone()
    keys = time.process_time() - start
    compared = [float(batch["label"][:, 2].sum(dim=1).mean()) for batch in trainer.get_train_dataloader()]
    speed = steps * BATCH / found["seconds"]
    return {"speed": speed, "memory": found["memory"], "keys": keys, "candidates": statistics.mean(compared)}


def measure_release(folder: Path, checkout: Path, heads: int, rank: int, steps: int) -> dict[str, float]:
    """The release's dataset, model and loss in the order of its joint training loop."""
    sys.path.insert(0, str(checkout / "training"))
    from dataloader import build_joint_combined_dataloader  # pyright: ignore[reportMissingImports]
    from train import JointLayerRetriever  # pyright: ignore[reportAttributeAccessIssue] - the checkout's, not ours

    loader = build_joint_combined_dataloader(
        [{"data_dir": str(folder), "doc_ids": None}],
        LAYERS,
        batch_size=BATCH,
        label_interval=WINDOW,
        neg_ratio=NEGATIVES,
    )
    torch.manual_seed(0)
    model = JointLayerRetriever(LAYERS, n_heads=heads, q_lora_rank=rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(loader))
    start, samples, slots, filled = 0.0, 0, 0, 0
    for step, batch in enumerate(loader):
        if step == WARM_UP:
            start = time.process_time()
        loss = release_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        loss.item()
        if step >= WARM_UP:
            samples, slots = samples + len(batch["mask"]), slots + batch["mask"].numel()
            filled += int(batch["mask"].sum())
        if step == WARM_UP + steps - 1:
            break
    seconds = time.process_time() - start
    shares = {"candidates": filled / samples, "padding": 1 - filled / slots}
    return {"speed": samples / seconds, "memory": peak_memory()} | shares


def release_loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Focal loss of the release's joint training, written again: per layer on its sigmoids, averaged over layers."""
    scores = model(batch["hidden"], batch["compk"], batch["positions"])
    mask, losses = batch["mask"], []
    for layer in LAYERS:
        p, truth, weight = scores[layer].float()[mask], batch["labels"][mask], batch["weights"][mask]
        p_truth = p * truth + (1 - p) * (1 - truth)
        bce = torch.nn.functional.binary_cross_entropy(p, truth, reduction="none")
        losses.append((bce * (1 - p_truth) ** 2 * weight).mean())
    return sum(losses, torch.zeros(())) / len(losses)


def compare_losses(folder: Path, checkout: Path, heads: int, rank: int) -> dict[str, float]:
    """Both losses on one of our batches, the release's model holding our weights."""
    sys.path.insert(0, str(checkout / "training"))
    from train import JointLayerRetriever  # pyright: ignore[reportAttributeAccessIssue] - the checkout's, not ours

    from data_gen.traces.store import TraceStore
    from indexer_train.config import CandidatesConfig, IndexerConfig
    from indexer_train.data.batches import SampledCandidates, window_index
    from indexer_train.load import spec_for
    from indexer_train.losses import LOSSES
    from indexer_train.model import MemoryIndexer

    store = TraceStore.open(folder / "store")
    shape = IndexerConfig(heads=heads, rank=rank, distance_bumps=0, scale=False, slot=False, join="max")
    torch.manual_seed(0)
    indexer = MemoryIndexer.from_spec(spec_for(store.manifest, shape), device="cpu")
    model = JointLayerRetriever(LAYERS, n_heads=heads, q_lora_rank=rank)
    for layer in LAYERS:
        theirs, ours = model.retrievers[f"l{layer}"], indexer.query_encoder.encoder(layer)
        for name in ("wq_a", "wq_b", "weights_proj"):
            getattr(theirs, name).weight.data = getattr(ours, name).weight.data
        theirs.q_norm_weight.data = ours.q_norm.weight.data
    settings = CandidatesConfig(kind="sampled", negatives=NEGATIVES, common_weight=0.5)
    windows = cast(list[dict[str, int]], list(window_index(store)))
    rows = windows[:: TOKENS // BATCH][:BATCH]
    batch = SampledCandidates(store, LAYERS, GOLDEN, settings, seed=0)(rows)
    label, candidates = batch["label"], batch["query_candidates"]
    with torch.no_grad():
        query = {"input_features": batch["query_input_features"], "positions": batch["query_positions"]}
        query |= {"candidates": candidates, "task": "query"}
        document = {"input_values": batch["document_input_values"], "chunks": batch["document_chunks"]}
        ours = LOSSES["focal"](indexer, GOLDEN)([query, document | {"task": "document"}], label)
        theirs = release_loss(
            model,
            {
                "hidden": {layer: query["input_features"][:, place] for place, layer in enumerate(LAYERS)},
                "compk": {layer: document["input_values"][candidates, place] for place, layer in enumerate(LAYERS)},
                "positions": query["positions"],
                "labels": (label[:, 1] >= GOLDEN).float(),
                "mask": label[:, 2].bool(),
                "weights": label[:, 4],
            },
        )
    return {"ours": float(ours), "release": float(theirs)}


def main() -> None:
    """Write the documents, then measure each side in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, help="A checkout of the FlashMemory release.")
    parser.add_argument("--shapes", nargs="+", default=["128x2048", "64x1024"], help="Heads x rank.")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=4096)
    parser.add_argument("--long", action="store_true", help=f"Measure ours on documents of {LONG:,} chunks too.")
    parser.add_argument("--output", type=Path, help="Write all figures there, with commit and hardware.")
    parser.add_argument("--measure", choices=["ours", "release", "losses"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        torch.set_num_threads(1)
        (heads, rank), steps = map(int, arguments.shapes[0].split("x")), arguments.steps
        if arguments.measure == "ours":
            found = measure_ours(arguments.folder, heads, rank, steps)
        elif arguments.measure == "release":
            found = measure_release(arguments.folder, arguments.release, heads, rank, steps)
        else:
            found = compare_losses(arguments.folder, arguments.release, heads, rank)
        print(f"\nmeasured {json.dumps(found)}")
        return
    with tempfile.TemporaryDirectory() as name:
        data = write_store(Path(name) / "data", arguments.documents, arguments.chunks)
        long = write_store(Path(name) / "long", 3, LONG) if arguments.long else None
        results = [compare(arguments, shape, data, long) for shape in arguments.shapes]
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("steps", "rounds", "documents", "chunks")}
        content = origin() | {"settings": settings, "results": results}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def compare(arguments: argparse.Namespace, shape: str, data: Path, long: Path | None) -> dict[str, Any]:
    """Measure both sides at one shape in turns, print what was found and return it."""

    def run(what: str, folder: Path, variables: dict[str, str]) -> dict[str, float]:
        asked = ["--shapes", shape, "--steps", str(arguments.steps), "--measure", what, "--folder", str(folder)]
        asked += ["--release", str(arguments.release)] if arguments.release else []
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **variables}
        command = [sys.executable, "-m", "benchmarks.train", *asked]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode:
            sys.exit(f"{what} failed:\n{done.stderr[-2000:]}")
        return json.loads(re.findall(r"^measured (.*)$", done.stdout, re.M)[-1])

    sides = {"ours": ("ours", data, HUGE_PAGES)}
    if long is not None:
        sides["ours, long"] = ("ours", long, HUGE_PAGES)
    if arguments.release is not None:
        sides |= {"release as it comes": ("release", data, {}), "release, huge pages": ("release", data, HUGE_PAGES)}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):  # in turns: a shared machine is not equally fast all the time
        for side, settings in sides.items():
            runs[side].append(run(*settings))
    speed = {side: statistics.median(each["speed"] for each in found) for side, found in runs.items()}
    print(f"{shape} (heads x rank), N {arguments.chunks}, one thread, median of {arguments.rounds}")
    for side, found in runs.items():
        line = f"{side}: {speed[side]:.1f} samples per CPU-second, {found[0]['candidates']:.0f} candidates a token, "
        line += f"peak memory {max(each['memory'] for each in found):.2f} GiB"
        if side.startswith("release"):
            line += f", {found[0]['padding']:.0%} of its slots are padding; ours is {speed['ours'] / speed[side]:.2f}x"
        print(line)
    if long is not None:
        more = 1000 * BATCH * (1 / speed["ours, long"] - 1 / speed["ours"])
        keys = 1000 * statistics.median(each["keys"] for each in runs["ours, long"])
        print(f"N {LONG}: {more:+.0f} ms a batch of {BATCH}; a document's keys are read in {keys:.0f} ms")
    result = {"shape": shape, "speed": speed, "runs": runs}
    if arguments.release is None:
        print("release: not measured, no checkout was given (--release)")
        return result
    losses = run("losses", data, {})
    gap = abs(losses["ours"] - losses["release"])
    print(f"loss on one batch: ours {losses['ours']:.7f}, release {losses['release']:.7f}, apart {gap:.1e}")
    ratios = {side: speed["ours"] / speed[side] for side in speed if side.startswith("release")}
    return result | {"ratios": ratios, "losses": losses}


if __name__ == "__main__":
    main()
