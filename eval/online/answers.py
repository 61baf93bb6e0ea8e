"""One example under every policy, from one prefill: answers are generated, texts are followed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.online.capped import Capped, calibrated
from eval.online.check import stop_tokens
from eval.online.config import BenchmarkConfig
from eval.online.cycle import Keep, Run, best, fidelity, go_on
from eval.online.examples import Example, TextExample
from eval.online.foresight import Foresight
from eval.online.open import open_session
from eval.online.policies import decode_policies, protected
from eval.online.prefill import Prefill
from eval.online.scorers import SCORERS
from eval.online.session import Session
from eval.serving.select import Fallback
from indexer_train.model import MemoryIndexer

FALLBACK, PROTECTED = "indexer+fallback", "protected"
Record = dict[str, Any]
"""What became of one example: its name, benchmark, task, length, tokens, depth, why it was left out (empty: it was
not) and its runs, one a policy and budget, full attention first."""


@dataclass(frozen=True)
class Runner:
    """Reads each example once with full attention, all but its last prompt token, then goes on under every policy.

    The resident set is fixed before the last prompt token and every tau tokens after, so the first answer token
    already comes from sparse attention.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    indexer: MemoryIndexer
    config: BenchmarkConfig
    thinking: bool
    context: int

    @cached_property
    def prefill(self) -> Prefill:
        """Reads the prompts."""
        return Prefill(lambda: open_session(self.model, self.indexer.spec))

    @property
    def policies(self) -> list[str]:
        """The asked policies that this backbone and bundle have."""
        served = [FALLBACK] if calibrated(self.indexer) else []
        known = {*decode_policies(self.indexer), PROTECTED, "oracle", *served}
        return [name for name in self.config.policies if name in known]

    def run(self, example: Example | TextExample, after: Example | None = None) -> Record:
        """The record of one example; what its prompt shares with that of `after`, the next one, is read once."""
        follows = isinstance(example, TextExample)
        record: Record = {
            "name": example.name,
            "benchmark": example.benchmark,
            "task": example.task,
            "length": example.length,
            "depth": None if follows else example.depth,
        }
        if follows:
            place = len(example.tokens) - example.follow - 1
            prompt, given, most = example.tokens[:place], example.tokens[place:-1], 0
        else:
            ids = example.prompt(self.tokenizer, self.thinking)
            prompt, given, most = ids[:-1], [ids[-1], *example.opening(self.tokenizer)], example.answer_tokens
        size = len(prompt) + len(given) + most
        record |= {"tokens": size, "left_out": "" if follows else example.left_out, "runs": []}
        if size > self.context:
            record["left_out"] = f"longer than the backbone's context ({self.context} tokens)"
        if record["left_out"]:
            return record
        following = None if after is None else after.prompt(self.tokenizer, self.thinking)[:-1]
        session = self.prefill.read(prompt, following)
        targets = example.tokens[place + 1 :] if follows else None
        courses = self._courses(session, given, most, targets)
        record["runs"] = [self._told(example, course) for course in courses]
        return record

    def _courses(self, session: Session, given: list[int], most: int, targets: list[int] | None) -> list["_Course"]:
        """Go on behind the prompt under every policy: full attention by itself, which the oracle watches, then all
        others in step.

        Reading one token rounds otherwise than reading one of each in a single pass: KL from full attention contains
        that rounding, which shows in bf16.
        """
        foresight = Foresight(self.indexer.spec.window)
        known = {**decode_policies(self.indexer), PROTECTED: protected, "oracle": foresight}
        ranked = [name for name in self.policies if name not in (FALLBACK, PROTECTED)]
        asked = [(name, budget) for budget in self.config.budgets for name in ranked]
        asked += [(PROTECTED, None)] if PROTECTED in self.policies else []  # it is the same under every budget
        asked += [(FALLBACK, self.config.cap)] if FALLBACK in self.policies else []
        stop = stop_tokens(self.model, self.tokenizer)

        def course(name: str, budget: float | None, keep: Keep | None, full: "_Course | None") -> _Course:
            measure = None if targets is None else _Fidelity(targets, full and full.measure)
            return _Course(name, budget, session.fork(), keep, given, most, stop, measure)

        full = course("full", None, None, None)
        if "oracle" in self.policies:
            full.watch = foresight.watch
        others = []
        for name, budget in asked:
            if name == FALLBACK:
                keep = Capped(self.indexer, calibrated(self.indexer), budget, Fallback())
            else:
                keep = best(known[name], budget or 1.0)
            others.append(course(name, budget, keep, full))
        for together in ([full], others):
            go_on([each.run for each in together], self.indexer.spec.window, given[0])
        return [full, *others]

    def _told(self, example: Example | TextExample, course: "_Course") -> dict[str, Any]:
        """A run as the record holds it."""
        usage = course.run.usage
        told = {
            "policy": course.policy,
            "budget": course.budget,
            "kept": usage.kept_share,
            "kv_bytes": usage.mean_bytes,
            "chunks": usage.resident / usage.steps / self.indexer.spec.chunking.tokens,
            "refreshes": usage.refreshes,
        }
        if isinstance(course.run.keep, Capped):
            served = course.run.keep.served
            told |= {"fallbacks": served.count("full"), "windows": len(served)}
        if isinstance(example, TextExample):
            return told | course.measure.means()
        said = self.tokenizer.decode(course.answer, skip_special_tokens=True)
        response = example.prefix + said
        # MRCR demands its prefix; elsewhere, as in RULER, what the model was given earns nothing.
        scored = response if example.scorer == "sequence_ratio" else said
        return told | {"score": SCORERS[example.scorer](scored, example.references), "response": response}


