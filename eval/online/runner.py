"""One example under every policy, from one prefill: answers are generated, texts are followed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_gen.backbones.layers import caches_latents
from data_gen.backbones.load import Backbone
from data_gen.core.errors import InputError
from eval.online.cycle import Course, go_on
from eval.online.examples import Example, TextExample, common
from eval.online.online_policies import (
    ONLINE_POLICIES,
    Capped,
    Circumstances,
    Foresight,
    OnlinePolicy,
    learned_keys,
)
from eval.online.records import Record, RunRecord
from eval.online.scorers import FOLLOWERS, SCORED_WITH_PREFIX, SCORERS, Follower
from eval.online.session import Session, open_session
from eval.runtime.correction import NO_KEYS, Correction
from eval.runtime.cycle import check_first
from indexer_train.model import MemoryIndexer


@dataclass(frozen=True)
class Runner:
    """Reads each example once with full attention, all but its last prompt token, then continues under every policy.

    The resident set is fixed before the last prompt token and every tau tokens after, so the first answer token
    already comes from sparse attention. Later turns are read under the policy, with the set that is resident; before
    the last token of each question it is fixed again. first_window: tokens until the next time, None: tau. With 1 the
    set is chosen again behind that token, as servers do, which read a prompt whole before they choose.

    policies: names of those asked for beside full attention; budgets: shares of the unprotected chunks;
    cap: the same of policies under a cap; thinking: chat templates with it; context: examples of more tokens are left
    out, None: none is; in_step: full attention reads in the same passes as the others. If not, it goes first and by
    itself, and the oracle may look at it. correction: of the policies that correct every step, None: they are not run;
    every run then says what it fetched. Reading one token rounds otherwise than reading one of each in a single
    pass: KL from full attention then contains that rounding, which shows in bf16. Raises InputError for a correction of
    a model that caches no keys of single heads, and for a first window longer than the indexer's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    indexer: MemoryIndexer
    policies: list[str]
    budgets: list[float]
    cap: float = 1.0
    thinking: bool = False
    context: int | None = None
    in_step: bool = False
    correction: Correction | None = None
    first_window: int | None = None

    def __post_init__(self) -> None:
        check_first(self.first_window, self.indexer.spec.window)
        if self.correction is not None and (learned_keys(self.indexer) or caches_latents(self.model)):
            raise InputError(NO_KEYS)

    @cached_property
    def prefill(self) -> "Prefill":
        """Reads the prompts."""
        return Prefill(lambda: open_session(self.model, self.indexer.spec))

    @cached_property
    def available(self) -> list[OnlinePolicy]:
        """The asked policies that this backbone and bundle have, in the order asked for."""
        known = {policy.name: policy for policy in ONLINE_POLICIES if policy.has(self.indexer)}
        known = {name: policy for name, policy in known.items() if self.correction or not policy.corrects}
        return [known[name] for name in self.policies if name in known]

    @cached_property
    def stop(self) -> set[int]:
        """Tokens that end an answer."""
        return stop_tokens(self.model, self.tokenizer)

    def run(self, example: Example | TextExample, after: Example | None = None) -> Record:
        """The record of one example; what its prompt shares with that of `after`, the next one, is read once.

        Raises InputError where the backbone's context ends before the answer does.
        """
        if isinstance(example, TextExample):
            place = len(example.tokens) - example.follow - 1
            prompt, given, most, asks = example.tokens[:place], example.tokens[place:-1], 0, [0]
            depth, left_out = None, ""
        else:
            ids = example.prompt(self.tokenizer, self.thinking)
            turns = example.turns(self.tokenizer, self.thinking)
            asks = [0, *accumulate(map(len, turns))]
            given = [ids[-1], *chain(*turns), *example.opening(self.tokenizer)]
            prompt, most = ids[:-1], example.answer_tokens
            depth, left_out = example.depth, example.left_out
        size = len(prompt) + len(given) + most
        if self.context is not None and size > self.context:
            left_out = f"longer than the backbone's context ({self.context} tokens)"
        runs = []
        if not left_out:
            shared = None if after is None else after.prompt(self.tokenizer, self.thinking)[:-1]
            lanes = self._lanes(self.prefill.read(prompt, shared), given, asks, most)
            text = isinstance(example, TextExample)
            measured = self._followed(example, lanes) if text else self._answered(example, lanes)
            runs = [self._told(lane, found) for lane, found in zip(lanes, measured, strict=True)]
        return Record(
            name=example.name,
            benchmark=example.benchmark,
            task=example.task,
            length=example.length,
            depth=depth,
            tokens=size,
            left_out=left_out,
            runs=runs,
        )

    def _lanes(self, session: Session, given: list[int], asks: list[int], most: int) -> list["_Lane"]:
        """The courses after a session's prompt, full attention first, then in the order of rows."""
        foresight = Foresight(self.indexer.spec.window)
        ranked, fixed, capped = (
            [policy for policy in self.available if policy.under == under] for under in ("budgets", "nothing", "cap")
        )
        asked: list[tuple[OnlinePolicy, float | None]] = [(each, budget) for budget in self.budgets for each in ranked]
        asked += [(policy, None) for policy in fixed]
        asked += [(policy, self.cap) for policy in capped]
        full = Course(session.fork(), None, given, most, asks=asks)
        if any(policy.foresees for policy in self.available):
            full.watchers.append(foresight.watch)
        lanes = [_Lane("full", None, full)]
        for policy, share in asked:
            given_share = 1.0 if share is None else share
            keep = policy.keep(Circumstances(self.indexer, foresight, given_share, self.correction))
            lanes.append(_Lane(policy.name, share, Course(session.fork(), keep, given, most, asks=asks)))
        return lanes

    def _go_on(self, lanes: list["_Lane"]) -> None:
        courses = [lane.course for lane in lanes]
        for together in [courses] if self.in_step else [courses[:1], courses[1:]]:
            go_on(together, self.indexer.spec.window, self.first_window)

    def _answered(self, example: Example, lanes: list["_Lane"]) -> list[dict[str, Any]]:
        """Score and response of each lane."""
        score = SCORERS[example.scorer]

        def said(answer: list[int]) -> tuple[float, str]:
            text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
            response = example.prefix + text
            return score(response if example.scorer in SCORED_WITH_PREFIX else text, example.references), response

        for lane in lanes:
            lane.course.ended = lambda answer: answer[-1] in self.stop or (example.until_right and said(answer)[0] == 1)
        self._go_on(lanes)
        return [dict(zip(("score", "response"), said(lane.course.answer), strict=True)) for lane in lanes]

    def _followed(self, example: TextExample, lanes: list["_Lane"]) -> list[dict[str, Any]]:
        """Agreement, kl and loss of each lane."""
        targets = example.tokens[len(example.tokens) - example.follow :]
        full = FOLLOWERS[example.scorer](targets, None)
        followers = [full, *(FOLLOWERS[example.scorer](targets, full) for _ in lanes[1:])]
        for lane, follower in zip(lanes, followers, strict=True):
            lane.course.watchers.append(partial(_add, follower))
        self._go_on(lanes)
        return [follower.means() for follower in followers]

    def _told(self, lane: "_Lane", measured: dict[str, Any]) -> RunRecord:
        usage, keep = lane.course.usage, lane.course.keep
        if isinstance(keep, Capped):
            windows = lane.course.windows
            fallen = sum("full" in window.served for window in windows)
            measured = {"fallbacks": fallen, "windows": len(windows)} | measured
        if self.correction is not None:
            means = lane.course.session.host.resident_bytes().means
            measured = {"fetched": usage.fetched / usage.steps, "mean_key_bytes": means} | measured
        return RunRecord(
            policy=lane.policy,
            budget=lane.budget,
            kept=usage.kept_share,
            kv_bytes=usage.mean_bytes,
            chunks=usage.resident / usage.steps / self.indexer.spec.chunking.tokens,
            refreshes=usage.refreshes,
            **measured,
        )


