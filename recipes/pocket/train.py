"""Trains a pocket model, and continues from a checkpoint of its run, made every few reports. Prints losses and
accuracy by task while training; after each stage, on unseen documents, accuracy and the indexer's recall of attention
mass.
"""

import json
import resource
import shutil
import time
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from data_gen.core.errors import InputError
from recipes.pocket.batches import stage_batches
from recipes.pocket.card import write_card
from recipes.pocket.config import PocketConfig, StageConfig
from recipes.pocket.evaluate import accuracy, documents_of, open_recall
from recipes.pocket.family import PocketFamily, hardware
from recipes.pocket.optimizer import build_optimizers
from recipes.pocket.step import METRICS, Step
from recipes.pocket.tasks import TASKS
from recipes.pocket.words import build_lexicon, build_tokenizer

REPORT = 50  # steps between printed lines
SAVE = 4 * REPORT  # steps between checkpoints
NEEDLE = TASKS.index("multi_key")


def recipe_of(config: PocketConfig) -> str:
    """All that decides the weights; a run may be continued under another evaluation."""
    return config.model_dump_json(exclude={"evaluation"})


class Trainer:
    """Model, optimizer and progress of one run folder."""

    def __init__(self, family: PocketFamily, config: PocketConfig, out: Path, workers: int, seconds: float) -> None:
        self.family, self.config, self.out, self.workers = family, config, out, workers
        self.deadline = time.monotonic() + seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = build_tokenizer(build_lexicon(config.vocabulary))
        self.model = family.build(config, self.tokenizer)
        nn.Module.to(self.model, self.device)
        named = list(self.model.named_parameters())
        self.clipped = [[p for n, p in named if (".indexer." in n) == indexer] for indexer in (False, True)]
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.progress = {"stage": 0, "step": 0, "steps": 0, "seconds": 0.0, "peak_bytes": 0, "lines": 0}
        out.mkdir(parents=True, exist_ok=True)
        self.journal = out / "log.jsonl"
        if self.checkpoint.exists():
            self.restore()
        if self.journal.exists():  # what was logged after the checkpoint will be done again
            kept = self.journal.read_text().splitlines(keepends=True)[: self.progress["lines"]]
            self.journal.write_text("".join(kept))
        self.started = time.monotonic() - self.progress["seconds"]

    @property
    def checkpoint(self) -> Path:
        """Weights in fp32, the optimizers' moments in bf16, progress."""
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Replace the checkpoint; an interrupted save leaves the old one."""
        self.progress |= {"seconds": self.seconds, "peak_bytes": max(self.progress["peak_bytes"], self.peak_bytes())}
        moments = {
            name: {k: v.to(torch.bfloat16) for k, v in optimizer.state[parameter].items() if k != "step"}
            for name, parameter in self.model.named_parameters()
            for optimizer in self.optimizers
            if parameter in optimizer.state  # what never had a gradient has none
        }
        weights = self.model.state_dict()
        state = {"model": weights, "moments": moments, "progress": self.progress, "recipe": recipe_of(self.config)}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    @property
    def seconds(self) -> float:
        """Wall time of all of this run's processes up to now, less what was lost after a checkpoint."""
        return time.monotonic() - self.started

    def peak_bytes(self) -> int:
        """Most memory that this process held: the GPU's, or on a CPU all of it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def restore(self) -> None:
        """Continue from the checkpoint; the next batch is the one that was due.

        Raises InputError if the file is damaged or of another recipe.
        """
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
            raise InputError(f"{self.checkpoint}: damaged; delete it to train from the start") from error
        if state["recipe"] != recipe_of(self.config):
            raise InputError(f"{self.checkpoint}: trained by another recipe; choose another --out, or delete it")
        self.model.load_state_dict(state["model"])
        self.progress = state["progress"]
        step = torch.tensor(float(self.progress["steps"]), device=self.device)
        parameters = dict(self.model.named_parameters())
        for name, moments in state["moments"].items():
            remembered = {k: v.float() for k, v in moments.items()}
            if "exp_avg" in moments:
                self.optimizers[0].state[parameters[name]] = {"step": step.clone()} | remembered
            else:
                self.optimizers[1].state[parameters[name]] = remembered

    def log(self, **record: object) -> None:
        """One line on the screen and in log.jsonl."""
        line = json.dumps(record)
        print(line, flush=True)
        with self.journal.open("a") as file:
            file.write(line + "\n")
        self.progress["lines"] += 1

    def run(self) -> bool:
        """Train until the last stage ends (True) or time is up (False)."""
        while self.progress["stage"] < len(self.config.stages):
            finished = self.run_stage(self.config.stages[self.progress["stage"]])
            if finished:
                self.progress |= {"stage": self.progress["stage"] + 1, "step": 0}
            self.save()
            if not finished:
                return False
        return True

    def run_stage(self, stage: StageConfig) -> bool:
        """Steps of one stage; False when time is up before it ends."""
        step = Step(self.family, self.model, stage, self.config.loss)
        window: list[Tensor] = []
        for tokens, tasks in stage_batches(self.config, self.progress["stage"], self.progress["step"], self.workers):
            self.set_rates(stage)
            window.append(step(tokens, tasks))
            for group in self.clipped:
                torch.nn.utils.clip_grad_norm_(group, self.config.optimizer.clip)
            for optimizer in self.optimizers:
                optimizer.step()
            self.progress["step"] += 1
            self.progress["steps"] += 1
            if len(window) < REPORT:
                continue
            needle = self.report(stage, torch.stack(window).cpu())
            window = []
            if stage.advance_at is not None and needle >= stage.advance_at:
                break
            if time.monotonic() > self.deadline:
                return False
            if self.progress["step"] % SAVE == 0:
                self.save()
        del step
        self.examine(stage)
        return True

    def set_rates(self, stage: StageConfig) -> None:
        """Linear inside a stage, with one warm-up at the very start."""
        done = self.progress["step"] / stage.steps
        rate = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * done
        rate *= min(1.0, (self.progress["steps"] + 1) / self.config.optimizer.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]

    def report(self, stage: StageConfig, metrics: Tensor) -> float:
        """Log the means of the last steps [n, metrics]; return the needle accuracy."""
        head = dict(zip(METRICS, metrics.mean(0)[: len(METRICS)].tolist(), strict=True))
        hits, counts = metrics[:, len(METRICS) :].sum(0).view(2, len(TASKS))
        shares = dict(zip(TASKS, (hits / counts.clamp(min=1)).tolist(), strict=True))
        figures = {k: round(v, 4) for k, v in (head | shares).items() if k != "single"}
        where = {"stage": self.progress["stage"], "step": self.progress["step"], "length": stage.length}
        self.log(**where, seconds=round(self.seconds, 1), **figures)
        return shares[TASKS[NEEDLE]]

    def examine(self, stage: StageConfig) -> None:
        """Log the accuracy with the indexer's own top-k, and its recall, on unseen documents of the stage's length.

        Recall is null where the top-k holds every entry.
        """
        topk = self.model.config.index_topk
        self.family.set_topk(self.model, topk)
        size = max(1, self.config.evaluation.tokens // stage.length)
        tests = {task: documents_of(self.config, task, stage.length, 32) for task in TASKS}
        results = {task: accuracy(self.family, self.model, self.tokenizer, tests[task], size) for task in TASKS}
        found = None
        if stage.length // self.family.entry_tokens(self.model.config) > topk:
            few = {task: documents[:4] for task, documents in tests.items()}
            found = round(open_recall(self.family, self.model, self.tokenizer, few, size), 4)
        self.log(stage=self.progress["stage"], length=stage.length, accuracy=results, recall=found)

    def export(self) -> None:
        """Write the model folder: bf16 weights, record of the run with its recipe, log and card."""
        self.family.set_topk(self.model, self.model.config.index_topk)
        folder = self.out / "model"
        self.family.save(self.model, self.tokenizer, folder)
        run = {"hardware": hardware(self.device), "seconds": round(self.progress["seconds"], 1)}
        run |= {"peak_bytes": self.progress["peak_bytes"], "config": self.config.model_dump(mode="json")}
        (folder / "training.json").write_text(json.dumps(run, indent=1) + "\n")
        shutil.copyfile(self.journal, folder / "training.jsonl")
        write_card(self.family, folder)
