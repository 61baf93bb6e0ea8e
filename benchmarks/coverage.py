"""Keeping by coverage, by a threshold and by a budget, at equal mean shares and at lengths not calibrated on.

    python -m benchmarks.coverage pocket --bundle recipes/pocket_v4/bundle --share 0.03 --length 1024 2048 4096
    python -m benchmarks.coverage smollm2 --recipe smollm2-quickstart --bundle runs/quickstart/bundle --length 1024 2048

`coverage` takes the scores for a distribution over the candidates and keeps the fewest whose predicted share reaches p.
Layers that are joined by their sum have one each, and it takes the mean of their logits; `sharp coverage` takes the sum
itself, which is what a bundle is served by (`Coverage` in indexer_train/selection.py). Each rule keeps at least a
quarter and at most four times the mean share. Its one setting is calibrated on documents of --calibrate tokens to a
mean share of the chunks, mean over tasks. On other documents of each --length it is then compared, text by text, with
the budget that keeps as much of all of them in the mean: what is left is what it gains by giving more to some windows
than to others. Questions are right where the model says what it says under full attention, token by token, and that is
right; of texts the last tokens are followed. Windows are read at once with what is resident.

Demand fallback: each rule, without those limits, is calibrated so that a part --rate of the sparse questions asks for
more than --share. Such windows get full attention, others the best that this share allows. The dense questions (all
steps of `copy`, MRCR) should ask for more.

Without --recipe the documents are of the pocket language (recipes/pocket), else those of `lookahead benchmark`. NAME is
the part of --output that is written.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks import results_tables
from benchmarks.asked import Asked, at_length, right
from benchmarks.coverage_rules import BUDGET, Count, Rule, Scored, by_budget, limited, rules_of
from benchmarks.fallback import POCKET
from benchmarks.machine import origin
from data_gen.backbones.load import load_backbone, resolve
from data_gen.config import BackboneConfig
from data_gen.core.files import write_atomically
from data_gen.traces.labels import candidates
from eval.online.online_policies import indexer_policy
from eval.online.runner import Prefill, stop_tokens
from eval.online.scorers import fidelity
from eval.online.session import Session, open_session
from indexer_train.formats.bundle import load_bundle
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import select
from recipes import load_recipe
from recipes.pocket.config import load_config
from recipes.pocket.documents import ASKED
from recipes.pocket.tasks import test_documents, training_document
from recipes.pocket.words import build_lexicon

KINDS = {"text": "text", "copy": "dense", "mrcr": "dense"}
"""Task -> its kind; all other questions are sparse."""
TASKS = ["single", "multi_key", "multi_value", "mrcr", "text"]
"""What is asked of a recipe's backbone."""
FOLLOWED = 128
"""Tokens followed of a text: two windows."""


@dataclass(frozen=True)
class Read:
    """A document that full attention has gone through.

    text: what its questions share; kind: sparse, dense or text; session: after the prompt; tokens: read behind it;
    answer: first row of the answer; right: whether full attention's is; full: its log-probabilities [tokens, V];
    windows: as it met them; known: where there is one window, what was measured with so many chunks kept.
    """

    text: str
    task: str
    kind: str
    session: Session
    tokens: list[int]
    answer: int
    right: bool
    full: torch.Tensor
    windows: list[Scored]
    known: dict[int, dict[str, float]] = field(default_factory=dict)


