"""One example under every policy, from one prefill: answers are generated, texts are followed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.decode.check import stop_tokens
from eval.decode.cycle import Keep, Run, Usage, best, fidelity, go_on
from eval.decode.fallback import Fallback
from eval.decode.open import open_session
from eval.decode.policies import decode_policies, protected
from eval.decode.session import Session
from eval.tasks.capped import Capped, calibrated
from eval.tasks.config import BenchmarkConfig
from eval.tasks.examples import Example, TextExample
from eval.tasks.oracle import Foresight
from eval.tasks.prefill import Prefill
from eval.tasks.scorers import SCORERS
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
        measure = _Fidelity(example.tokens[place + 1 :]) if follows else None
        foresight = Foresight(self.indexer.spec.window)
        known = {**decode_policies(self.indexer), PROTECTED: protected, "oracle": foresight}
        ranked = [name for name in self.policies if name not in (FALLBACK, PROTECTED)]
        asked = [("full", None), *[(name, budget) for budget in self.config.budgets for name in ranked]]
        asked += [(PROTECTED, None)] if PROTECTED in self.policies else []  # it is the same under every budget
        asked += [(FALLBACK, self.config.cap)] if FALLBACK in self.policies else []
        for name, budget in asked:
            capped = Capped(self.indexer, calibrated(self.indexer), budget, Fallback()) if name == FALLBACK else None
            keep = capped or best(known[name], budget or 1.0)
            watch = foresight.watch if name == "full" and "oracle" in self.policies else None
            answer, usage = self._go_on(session.fork(), keep, given, most, measure, watch)
            run = {
                "policy": name,
                "budget": budget,
                "kept": usage.kept_share,
                "kv_bytes": usage.mean_bytes,
                "chunks": usage.resident / usage.steps / session.chunking.tokens,
                "refreshes": usage.refreshes,
            }
            if capped is not None:
                run |= {"fallbacks": capped.served.count("full"), "windows": len(capped.served)}
            if measure is not None:
                run |= measure.finish()
            else:
                said = self.tokenizer.decode(answer, skip_special_tokens=True)
                response = example.prefix + said
                # MRCR demands its prefix; elsewhere, as in RULER, what the model was given earns nothing.
                scored = response if example.scorer == "sequence_ratio" else said
                run |= {"score": SCORERS[example.scorer](scored, example.references), "response": response}
            record["runs"].append(run)
        return record

    def _go_on(
        self,
        session: Session,
        keep: Keep | None,
        given: list[int],
        most: int,
        measure: "_Fidelity | None",
        watch: Callable[[Session], None] | None,
    ) -> tuple[list[int], Usage]:
        """Read `given`, then write at most `most` tokens greedily. Returns what was written and what was kept."""
        answer: list[int] = []
        rest = iter(given[1:])
        stop = stop_tokens(self.model, self.tokenizer)

        def follow(logits: torch.Tensor) -> int | None:
            if watch is not None:
                watch(session)
            if measure is not None:
                measure.add(logits)
            token = next(rest, None)
            if token is not None or len(answer) == most:
                return token
            answer.append(int(logits.argmax()))
            return None if answer[-1] in stop or len(answer) == most else answer[-1]

        run = Run(session, keep, follow)
        go_on([run], self.indexer.spec.window, given[0])
        return answer, run.usage


class _Fidelity:
    """Next-token agreement with full attention, KL from it in nats, and loss per token, one policy after the other.

    The first one measured is full attention itself. targets: the text's next tokens. Agreement and KL of a token are
    those of eval/decode/cycle.py `fidelity`.
    """

    def __init__(self, targets: list[int]) -> None:
        self._targets = targets
        self._full: list[torch.Tensor] = []
        self._sums: list[tuple[float, float, float]] = []

    def add(self, logits: torch.Tensor) -> None:
        place = len(self._sums)
        log_p = logits.float().log_softmax(dim=-1)
        if place == len(self._full):
            self._full.append(log_p)
        full = self._full[place]
        agrees, kl = fidelity(log_p, full)
        self._sums.append((float(agrees), float(kl), -float(log_p[self._targets[place]])))

    def finish(self) -> dict[str, float]:
        """Means over the text's tokens; ready for the next policy."""
        agreement, kl, loss = (sum(values) / len(values) for values in zip(*self._sums, strict=True))
        self._sums = []
        return {"agreement": agreement, "kl": kl, "loss": loss}
