"""Two checkouts of this project, one recipe: are their traces, weights and results equal to the last bit, and as fast?

    python -m benchmarks.before_after BEFORE AFTER smollm2-quickstart --output results.json
    python -m benchmarks.before_after BEFORE AFTER pocket-v4 --prepare recipes.pocket_v4.documents \
        --folder runs/pocket --benchmark --output results.json

The module that prepares is named as both checkouts have it: commits 198771a and 49df626, on either side of the
redesign, know this one; later ones have `recipes.pocket.documents recipes/pocket_v4`.

Each checkout runs the BEFORE checkout's recipe in its own folder, both at once; then `train`, `evaluate` and `decode`
are timed in CPU-seconds, the two checkouts by turns: a ratio above 1 says that AFTER is slower. Fields that only AFTER
writes are counted.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.machine import commit, origin

UNEQUAL = {"date", "commit", "recipe", "evaluated", "measured"}
"""Sections and fields that say how, where and when, not what was measured."""


def call(checkout: Path, *arguments: str) -> float:
    """CPU-seconds of `python -m ARGUMENTS` in a checkout, where nothing else is called meanwhile.

    Raises CalledProcessError when it fails.
    """
    began = cpu_seconds()
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", *arguments]
    subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": path}, check=True, stdout=sys.stderr)
    return cpu_seconds() - began


def cpu_seconds() -> float:
    """That all ended children took so far: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of every safetensors file below a folder: file:name -> dtype, shape and bytes."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name).contiguous()
                head = f"{tensor.dtype}{list(tensor.shape)}".encode()
                content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                found[f"{path.relative_to(folder)}:{name}"] = head + content
    return found


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word of a JSON value, by its place; those of UNEQUAL are left out."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in UNEQUAL:
                yield from leaves(part, f"{where}/{name}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from leaves(part, f"{where}/{index}")
    else:
        yield where, value


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How many places of `before` are equal in `after`, the first that are not, and how many `after` has beside."""
    missing = object()
    unequal = [name for name, value in before.items() if after.get(name, missing) != value]
    return {
        "compared": len(before),
        "unequal": len(unequal),
        "first_unequal": unequal[:5],
        "only_after": len(after.keys() - before.keys()),
    }


def read(path: Path) -> dict[str, Any]:
    """A JSON file's or a JSON-lines file's leaves; of what is missing none."""
    if not path.exists():
        return {}
    text = path.read_text()
    if path.suffix == ".jsonl":
        return dict(leaves([json.loads(line) for line in text.splitlines()]))
    return dict(leaves(json.loads(text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("recipe", help="a shipped recipe of BEFORE")
    parser.add_argument("--folder", type=Path, default=Path("runs/before_after"), help="output, in each checkout")
    parser.add_argument("--prepare", help="a module, and its arguments, that is run with --out FOLDER first")
    parser.add_argument("--benchmark", action="store_true", help="also `lookahead benchmark`, and its answers")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds of each verb and checkout")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    recipe, out = str(checkouts["before"] / "recipes" / f"{options.recipe}.yaml"), str(options.folder)

    def run(checkout: Path) -> None:
        if options.prepare:
            call(checkout, *options.prepare.split(), "--out", out)
        call(checkout, "cli", "run", recipe, "--out", out)
        if options.benchmark:
            call(checkout, "cli", "benchmark", f"{out}/bundle", "--recipe", recipe, "--out", out)

    with ThreadPoolExecutor() as both:
        list(both.map(run, checkouts.values()))
    before, after = (checkout / options.folder for checkout in checkouts.values())
    report: dict[str, Any] = {"recipe": options.recipe, "origin": origin()}
    report |= {name: commit(checkout) for name, checkout in checkouts.items()}
    for part in ("traces", "indexer"):
        report[part] = compare(tensors(before / part), tensors(after / part))
    for name in ("results.json", "answers.jsonl"):
        report[name] = compare(read(before / name), read(after / name))
    verbs = {
        "train": ["train", recipe, "--traces", f"{out}/traces/train", "--out", f"{out}-timed"],
        "evaluate": ["evaluate", recipe, "--traces", f"{out}/traces/heldout", "--indexer", f"{out}/indexer",
                     "--out", f"{out}-timed"],
        "decode": ["decode", recipe, "--bundle", f"{out}/bundle", "--out", f"{out}-timed"],
    }  # fmt: skip
    for verb, arguments in verbs.items() if options.rounds else ():
        seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(options.rounds):
            for name, checkout in checkouts.items():
                shutil.rmtree(checkout / f"{out}-timed", ignore_errors=True)
                seconds[name].append(call(checkout, "cli", *arguments))
        ratio = statistics.median(seconds["after"]) / statistics.median(seconds["before"])
        report[verb] = {"ratio": round(ratio, 3), "cpu_seconds": seconds}
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
