"""What `benchmarks.peers` found: the settings chosen on development examples, rows with intervals, tables."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from data_gen.core.errors import InputError
from eval.online.scorers import string_match_all
from eval.online.summary import bootstrap, interval, paired
from eval.report.tables import Table

READINGS = {
    "known": "question known when compressing",
    "unknown": "question unknown when compressing",
    "second": "second question about the same document",
    "text": "text to follow, KL from full attention in nats",
}
INDEXER = "indexer"
Answers = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Reading -> method -> example -> what became of it."""


def answers(folder: Path, so_far: bool = False) -> Answers:
    """All answers of a folder, with a `value`: the score of a question, the KL of a text.

    so_far: of questions and texts that every method has answered. Raises InputError for a folder in which questions
    are without answers, and `so_far` where no question has all.
    """
    plan = {each["name"]: each for each in map(json.loads, (folder / "plan.jsonl").read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "weights")
    found: Answers = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("answers-*.jsonl")):
        for answer in map(json.loads, path.read_text().splitlines()):
            asked = plan[answer["name"]]
            if "failed" not in answer:
                said = str(tokenizer.decode(answer["said"], skip_special_tokens=True))
                value = answer.get("kl") if asked["most"] == 0 else string_match_all(said, asked["references"])
                answer |= {"value": value, "text": said}
            found[asked["reading"]][answer["method"]][answer["name"]] = answer
    if so_far:
        found = {reading: both for reading, methods in found.items() if (both := everywhere(methods))}
        if not found:
            raise InputError(f"{folder}: there is nothing yet that every method has answered")
        return found
    for reading, methods in found.items():
        expected = sum(asked["reading"] == reading for asked in plan.values())
        if short := [method for method, given in methods.items() if len(given) < expected]:
            raise InputError(
                f"{folder}: {short[0]} has not answered every question ({reading}); call again with a recipe"
            )
    return found


