"""What a user would pick instead: kvpress's methods and page selection beside the indexer, at the same bytes of KV.

    python -m benchmarks.peers smollm2-quickstart --bundle runs/quickstart/bundle --kvpress .venv-kvpress/bin/python \\
        --out runs/peers [--length 2000] [--examples 16] [--texts 8] [--development 6] [--correction 8] \\
        [--second 16] [--processes 1] [--method NAME ...] [--chosen OTHER/chosen.json] [--write]
    python -m benchmarks.peers --out runs/peers [--so-far]

kvpress 0.5.5 needs transformers below 5.3: an environment of its own (`make .venv-kvpress/ready`), of which only the
interpreter is told. The weights are written as safetensors first, since those versions misread GGUF files; token ids
go in, token ids come back. Asked are the examples of `lookahead benchmark`, whose wordings, key words and text training
has not seen, in three readings:

    known    the prompt is compressed with its question in it
    unknown  the document is compressed before the question is read (kvpress's convention)
    second   known, then the first question's answer and another question about the same document are read

and texts to follow. What is evicted is gone; what is recallable (the indexer, pages, mean-pooled keys, recency) is
chosen again after each question. Every method has the indexer's share of the prompt's keys and values, once as shipped
and once with the best of a few settings, chosen on other examples (another seed) for each reading (for `second` as for
`known`). Prints the tables of OUT, which a stopped run continues; OUT/peers.json holds every row. --write asks nothing:
processes started by hand answer OUT/report and OUT/speed, `python -m benchmarks.peers_kvpress OUT/report K/N` in that
environment and this one's own command with `--out OUT/report --share K/N` in this; more folders may follow the first of
either, for runs of several lengths.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import origin
from benchmarks.peers_examples import asked, weights
from benchmarks.peers_ours import OURS, answer
from benchmarks.peers_rows import best, rows, tables
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from recipes import load_recipe

Setting = dict[str, Any] | None

SNAP = {"class": "SnapKVPress"}
ASKING = {"class": "SnapKVPress", "window_size": "question"}
EXPECTED = {"class": "ExpectedAttentionPress"}


def wrapped(name: str, inner: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A press around another."""
    return {"class": f"{name}Press", "press": inner, **settings}


PEERS: dict[str, list[Setting]] = {
    "full": [None],
    "SnapKV": [SNAP, ASKING, SNAP | {"window_size": 32}, SNAP | {"kernel_size": 15}, ASKING | {"kernel_size": 15}],
    "ExpectedAttention": [EXPECTED, EXPECTED | {"n_future_positions": 64}, EXPECTED | {"use_covariance": False},
                          EXPECTED | {"epsilon": 0.01}, wrapped("ChunkKV", EXPECTED, chunk_length=16)],
    "TOVA": [{"class": "TOVAPress"}, wrapped("ChunkKV", {"class": "TOVAPress"}, chunk_length=16)],
    "StreamingLLM": [{"class": "StreamingLLMPress"}, {"class": "StreamingLLMPress", "n_sink": 16}],
    "Knorm": [{"class": "KnormPress"}, wrapped("ChunkKV", {"class": "KnormPress"}, chunk_length=16)],
    "KeyDiff": [{"class": "KeyDiffPress"}, wrapped("Block", {"class": "KeyDiffPress"}),
                wrapped("ChunkKV", {"class": "KeyDiffPress"}, chunk_length=16)],
    "KVzip": [{"class": "KVzipPress"}, {"class": "KVzipPress", "kvzip_plus_normalization": True},
              {"class": "KVzipPress", "layerwise": True}],
    "AdaKV(SnapKV)": [wrapped("AdaKV", SNAP), wrapped("AdaKV", ASKING), wrapped("AdaKV", SNAP, alpha_safeguard=0.5)],
    "AdaKV(ExpectedAttention)": [wrapped("AdaKV", EXPECTED), wrapped("AdaKV", EXPECTED | {"epsilon": 0.01})],
    "CriticalKV(SnapKV)": [wrapped("CriticalKV", SNAP), wrapped("CriticalKV", ASKING)],
    "CriticalAdaKV(SnapKV)": [wrapped("CriticalAdaKV", SNAP), wrapped("CriticalAdaKV", ASKING)],
    "ChunkKV(SnapKV)": [wrapped("ChunkKV", SNAP), wrapped("ChunkKV", ASKING),
                        wrapped("ChunkKV", ASKING, chunk_length=10), wrapped("ChunkKV", ASKING, chunk_length=32),
                        wrapped("ChunkKV", SNAP | {"window_size": 32})],
    "Compactor": [{"class": "CompactorPress"}],
    "Quest": [{"class": "quest", "page": 16}, {"class": "quest", "page": 16, "dense": 0},
              {"class": "quest", "page": 8, "dense": 0}],
}  # fmt: skip
"""Method -> its settings, as shipped first. "question": as many tokens as the question has, where it is known."""


def settings(reading: str, methods: Iterable[str], chosen: dict[str, dict[str, int]] | None) -> dict[str, Setting]:
    """METHOD/NUMBER of a setting -> the setting: all that fit a reading, or the shipped and the chosen ones."""
    found = {}
    for name in methods:
        members = PEERS[name]
        numbers = range(len(members)) if chosen is None else sorted({0, chosen[reading].get(name, 0)})
        for number in numbers:
            if reading in ("known", "second") or '"question"' not in json.dumps(members[number]):
                found[f"{name}/{number}"] = members[number]
    return found


