"""The part of `benchmarks.peers` that runs in this environment: the same token ids under sets of chunks."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import origin
from benchmarks.peers_journal import AnswerFile, begun
from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig
from eval.online.cycle import Course, Keep, go_on
from eval.online.online_policies import ONLINE_POLICIES, Circumstances, Foresight
from eval.online.runner import Prefill, check_backbone
from eval.online.scorers import TokenByToken
from eval.online.session import DenseSession, Session, open_session
from eval.runtime.correction import Correction
from indexer_train.formats.bundle import load_bundle
from indexer_train.model import MemoryIndexer
from recipes import Recipe

LEFT = "indexer, set left as it was"
"""The indexer whose set is not chosen again after a later question."""
CORRECTED = "indexer + correction"
OURS = {
    "full, here": "full",
    "indexer": "indexer",
    LEFT: "indexer",
    CORRECTED: "indexer+correction",
    "mean_pooled": "mean_pooled",
    "recency": "recency",
}
"""Method -> its policy. Full attention is read in both environments: the answers must be the same."""


def answer(recipe: Recipe, bundle: Path, folders: Sequence[Path], share: int, shares: int, correction: int) -> None:
    """Answer the K-th of N shares of each OUT/plan.jsonl; OUT/answers-ours-K.jsonl keeps what is finished.

    folders: the OUTs, one after the other, all with the same weights; correction: chunks of the budget that correct
    every step, in a row of its own; 0 for no such row.
    """
    indexer = load_bundle(bundle)
    model, _ = load_backbone(BackboneConfig(path=str(folders[0].parent / "weights"), dtype=recipe.backbone.dtype))
    check_backbone(indexer, adapter(model))
    made, prefill = origin(model.device), Prefill(lambda: open_session(model, indexer.spec))
    for out in folders:
        finished = AnswerFile(out / f"answers-ours-{share}.jsonl")
        plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
        for asked in tqdm(plan[share::shares], f"{out.name}, here", disable=share > 0):
            left_out = {*([] if asked["again"] else [LEFT]), *([] if correction else [CORRECTED])}
            names = [name for name in OURS if name not in left_out]
            if all((asked["name"], name) in finished.done for name in names):
                continue
            session = prefill.read(asked["prompt"], None)
            if model.device.type == "cuda":  # what reading took, for other processes on the GPU
                torch.cuda.empty_cache()
            keeps = {name: kept(OURS[name], indexer, recipe.decode.budget, correction) for name in names}
            if asked["reading"] == "speed":  # each by itself, and begun once before: the first steps set much up
                for name in names:
                    followed(begun(asked), session, {name: keeps[name]}, indexer)
                found = {name: followed(asked, session, {name: keeps[name]}, indexer)[name] for name in names}
            else:
                found = followed(asked, session, keeps, indexer)
            for name in names:
                if (asked["name"], name) not in finished.done:
                    finished.add(asked["name"], name, found[name] | {"origin": made})


def followed(
    asked: dict[str, Any], session: Session, keeps: dict[str, Keep | None], indexer: MemoryIndexer
) -> dict[str, dict[str, Any]]:
    """What became of one question or text under some methods, which go on in step, as in `lookahead benchmark`.

    session: has read the prompt; keeps: method -> what fixes its resident set, None for full attention, the first one,
    with which texts are compared. What is timed is not compared: kvpress's side compares after its clock has stopped.
    `seconds` are those of a step of all of them.
    """
    assert isinstance(session, DenseSession)
    a_token, asks = session.resident_bytes / len(asked["prompt"]), asked["again"]
    stop, targets, text = set(asked["stop"]), asked.get("targets", []), asked["reading"] == "text"
    full, courses = TokenByToken(targets, None), {}
    held: dict[str, list[int]] = {name: [] for name in keeps}
    followers = {name: full if keep is None else TokenByToken(targets, full) for name, keep in keeps.items()}

    def watch(name: str, session: Session, logits: torch.Tensor) -> None:
        held[name].append(session.resident_bytes)
        if text:
            followers[name].add(logits)

    for name, keep in keeps.items():
        places = [0, *([] if name == LEFT else asks)]
        course = Course(session.fork(), keep, asked["given"], asked["most"], lambda said: said[-1] in stop, asks=places)
        course.watchers.append(partial(watch, name))
        courses[name] = course
    began = clock(session)
    go_on(list(courses.values()), indexer.spec.window)
    seconds, found = clock(session) - began, {}
    for name, course in courses.items():
        own, steps = course.session, course.usage.steps
        assert isinstance(own, DenseSession)
        moved = course.usage.fetched * indexer.spec.chunking.tokens * a_token
        found[name] = {"said": course.answer, "kept": held[name][0] / a_token / (len(asked["prompt"]) + 1)}
        found[name] |= {"bytes": held[name][0], "index": index_bytes(own, OURS[name], indexer)}
        found[name] |= {"moved": moved / steps, "seconds": seconds / steps}
        if text:
            means = followers[name].means()
            found[name] |= {"kl": means["kl"], "agreement": means["agreement"]}
    return found


def kept(policy: str, indexer: MemoryIndexer, budget: float, correction: int) -> Keep | None:
    """What fixes one session's resident set, None for full attention."""
    if policy == "full":
        return None
    known: dict[str, Callable[[Circumstances], Keep]] = {each.name: each.keep for each in ONLINE_POLICIES}
    corrected = Correction(chunks=correction) if correction else None
    return known[policy](Circumstances(indexer, Foresight(indexer.spec.window), budget, corrected))


def clock(session: DenseSession) -> float:
    """Seconds, once the device has done all that it was given."""
    if session.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def index_bytes(session: DenseSession, policy: str, indexer: MemoryIndexer) -> int:
    """Bytes that stay on the device so that chunks can be chosen."""
    if policy.startswith("indexer"):
        return session.cache.chunk_keys(indexer.spec.layers).nbytes + session.host.resident_bytes().means
    if policy == "mean_pooled":
        return sum(pooler.pooled.nbytes for pooler in session.cache.pooled.values())
    return 0
