"""Make docs/results.md of benchmarks/results/*.json: no figure there is typed by hand.

    python -m benchmarks.results_page

A section names its file, what it says and its tables. The command, commit, machine and versions come from the file.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pocket_table import tables as pocket_tables
from eval.report.rows import DecodeRow
from eval.report.tables import Table, decode_table

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
Tables = Callable[[Any], list[str]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One file's part of the page. tables: what the file holds -> Markdown tables."""

    title: str
    file: str
    says: str
    tables: Tables


def listed(rows: Sequence[Row], columns: dict[str, str | Callable[[Row], Any]]) -> str:
    """A table of `rows`; columns: heading -> a key of the rows, or what is made of one."""
    cells = [[row.get(each) if isinstance(each, str) else each(row) for each in columns.values()] for row in rows]
    return str(Table(list(columns), cells))


def interval(key: str) -> Callable[[Row], str]:
    """[mean, low, high] of a row as text."""
    return lambda row: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[key]) if key in row else "-"


def share(key: str) -> Callable[[Row], str]:
    """A share of a row in percent."""
    return lambda row: f"{row[key]:.1%}"


def _ablations(data: Row) -> list[str]:
    names = {"set": "set", "tokens": lambda row: row["tokens"] or "-", "policy": "policy", "n": "documents"}
    texts = [row for row in data["rows"] if "kl" in row]
    questions = [row for row in data["rows"] if "right" in row]
    diagnoses = {"peak entropy": "peak_entropy", "golden recall": "golden_recall", "mass recall": "mass_recall"}
    if data["origins"][0]["command"].find("--length") > 0:
        diagnoses = {"chunks fetched a token": "fetched", "mean keys, MB": lambda row: row["mean_key_bytes"] / 1e6}
    beside = {"minus the recipe's": "recipe", "minus recency's": "recency"}
    return [
        "Text, KL from full attention:\n\n"
        + listed(texts, names | {"KL": "kl", "agreement": "agreement"}
                 | {head: interval(f"kl_beside_{name}") for head, name in beside.items()}
                 | {"KV kept": share("kept")} | diagnoses),
        "Questions answered:\n\n"
        + listed(questions, names | {"task": "task", "right": lambda row: round(row["right"] * row["documents"])}
                 | {"minus the recipe's": interval("right_beside_recipe"), "KV kept": share("kept")}),
        "Rank correlation (Spearman) of what held-back training documents said with the outcomes:\n\n"
        + listed(data["rank_correlations"], {"set": "set", "diagnosis": "diagnosis", "variations": "variations",
                                             "with needles right": "right", "with text KL": "kl"}),
    ]  # fmt: skip


def _at_length(data: Row) -> list[str]:
    return _ablations(data)[:1]


def _answers(data: Row) -> list[str]:
    rows = [row for row in data["rows"] if row["loss"].endswith(".25")]
    cells = {"tokens": "length", "task": "task", "policy": "policy", "budget": "budget", "n": "examples"}
    needles = [row for row in rows if row["task"] != "text"]
    texts = [row for row in rows if row["task"] == "text"]
    scored = {
        "right": lambda row: row["score"][0],
        "of those full attention finds": lambda row: row["score_of_solved"][0],
    }
    return [
        listed(needles, cells | scored | {"KV kept": share("kept")}),
        listed(texts, cells | {"KL": lambda row: row["kl"][0], "agreement": lambda row: row["agreement"][0],
                               "KV kept": share("kept")}),
    ]  # fmt: skip


def _recall(data: Row) -> list[str]:
    rows = [row for row in data["rows"] if row["loss"].endswith(".25") and row["budget"] == 0.1]
    columns = {"tokens": "length", "task": "task", "policy": "policy", "n": "documents", "mass recall": "mass_recall",
               "golden recall": "golden_recall"}  # fmt: skip
    return [listed(rows, columns)]


def _decode(data: Row) -> list[str]:
    times = {"stage": "stage", "backend": "backend", "us": "us", "limit by bytes, us": "limit_us"}
    return [listed([row for row in data["rows"] if "us" in row], times)]


def _decode_step(data: Row) -> list[str]:
    columns = {"model": "model", "tokens": "context", "LSA / full, equal batch": "ratio_at_equal_batch",
               "at each one's best batch": "ratio_at_best", "the paper": "ratio_in_the_paper",
               "attention alone": "attention_ratio_alone", "requests that fit, full": "requests_full",
               "LSA": "requests_lsa", "tokens/s, full": lambda row: round(row["tokens_a_second_full"]),
               "tokens/s, LSA": lambda row: round(row["tokens_a_second_lsa"])}  # fmt: skip
    stages = sorted({stage for row in data["rows"] for stage in row["stages"]})
    steps = {"model": "model", "tokens": "context", "mode": "mode", "batch": "batch", "attention side, ms": "ms",
             "worst step, ms": "worst_ms", "the rest, ms": "rest_ms", "resident GiB": "resident_gib",
             "host GiB": "host_gib"}  # fmt: skip
    steps |= {f"{stage}, ms": lambda row, stage=stage: row["stages"].get(stage) for stage in stages}
    return [listed(data["summary"], columns), listed(data["rows"], steps)]