class Reader:
    """Reads documents under full attention and under rules."""

    def __init__(self, model: Any, tokenizer: Any, indexer: MemoryIndexer) -> None:
        self.model, self.tokenizer, self.indexer = model, tokenizer, indexer
        self.scores, self.stop = indexer_policy(indexer), stop_tokens(model, tokenizer)

    def read(self, documents: Sequence[tuple[str, Asked]]) -> Iterator[Read]:
        """Each document under full attention; a question's answer is what that says."""
        prefill = Prefill(lambda: open_session(self.model, self.indexer.spec))
        for (text, asked), after in zip(documents, [*documents[1:], None], strict=False):
            session = prefill.read(asked.prompt, None if after is None else after[1].prompt)
            said = self._answer(session.fork(), asked)
            windows: list[Scored] = []
            tokens = [*asked.given, *said[:-1]]
            full = self.follow(session, tokens, None, windows)
            correct = right(self.tokenizer.decode(said), asked.values) if asked.values else True
            kind, answer = KINDS.get(asked.task, "sparse"), len(asked.given) - 1 if asked.values else 0
            yield Read(text, asked.task, kind, session, tokens, answer, correct, full, windows)

    def follow(
        self, session: Session, tokens: list[int], count: Callable[[Scored], int] | None, windows: list[Scored]
    ) -> torch.Tensor:
        """Log-probabilities [tokens, V] of a fork, refreshed every window; count None: everything is kept.

        windows: what was chosen from is added.
        """
        session, rows = session.fork(), []
        for piece in torch.tensor(tokens, device=self.model.device).split(self.indexer.spec.window):
            scores = self.scores(session)[None]
            candidate = candidates(torch.tensor([session.position]), session.chunking, scores.shape[1])
            found = Scored(scores[candidate].double().sort(descending=True).values, scores.shape[1])
            if count is not None:
                kept = ~candidate | select(scores, candidate, torch.tensor([count(found)]))
                session.host.keep([kept[0].nonzero().flatten()])
            windows.append(found)
            with torch.no_grad(), session.host.attached():
                logits = self.model(piece[None], past_key_values=session.host.cache).logits[0]
            rows.append(logits.float().log_softmax(dim=-1))
        return torch.cat(rows)

    def _answer(self, session: Session, asked: Asked) -> list[int]:
        """What full attention says; nothing of a text."""
        said: list[int] = []
        tokens = asked.given
        while len(said) < asked.most:
            said.append(int(session.read(tokens).argmax()))
            tokens = said[-1:]
            if said[-1] in self.stop or right(self.tokenizer.decode(said), asked.values):
                break
        return said

    def ask(self, read: Read, count: Callable[[Scored], int]) -> dict[str, float]:
        """What is kept of a document's chunks beside the protected ones, and what the model still says."""
        first = count(read.windows[0])
        if len(read.windows) == 1 and first in read.known:
            return read.known[first]
        windows: list[Scored] = []
        found = self.follow(read.session, read.tokens, count, windows)
        agrees, kl = fidelity(found[read.answer :], read.full[read.answer :])
        kept = float(np.mean([count(window) / window.visible for window in windows]))
        measured = {"kept": kept, "kl": float(kl.mean())}
        if read.kind != "text":
            measured["right"] = float(read.right and bool(agrees.all()))
        if len(read.windows) == 1:
            read.known[first] = measured
        return measured


def share_kept(reads: Sequence[Read], count: Count, setting: float) -> float:
    """Mean over tasks of their documents' mean share."""
    tasks = defaultdict(list)
    for read in reads:
        tasks[read.task].append(np.mean([count(window, setting) / window.visible for window in read.windows]))
    return float(np.mean([np.mean(shares) for shares in tasks.values()]))


def falls_back(read: Read, count: Count, setting: float, cap: float) -> bool:
    """Whether a question asks for more than the cap, a share of the visible chunks."""
    window = read.windows[0]
    return count(window, setting) > by_budget(window, cap)


def sparse_fallbacks(reads: Sequence[Read], cap: float, count: Count, setting: float) -> float:
    """Part of the sparse questions that falls back."""
    return float(np.mean([falls_back(read, count, setting, cap) for read in reads if read.kind == "sparse"]))


Settings = dict[str, tuple[Count, float]]
"""Rule -> what it counts, its setting."""


def calibrated(
    reads: Sequence[Read], rules: dict[str, Rule], share: float, rate: float
) -> tuple[Settings, Settings]:  # fmt: skip
    """(The rules within limits that keep a mean share, those by which a part `rate` of the sparse questions asks for
    more than that)."""
    kept, demand = {}, {}
    for name, rule in rules.items():
        held = replace(rule, count=limited(rule.count, share))
        kept[name] = held.count, held.calibrated(partial(share_kept, reads), share)
        demand[name] = rule.count, rule.calibrated(partial(sparse_fallbacks, reads, share), rate)
    return kept, demand


def compared(reader: Reader, reads: Sequence[Read], rules: Settings, share: float) -> list[dict[str, Any]]:
    """A row per kind of document and rule, beside the budget that keeps as much of all documents in the mean; first
    comes the budget of `share` itself."""
    asked = {"budget": (by_budget, share), **rules}
    for name, chosen in rules.items():
        alike = BUDGET.calibrated(partial(share_kept, reads), share_kept(reads, *chosen))
        asked[f"beside {name}"] = by_budget, alike
    found: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = defaultdict(lambda: defaultdict(dict))
    for read in reads:
        for name, (count, setting) in asked.items():
            measured = reader.ask(read, partial(count, setting=setting))
            found[read.kind][name].setdefault(read.text, []).append(measured)
    rows = []
    for kind, runs in found.items():
        for name in ("budget", *rules):
            own, other = runs[name], runs.get(f"beside {name}", runs[name])
            row: dict[str, Any] = {"kind": kind, "rule": name, "setting": asked[name][1], "texts": len(own)}
            for metric in next(iter(own.values()))[0]:
                values, others = (
                    np.array([np.mean([each[metric] for each in of[text]]) for text in own]) for of in (own, other)
                )
                row |= {metric: float(values.mean()), f"{metric}_of_budget": float(others.mean())}
                row[f"{metric}_beside"] = [float(each[0]) for each in bootstrap_means((values - others)[:, None])]
            rows.append(row)
    return rows