def plan(
    out: Path, lines: Iterable[dict[str, Any]], methods: Iterable[str], chosen: dict[str, dict[str, int]] | None
) -> None:
    """Write what is asked, with the methods that answer it. Raises InputError where something else was asked before."""
    told = [each | {"methods": settings(each["reading"], methods, chosen)} for each in lines]
    content = "".join(json.dumps(each) + "\n" for each in told)
    path = out / "plan.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() != content:
        raise InputError(f"{path}: something else was asked there; choose another --out, or remove {out}")
    write_atomically(path, lambda file: file.write_text(content))


def side_by_side(commands: list[list[str]]) -> None:
    """Run commands at once. Raises InputError where one fails; what it said is above."""
    going = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for command in commands]
    if failed := [process.args for process in going if process.wait()]:
        raise InputError(f"stopped: {failed[0]}")


def main() -> None:
    """Ask what is not answered yet, choose settings in between, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="without one nothing is asked")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--kvpress", help="the interpreter of an environment with kvpress")
    parser.add_argument("--out", type=Path, action="append", required=True, help="several only with --share")
    parser.add_argument("--length", type=int, action="append", help="tokens of an example; the recipe's longest")
    parser.add_argument("--examples", type=int, default=16, help="of each needle task and length")
    parser.add_argument("--second", type=int, help="second questions of each length; as many as --examples")
    parser.add_argument("--texts", type=int, default=8, help="of each length")
    parser.add_argument("--development", type=int, default=6, help="examples, and texts, to choose settings on")
    parser.add_argument("--follow", type=int, default=128, help="tokens followed of each text")
    parser.add_argument("--correction", type=int, default=0, metavar="CHUNKS", help="a row with a per-step correction")
    parser.add_argument("--processes", type=int, default=1, help="side by side in each environment")
    parser.add_argument("--method", action="append", choices=sorted({*PEERS} - {"full"}), help="only these of kvpress")
    parser.add_argument("--chosen", type=Path, help="chosen.json or peers.json of another call")
    parser.add_argument("--write", action="store_true", help="only write what is asked; needs --chosen")
    parser.add_argument("--so-far", action="store_true", help="tables of what every method has answered already")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out, *more = (each.resolve() for each in arguments.out)
    try:
        if arguments.share:
            share, shares = map(int, arguments.share.split("/"))
            answer(load_recipe(arguments.recipe), arguments.bundle, [out, *more], share, shares, arguments.correction)
            return
        if more or (arguments.write and not arguments.chosen):
            parser.error("several --out need --share" if more else "--write needs --chosen")
        if arguments.recipe:
            if not (arguments.bundle and arguments.kvpress):
                parser.error("a recipe needs --bundle and --kvpress")
            ask(arguments, out)
            if arguments.write:
                return
        if not (out / "chosen.json").exists():
            raise InputError(f"{out}: no answers there; ask with a recipe, --bundle and --kvpress")
        found = rows(out, PEERS, OURS, arguments.so_far)
    except InputError as error:
        parser.error(str(error))
    print(tables(found["rows"]))
    write_atomically(out / "peers.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))


def ask(arguments: argparse.Namespace, out: Path) -> None:
    """Write, choose on the development examples, then answer the reported ones; speed by itself, in one process."""
    recipe = load_recipe(arguments.recipe)
    lengths = arguments.length or [recipe.documents.tokens[1]]
    methods = ["full", *(name for name in PEERS if name in arguments.method)] if arguments.method else list(PEERS)
    seed, few = recipe.benchmark.seed, arguments.development
    sizes = {
        "development": {"examples": few, "texts": few, "seed": seed + 1},
        "report": {"examples": arguments.examples, "texts": arguments.texts},
    }
    model, tokenizer = weights(recipe, out / "weights")
    write_atomically(out / "command", lambda path: path.write_text(origin()["command"]))
    parts = {}
    for part, size in sizes.items():
        if part == "development" and arguments.chosen:
            continue
        config = recipe.benchmark.model_copy(update=size | {"text_tokens": arguments.follow})
        second = arguments.second if part == "report" else None
        parts[part] = asked(recipe, arguments.bundle, model, tokenizer, lengths, config, second)
    del model

    def run(part: str, ours: bool, processes: int) -> None:
        folder = str(out / part)
        told = [arguments.recipe, "--bundle", str(arguments.bundle.resolve()), "--out", folder]
        told += ["--correction", str(arguments.correction)]
        shares = [f"{share}/{processes}" for share in range(processes)]
        theirs = [[arguments.kvpress, "-m", "benchmarks.peers_kvpress", folder, share] for share in shares]
        mine = [[sys.executable, "-m", "benchmarks.peers", *told, "--share", share] for share in shares if ours]
        for commands in [theirs, mine] if processes == 1 else [theirs + mine]:
            side_by_side(commands)

    if arguments.chosen:
        chosen = json.loads(arguments.chosen.read_text())
        chosen = chosen.get("chosen", chosen)
    else:
        tried = [each for each in parts["development"] if each["reading"] in ("known", "unknown", "text")]
        plan(out / "development", tried, methods, None)
        run("development", False, arguments.processes)
        chosen = best(out / "development", PEERS)
        chosen["second"] = chosen["known"]  # the same is compressed
    write_atomically(out / "chosen.json", lambda path: path.write_text(json.dumps(chosen, indent=1) + "\n"))
    plan(out / "report", [each for each in parts["report"] if each["reading"] != "speed"], methods, chosen)
    timed = [each for each in parts["report"] if each["reading"] == "speed"]
    plan(out / "speed", timed, methods, chosen | {"speed": chosen["text"]})
    if arguments.write:
        return
    run("report", True, arguments.processes)
    run("speed", True, 1)


if __name__ == "__main__":
    main()