def _runtime(data: Row) -> list[str]:
    columns = {"budget": "budget", "backend": "backend", "lag": "lag", "tokens read": "prompt_tokens",
               "tokens/s": "tokens_per_second", "GPU memory at most, MB": "peak_mb", "resident KV, MB": "resident_mb",
               "fetched a window, MB": "fetched_mb_a_window", "sets as the CPU's": "windows_as_cpu"}  # fmt: skip
    return [listed(data["rows"], columns)]


def _train_gpu(data: Row) -> list[str]:
    rows = [{"shape": shape, **row} for shape, row in data.items()]
    columns = {"shape": "shape", "samples/s": "samples_a_second", "ms a step": lambda row: 1e3 * row["seconds_a_step"],
               "of it the GPU works, ms": lambda row: 1e3 * row["device_seconds_a_step"],
               "host's share": share("host_share")}  # fmt: skip
    return [listed(rows, columns)]


def _train_release(data: Row) -> list[str]:
    rows = [
        {"shape": found["shape"], "side": side, "speed": speed, "memory": found["runs"][side][0]["memory"],
         "ratio": found["ratios"].get(side)}
        for found in data["results"]
        for side, speed in found["speed"].items()
    ]  # fmt: skip
    columns = {"heads x rank": "shape", "side": "side", "samples per CPU-second": "speed", "GiB": "memory",
               "ours / it": "ratio"}  # fmt: skip
    return [listed(rows, columns)]


def _fallback(data: Row) -> list[str]:
    columns = {"setting": "setting", "questions": "task", "right": lambda row: f"{row['right']} of {row['questions']}",
               "windows fallen back": lambda row: f"{row['fallbacks']} of {row['windows']}",
               "KV kept": share("resident_share")}  # fmt: skip
    return [listed(data["rows"], columns)]


def _cpu_tricks(data: Row) -> list[str]:
    sides = {f"{side} it": lambda row, key=key: statistics.median(row[key]) for side, key in
             (("with", "on"), ("without", "off"))}  # fmt: skip
    return [listed(data["results"], {"trick": "trick", **sides, "gain": lambda row: f"{row['ratio']:.2f}x"})]


def _mla_keys(data: Row) -> list[str]:
    columns = {"key": "key", "numbers a layer": "width", "seed": "seed", "chunks kept": share("budget"),
               "documents": "n", "mass recall": "mass_recall"}  # fmt: skip
    return [listed(data["rows"], columns)]


def _serving(data: Row) -> list[str]:
    columns = {"server": "server", "tokens/s": "tokens_per_second", "between tokens, median ms": "gap_median_ms",
               "95th percentile": "gap_p95_ms", "most requests at once": "most_running", "preempted": "preemptions",
               "blocks read of those held": lambda row: "-" if row["read"] is None else f"{row['read']:.1%}",
               "blocks fetched a window": "fetched_per_window",
               "needles": lambda row: f"{row['needles']} of {row['asked']}"}  # fmt: skip
    return [listed(data["rows"], columns)]


def _runs(data: Row) -> list[str]:
    tables = []
    for name, run in data["runs"].items():
        rows = [DecodeRow.model_validate(row) for row in run["decode"]]
        told = run["measured"]
        tables.append(f"{name} (commit {told['commit']}, {told['date']}), {told['documents']}:\n\n{decode_table(rows)}")
    return tables