class _Course:
    """How one policy goes on behind the prompt: it reads `given`, then writes at most `most` tokens greedily.

    answer: what it wrote; watch: called with the session after every token read; measure: of a text that is followed.
    """

    def __init__(
        self,
        policy: str,
        budget: float | None,
        session: Session,
        keep: Keep | None,
        given: list[int],
        most: int,
        stop: set[int],
        measure: "_Fidelity | None",
    ) -> None:
        self.policy, self.budget, self.measure = policy, budget, measure
        self.run = Run(session, keep, self._follow)
        self.watch: Callable[[Session], None] | None = None
        self.answer: list[int] = []
        self._rest, self._most, self._stop = iter(given[1:]), most, stop

    def _follow(self, logits: torch.Tensor) -> int | None:
        if self.watch is not None:
            self.watch(self.run.session)
        if self.measure is not None:
            self.measure.add(logits)
        token = next(self._rest, None)
        if token is not None or len(self.answer) == self._most:
            return token
        self.answer.append(int(logits.argmax()))
        return None if self.answer[-1] in self._stop or len(self.answer) == self._most else self.answer[-1]


class _Fidelity:
    """Next-token agreement with full attention, KL from it in nats, and loss per token.

    targets: the text's next tokens; full: what measured full attention itself, None for that one. Agreement and KL of a
    token are those of eval/online/cycle.py `fidelity`.
    """

    def __init__(self, targets: list[int], full: "_Fidelity | None") -> None:
        self._targets = targets
        self._log_p: list[torch.Tensor] = []
        self._full = self._log_p if full is None else full._log_p
        self._sums: list[tuple[float, float, float]] = []

    def add(self, logits: torch.Tensor) -> None:
        place = len(self._sums)
        log_p = logits.float().log_softmax(dim=-1)
        if self._full is self._log_p:
            self._log_p.append(log_p)
        agrees, kl = fidelity(log_p, self._full[place])
        self._sums.append((float(agrees), float(kl), -float(log_p[self._targets[place]])))

    def means(self) -> dict[str, float]:
        """Over the text's tokens."""
        agreement, kl, loss = (sum(values) / len(values) for values in zip(*self._sums, strict=True))
        return {"agreement": agreement, "kl": kl, "loss": loss}