class _Lane(NamedTuple):
    """The course of one policy under one budget."""

    policy: str
    budget: float | None
    course: Course


def _add(follower: Follower, session: Session, logits: torch.Tensor) -> None:
    follower.add(logits)


def check_backbone(indexer: MemoryIndexer, backbone: Backbone) -> None:
    """Raise InputError unless the bundle was made for this very model."""
    if indexer.spec.backbone != backbone.info.fingerprint:
        raise InputError(
            f"the bundle is for a backbone with fingerprint {indexer.spec.backbone}, "
            f"but this model has {backbone.info.fingerprint}"
        )


class Prefill:
    """Reads prompts with full attention, one after the other. opened: makes a new session."""

    def __init__(self, opened: Callable[[], Session]) -> None:
        self._opened = opened
        self._tokens: list[int] = []
        self._session: Session | None = None

    def read(self, prompt: list[int], after: list[int] | None) -> Session:
        """A session that has read `prompt`; what it shares with the prompt `after` it is kept for that one."""
        have = len(self._tokens)
        if self._session is None or have > len(prompt) or prompt[:have] != self._tokens:
            self._session, self._tokens, have = None, [], 0
        session = self._opened() if self._session is None else self._session.fork()
        shared = 0 if after is None else common(prompt, after)
        if shared > have:
            session.read(prompt[have:shared])
            self._session, self._tokens, have = session.fork(), prompt[:shared], shared
        if have < len(prompt):
            session.read(prompt[have:])
        return session


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