def _scale(data: Row) -> list[str]:
    found = {name: part["found"] for name, part in data.items()}
    plans = [found[name] for name in found if name.startswith("plan")]
    opened = [{"what": name, **row} for name, row in found.get("open", {}).items()]
    epochs = [{"candidates": name, **row} for name, row in found.get("epoch", {}).items()]
    estimates = [row for name in found if name.startswith("estimate") for row in found[name]]
    parts = [
        ("Planning", plans, {"documents": "documents", "tokens": "tokens", "source, MiB": "source_mib",
                             "plan, MiB": "plan_mib", "seconds": "seconds", "most memory, GiB": "peak_gib"}),
        ("Opening a store before training", opened,
         {"what": "what", "documents": "documents", "seconds": "seconds", "of it listing": "seconds_listing",
          "memory, GiB": "gib"}),
        ("An epoch's reading", epochs, {"candidates": "candidates", "documents": "documents", "files, MiB": "mib",
                                        "read, MiB": "read_mib", "read / files": "ratio"}),
        ("Workers on one machine", found.get("workers", []),
         {"workers": "workers", "documents a second": "documents_a_second",
          "of the model alone": "of_the_model_alone"}),
        ("What many documents take, computed from a recipe's settings or (with a rate) from traces that one worker "
         "made; hours over 10 Gbit/s", estimates,
         {"model": "model", "documents": "documents", "tokens": "tokens", "query tokens": "query_tokens",
          "TB": "terabytes", "copying, h": "hours_copying", "an epoch's reading, h": "hours_reading",
          "tokens/s of one worker": "tokens_a_second", "tracing by one, h": "hours_tracing"}),
    ]  # fmt: skip
    return [f"{title}:\n\n{listed(rows, columns)}" for title, rows, columns in parts if rows]


def _before_after(data: Row) -> list[str]:
    parts = [{"part": name, **row} for name, row in data.items() if isinstance(row, dict) and "unequal" in row]
    verbs = [{"verb": name, **row} for name, row in data.items() if isinstance(row, dict) and "cpu_seconds" in row]
    compared = {"part": "part", f"places of {data['before']}": "compared", f"unequal at {data['after']}": "unequal",
                "only at the latter": "only_after"}  # fmt: skip
    tables = [listed([row for row in parts if row["compared"]], compared)]
    return tables + [listed(verbs, {"verb": "verb", "CPU-seconds, after / before": "ratio"})] * bool(verbs)