def everywhere(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The answers to what all methods of a reading have answered; nothing where the indexer or there is none."""
    shared = set.intersection(*map(set, methods.values())) if INDEXER in methods else set()
    return {
        method: {name: answer for name, answer in given.items() if name in shared} for method, given in methods.items()
    } if shared else {}  # fmt: skip


def best(folder: Path, peers: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, int]]:
    """Reading -> method -> number of the setting with the best mean; the earlier one where two are equal, and settings
    that fail on any example never."""
    found: dict[str, dict[str, int]] = {}
    for reading, methods in answers(folder).items():
        worth = {
            method: np.mean([each["value"] for each in given.values()]) * (-1 if reading == "text" else 1)
            for method, given in methods.items()
            if not any("failed" in each for each in given.values())
        }
        found[reading] = {
            name: max(numbers, key=lambda number, name=name: (worth[f"{name}/{number}"], -number))
            for name, members in peers.items()
            if (numbers := [number for number in range(len(members)) if f"{name}/{number}" in worth])
        }
    return found


def rows(
    out: Path, peers: Mapping[str, Sequence[Any]], ours: Mapping[str, str], so_far: bool = False
) -> dict[str, Any]:
    """`origins`, one an environment under the command that asked; `rows`, one a reading, method and setting.

    score: [mean, low, high] of a question, Wilson's interval where every score is 0 or 1, else a bootstrap's; kl: the
    same of a text; lead: the indexer's minus the method's on the same examples, with a bootstrap over pairs; kept:
    share of the prompt's keys and values on the device; kv_mb, index_mb: those, and what choosing needs beside them;
    moved_mb: from the host, a token read or written; seconds: a token, nothing beside it; failed: examples, and why.
    so_far: the questions and texts that every method has answered, and no seconds where those were not taken.
    """
    chosen, found = json.loads((out / "chosen.json").read_text()), []
    report = answers(out / "report", so_far)
    timed = not so_far or any((out / "speed").glob("answers-*.jsonl"))
    speed = answers(out / "speed", False).get("speed", {}) if timed else {}
    command = {"command": (out / "command").read_text()}
    origins = dict.fromkeys(
        json.dumps(each["origin"] | command)
        for methods in report.values()
        for given in methods.values()
        for each in given.values()
    )
    for reading in [reading for reading in READINGS if not so_far or reading in report]:
        methods = report[reading]
        named = [f"{name}/{n}" for name in peers for n in range(len(peers[name])) if f"{name}/{n}" in methods]
        for method in [*[name for name in ours if name in methods], *named]:
            name, _, number = method.partition("/")
            given = methods[method]
            worked = [example for example, each in given.items() if "failed" not in each]
            row: dict[str, Any] = {"reading": reading, "method": name, "examples": len(given)}
            if number:
                row |= {"setting": peers[name][int(number)], "shipped": number == "0"}
                row |= {"chosen": int(number) == chosen[reading].get(name)}
            if why := [each["failed"] for each in given.values() if "failed" in each]:
                row |= {"failed": len(why), "why": Counter(why).most_common(1)[0][0]}
            if worked:
                row |= measured(given, methods[INDEXER], methods["full, here"], worked, reading)
                taken = [each["seconds"] for each in speed.get(method, {}).values() if "failed" not in each]
                row |= {"seconds": float(np.mean(taken))} if taken else {}
            found.append(row)
    return {"origins": [json.loads(each) for each in origins], "chosen": chosen, "rows": found}


def measured(
    given: dict[str, Any], indexer: dict[str, Any], full: dict[str, Any], worked: list[str], reading: str
) -> dict[str, Any]:
    """A row's figures over the examples that worked."""

    def column(answers: dict[str, Any], name: str) -> np.ndarray:
        return np.array([answers[example][name] for example in worked], float)

    values = column(given, "value")
    difference = paired(column(indexer, "value"), values)
    means = {name: float(column(given, name).mean()) for name in ("kept", "bytes", "index", "moved")}
    row = {"lead": list(difference), "kept": means["kept"], "kv_mb": means["bytes"] / 1e6}
    row |= {"index_mb": means["index"] / 1e6, "moved_mb": means["moved"] / 1e6}
    if reading == "text":
        return row | {"kl": list(bootstrap(values)), "agreement": float(column(given, "agreement").mean())}
    same = sum(given[example]["text"] == full[example]["text"] for example in worked)
    return row | {"score": [float(values.mean()), *interval(values)], "same_as_full": same}


def described(setting: Any) -> str:
    """A setting in a few words."""
    if not isinstance(setting, dict):
        return str(setting)
    inner = described(setting["press"]) if "press" in setting else ""
    name = setting["class"].removesuffix("Press") + (f"({inner})" if inner else "")
    fields = [f"{field} {value}" for field, value in setting.items() if field not in ("class", "press")]
    return " ".join([name, *fields])


def summary(found: Sequence[dict[str, Any]], unasked: Iterable[str] = ()) -> str:
    """One line a method, one column a reading: mean as shipped, then that of the chosen setting, where it is another;
    bold: ahead of the indexer, interval and all."""

    def cell(row: dict[str, Any]) -> str:
        if "kept" not in row:
            return "failed"
        (mean, *_), (_, low, high) = row["kl" if row["reading"] == "text" else "score"], row["lead"]
        ahead = low is not None and (low > 0 if row["reading"] == "text" else high < 0)
        return f"**{mean:.3f}**" if ahead else f"{mean:.3f}"

    readings, lines = dict.fromkeys(row["reading"] for row in found), []
    for method in dict.fromkeys(row["method"] for row in found):
        members = [row for row in found if row["method"] == method]
        cells = [", ".join(cell(row) for row in members if row["reading"] == reading) or "-" for reading in readings]
        lines.append([method, *cells])
    lines += [[method, *["not asked"] * len(readings)] for method in unasked]
    counts = {row["reading"]: row["examples"] for row in found}
    return str(Table(["method", *(f"{reading} ({counts[reading]})" for reading in readings)], lines))


def tables(found: Sequence[dict[str, Any]], unasked: Mapping[str, str] | None = None) -> str:
    """A table a reading: as shipped, then the chosen setting where it is another; peers that win say so.

    unasked: method -> why it was not asked, a line in every table.
    """
    unasked = unasked or {}

    def triple(value: Sequence[float | None]) -> str:
        mean, low, high = value
        return "-" if mean is None else f"{mean:.3f}" if low is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    def figures(row: dict[str, Any]) -> list[Any]:
        if "kept" not in row:
            return [f"failed: {row['why']}", *["-"] * 6]
        lead, low, high = row["lead"]
        better = row["reading"] == "text"
        wins = "" if low is None or row["method"] == INDEXER else "yes" if (low > 0 if better else high < 0) else (
            "no" if (high < 0 if better else low > 0) else "open")  # fmt: skip
        score = triple(row["kl" if better else "score"]) + (f" ({row['failed']} failed)" if "failed" in row else "")
        ahead = "-" if low is None else f"{lead:+.3f} [{low:+.3f}, {high:+.3f}]"
        held = f"{row['kv_mb']:.2f} + {row['index_mb']:.2f}"
        seconds = f"{row['seconds'] * 1e3:.0f}" if "seconds" in row else "-"
        return [score, ahead, wins, f"{row['kept']:.1%}", held, row["moved_mb"], seconds]

    tail = ["indexer minus it", "it wins", "KV kept", "KV + index, MB", "MB moved a token", "ms a token"]
    parts = []
    for reading, count in {row["reading"]: row["examples"] for row in found}.items():
        lines = []
        for row in [row for row in found if row["reading"] == reading]:
            setting = "" if row.get("shipped", True) else described(row["setting"])
            lines.append([row["method"], setting, *figures(row)])
        lines += [[method, "", f"not asked: {why}", *["-"] * 6] for method, why in unasked.items()]
        head = ["method", "setting", "KL" if reading == "text" else "right", *tail]
        parts.append(f"{READINGS[reading]}, {count} examples\n\n{Table(head, lines)}")
    return "\n\n".join([*parts, summary(found, unasked)])