def fallen(reader: Reader, reads: Sequence[Read], rules: Settings, cap: float) -> list[dict[str, Any]]:
    """A row per kind of question and rule: how many fall back, how many are right with it, and both beside the first
    rule on the same questions."""
    rows = []
    for kind in ("sparse", "dense"):
        asked = [read for read in reads if read.kind == kind]
        under = np.array([reader.ask(read, partial(by_budget, setting=cap))["right"] for read in asked])
        full = np.array([float(read.right) for read in asked])
        found = {"never": (cap, np.zeros(len(asked)), under)}
        for name, (count, setting) in rules.items():
            falls = np.array([float(falls_back(read, count, setting, cap)) for read in asked])
            found[name] = setting, falls, np.where(falls, full, under)
        _, first_falls, first_solved = found[next(iter(rules))]
        for name, (setting, falls, solved) in found.items():
            row: dict[str, Any] = {"kind": kind, "rule": name, "setting": setting, "questions": len(asked)}
            row |= {"fallbacks": int(falls.sum()), "right": int(solved.sum()), "right_full": int(full.sum())}
            for metric, gap in (("fallbacks", falls - first_falls), ("right", solved - first_solved)):
                row[f"{metric}_beside"] = [float(each[0]) for each in bootstrap_means(gap[:, None])]
            rows.append(row)
    return rows


def pocket_documents(tokenizer: Any, length: int, count: int, seed: str) -> Iterator[tuple[str, Asked]]:
    """`count` texts of a length with a question of each kind, and as many chats to follow, in the pocket language."""
    config, rng = load_config(Path(resolve(f"{POCKET}/config.yaml"))), Random(f"{seed} {length}")
    lexicon = build_lexicon(config.vocabulary)
    for number in range(count):
        for each in test_documents(lexicon, ASKED, length, min(config.evaluation.distractors, length // 64), rng):
            ids, words = tokenizer(each.prompt).input_ids, each.answer.split()
            values = words[::2] if each.task == "multi_value" else [" ".join(words)]
            asked = Asked(each.task, length, each.task, ids[:-1], ids[-1:], len(words), values)
            yield f"asked {number}", asked
    for number in range(count):
        words, _ = training_document(lexicon, length, config.far, rng)
        ids = tokenizer(" ".join(words)).input_ids
        place = len(ids) - FOLLOWED - 1
        yield f"text {number}", Asked("text", length, "text", ids[:place], ids[place:-1], 0, [])


def recipe_documents(recipe: Any, tokenizer: Any, length: int, count: int, name: str) -> Iterator[tuple[str, Asked]]:
    """What `lookahead benchmark` asks at a length, `count` of each task, for one of the ablation's sets."""
    settings = recipe.benchmark.model_copy(update={"tasks": TASKS, "examples": count, "texts": count})
    recipe = recipe.model_copy(update={"benchmark": settings})
    source = ["stdlib"] if name == "development" else None
    for build in at_length(recipe, name, source, [length], TASKS, FOLLOWED, tokenizer):
        asked = build()
        yield asked.name, asked


def main() -> None:
    """Calibrate, compare, print; --output holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the part that is written to --output")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--calibrate", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--length", type=int, nargs="+", required=True)
    parser.add_argument("--texts", type=int, default=8, help="of each length, and questions of each kind")
    parser.add_argument("--share", type=float, default=0.125, help="of the chunks, in the mean")
    parser.add_argument("--rate", type=float, default=0.1, help="part of the sparse questions that may fall back")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    indexer = load_bundle(args.bundle)
    recipe = load_recipe(args.recipe) if args.recipe else None
    model, tokenizer = load_backbone(BackboneConfig(path=f"{POCKET}/model") if recipe is None else recipe.backbone)
    reader = Reader(model, tokenizer, indexer.to(model.device))

    def read(length: int, name: str) -> list[Read]:
        given = (tokenizer, length, args.texts, name)
        return list(reader.read([*(pocket_documents(*given) if recipe is None else recipe_documents(recipe, *given))]))

    kept, demand = calibrated(read(args.calibrate, "development"), rules_of(indexer), args.share, args.rate)
    part: dict[str, Any] = {"origin": origin(model.device), "calibrated": args.calibrate, "share": args.share}
    part |= {"rate": args.rate, "rows": [], "fallback": []}
    for length in args.length:
        reads = read(length, "report")
        part["rows"] += [{"length": length, **row} for row in compared(reader, reads, kept, args.share)]
        part["fallback"] += [{"length": length, **row} for row in fallen(reader, reads, demand, args.share)]
    print("\n\n".join(results_tables.coverage({args.name: part})))
    if args.output:
        whole = json.loads(args.output.read_text()) if args.output.exists() else {}
        text = json.dumps(whole | {args.name: part}, indent=1) + "\n"
        write_atomically(args.output, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