SECTIONS = [
    Section(
        "The quickstart on two CPU cores",
        "quickstart-cpu.json",
        "The bundle that `make quickstart` trained at commit 872274e (10 min 17 s after the set-up), asked with "
        "`lookahead decode smollm2-quickstart --bundle runs/quickstart/bundle --out runs/quickstart` about its own "
        "held-out documents, and with `smollm2-quickstart-again` about those of another seed. 200 tokens of one text "
        "are followed in the first, 128 of eight in the second. A commit in -dirty had files changed, none of "
        "them code that decodes.",
        _runs,
    ),
    Section(
        "Gemma-3-270M on text of 4K to 32K tokens, with a per-step correction",
        "outputs-gemma-h200.json",
        "Recipe `gemma-3-270m-long`; for each length 30 texts of packages that no training read, 128 tokens followed, "
        "10 % of the chunks in addition to the protected ones. The correction takes 8 of those chunks; its mean keys "
        "are extra. The questions of that run had no beginning of an answer. Full attention then answers only 4 to "
        "14 % of them, so they do not rank anything and are left out here.",
        _at_length,
    ),
    Section(
        "Which part of the quickstart's recipe matters",
        "ablations-smollm2-h200.json",
        "Every loss and option of `benchmarks/ablations.py`, trained on the same traces with one seed each. The recipe "
        "of that commit had `listwise_peak`. It was replaced by `bpr`, which has the lowest KL on the development set "
        "among those that answer at least as many needles.",
        _ablations,
    ),
    Section(
        "Which part of Gemma's recipe matters",
        "ablations-gemma-h200.json",
        "The same on a third of the development documents, of 8K and 32K tokens. Questions are left out, as above.",
        _at_length,
    ),
    Section(
        "Gemma-3-270M up to 32K, an earlier recipe",
        "gemma-answers-h100.json",
        "`listwise_mass` with a quarter peaks, trained on up to 16K tokens; questions in the benchmark's own form, 56 "
        "per cell, and 12 texts. The command is of that commit; today `lookahead benchmark` asks such questions.",
        _answers,
    ),
    Section(
        "Gemma-3-270M up to 32K, an earlier recipe: recall at 10 % kept",
        "gemma-recall-h100.json",
        "Measured on the standard library, which that training did not read.",
        _recall,
    ),
    Section(
        "A decode step with LSA compared with full attention, at real widths",
        "decode-step-h200.json",
        "Weights and caches are random. The attention side is run; the rest of the model is estimated from the "
        "planner's operations at measured matrix rates. Requests and tokens/s are for all GPUs of the row's plan.",
        _decode_step,
    ),
    Section("Kernels of the decode runtime", "decode-h100.json", "", _decode),
    Section("Decoding the pocket DeepSeek-V4 at 16K", "runtime-h100.json", "", _runtime),
    Section("Decoding Gemma-3-270M at 32K", "runtime-gemma-h100.json", "", _runtime),
    Section("Training on a GPU", "train-h100.json", "", _train_gpu),
    Section("Training compared with the release, on a CPU", "train-release-cpu.json", "", _train_release),
    Section(
        "Tricks for the CPU, in training",
        "cpu-tricks-intel.json",
        "CPU-seconds of a step, all tricks on and all but one, in turns, beside other work; medians. 5 % is noise. "
        "oneDNN costs a little on this processor. It is used on AMD's alone, whose AVX-512 PyTorch's default library "
        "leaves unused.",
        _cpu_tricks,
    ),
    Section(
        "Keys of chunks under MLA: the mean latent, or the mean content keys of all heads",
        "mla-keys-cpu.json",
        "The pocket DeepSeek-V3.2 with its sparse attention open, which is plain MLA; chunks of 64 tokens, 40 chats "
        "trained on, 8 held out. A head makes its content key of the latent by a linear map, so that an indexer can "
        "learn of the latent whatever it could of those keys. The run was stopped before seed 2 of `heads`, and recall "
        "alone is compared: no answers were decoded. By it the two are level to within the spread of seeds. The latent "
        "is half as wide here, a thirty-second part at DeepSeek-V3's widths (512 numbers beside 16,384): it is the key "
        "that is offered.",
        _mla_keys,
    ),
    Section(
        "Stock vLLM and the plugin, with the same pool of KV blocks",
        "serving-vllm-cpu.json",
        "Recipe `smollm2-quickstart`'s bundle; four requests of 600 to 800 tokens at once in a pool of 1,600 tokens. "
        "`visibility`: decoding reads resident blocks; `memory`: cold blocks leave the pool too. One run, beside other "
        "work on the machine; four needle questions show that retrieval works, and not a difference.",
        _serving,
    ),
    Section(
        "The pocket models under an eighth of their chunks",
        "pocket-table.json",
        "The recipes of `make pocket` and `make pocket-dsa` at commit 296e5e9, on the machine below, which printed the "
        "table later. A chunk is four tokens in the "
        "first and a page of 64 in the second. There the indexer, the model's own indexers (`native`) and the oracle "
        "of attention choose among two to thirty-odd pages: six steps or a chain of facts rarely lie on so few, and "
        "a page's mean key holds little of a note of three words. The DSA model itself answers no whole "
        "`multi_value` and, of 16K tokens, none of the eight.",
        pocket_tables,
    ),
    Section("Demand fallback on the pocket model", "fallback-cpu.json", "", _fallback),
    Section(
        "What grows with the number of documents",
        "scale-cpu.json",
        "Each part of `benchmarks/scale.py` by a command of its own. Opening is all that `lookahead train` does before "
        "its first step, every sixth document held back, with the files in the kernel's memory. [Traces from more than "
        "one machine](scale.md) says what follows from it.",
        _scale,
    ),
    Section(
        "The redesign: the quickstart before and after it",
        "before-after-quickstart.json",
        "Two checkouts run the same recipe, the older one's. Compared are every tensor of the traces and of the "
        "indexer, and every figure of results.json; left out are its sections `evaluated` and `measured`, which say "
        "how, where and when it was measured.",
        _before_after,
    ),
    Section(
        "The redesign: the pocket DeepSeek-V4 before and after it",
        "before-after-pocket.json",
        "The same of `make pocket`'s indexer of attention, with the answers to its 92 questions. Two calls made it: "
        "the second, on the first one's folders, timed the verbs. Beside other work.",
        _before_after,
    ),
]
"""In the order of the page; a new file in results/ joins here."""


def made(data: Row) -> str:
    """On what a file's figures were measured: a line for each command that made a part of it."""
    lines = []
    for origin in _origins(data):
        parts = [f"commit {origin['commit']}", f"{origin['device']}, {origin['cores']} cores"]
        parts += [f"{name} {origin[name]}" for name in ("torch", "transformers", "vllm") if name in origin]
        lines.append(f"`{origin['command']}`; {'; '.join(parts)}.")
    return "\n\n".join(lines)


def _origins(data: Any) -> Iterator[Row]:
    """Every `benchmarks.machine.origin` that a file holds, wherever it lies."""
    if isinstance(data, dict) and "command" in data:
        yield data
    elif isinstance(data, dict | list):
        for part in data.values() if isinstance(data, dict) else data:
            yield from _origins(part)


def page() -> str:
    """The whole of docs/results.md."""
    parts = [
        "# Results",
        "Made by `python -m benchmarks.results_page` of `benchmarks/results/`: no figure is typed by hand.",
    ]
    for section in SECTIONS:
        data = json.loads((RESULTS / section.file).read_text())
        parts += [f"## {section.title}", *([section.says] if section.says else []), made(data), *section.tables(data)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
