"""The part of `benchmarks.peers` that runs in this environment: the same token ids under sets of chunks."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import origin
from benchmarks.peers_journal import AnswerFile
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
            session, full = prefill.read(asked["prompt"], None), TokenByToken(asked.get("targets", []), None)
            if model.device.type == "cuda":  # what reading took, for other processes on the GPU
                torch.cuda.empty_cache()
            if asked["reading"] == "speed":  # the first pass warms up
                followed(asked, "full, here", session.fork(), None, indexer, TokenByToken(asked["targets"], None))
            for name in names:
                keep = kept(OURS[name], indexer, recipe.decode.budget, correction)
                found = followed(asked, name, session.fork(), keep, indexer, full)
                if (asked["name"], name) not in finished.done:
                    finished.add(asked["name"], name, found | {"origin": made})


def followed(
    asked: dict[str, Any],
    name: str,
    session: Session,
    keep: Keep | None,
    indexer: MemoryIndexer,
    full: TokenByToken,
) -> dict[str, Any]:
    """What became of one question or text under one policy, from a session that has read its prompt. full: compares
    texts, fed by the first policy, full attention."""
    assert isinstance(session, DenseSession)
    a_token, held = session.resident_bytes / len(asked["prompt"]), []
    stop, asks = set(asked["stop"]), [0, *([] if name == LEFT else asked["again"])]
    course = Course(session, keep, asked["given"], asked["most"], lambda said: said[-1] in stop, asks=asks)
    course.watchers.append(lambda session, logits: held.append(session.resident_bytes))
    follower = full if keep is None else TokenByToken(asked.get("targets", []), full)
    if asked["most"] == 0:
        course.watchers.append(lambda session, logits: follower.add(logits))
    began = clock(session)
    go_on([course], indexer.spec.window)
    seconds, steps = clock(session) - began, course.usage.steps
    moved = course.usage.fetched * indexer.spec.chunking.tokens * a_token
    found = {"said": course.answer, "kept": held[0] / a_token / (len(asked["prompt"]) + 1), "bytes": held[0]}
    found |= {"index": index_bytes(session, OURS[name], indexer), "moved": moved / steps, "seconds": seconds / steps}
    if asked["most"] == 0:
        means = follower.means()
        found |= {"kl": means["kl"], "agreement": means["agreement"]}
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
