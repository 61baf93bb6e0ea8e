"""The tables of docs/results.md: what each kind of file in benchmarks/results/ holds, as Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.ablation_tables import DIAGNOSES, EVERY, ranked
from eval.report.rows import DecodeRow
from eval.report.tables import Table, decode_table

Row = dict[str, Any]
SIDES = ("ours", "release")


def listed(rows: Sequence[Row], columns: Mapping[str, str | Callable[[Row], Any]]) -> str:
    """A table of `rows`; columns: heading -> a key of the rows, or what is made of one."""
    cells = [[row.get(each) if isinstance(each, str) else each(row) for each in columns.values()] for row in rows]
    return str(Table(list(columns), cells))


def interval(key: str) -> Callable[[Row], str]:
    """[mean, low, high] of a row as text."""
    return lambda row: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[key]) if key in row else "-"


def share(key: str) -> Callable[[Row], str]:
    """A share of a row in percent."""
    return lambda row: f"{row[key]:.1%}"


AS_MANY_BYTES = {
    "recency, bytes of the recipe": "recency's with the recipe's bytes",
    "recency, bytes of the correction": "recency's with the correction's bytes",
    "recipe, bytes of the correction": "the recipe's with the correction's bytes",
}
"""Policies that spend on keys and values what another spends on keys to choose by -> what the tables call them."""


def ablations(data: Row) -> list[str]:
    """Texts, questions, and what foretold them."""
    names = {"set": "set", "tokens": lambda row: row["tokens"] or "-", "policy": "policy", "n": "documents"}
    texts = [row for row in data["rows"] if "kl" in row]
    lengths = data["origins"][0]["command"].find("--length") > 0
    pooled = not lengths and any(row["task"] == EVERY for row in data["rows"])  # each kind alone is in the file
    questions = [row for row in data["rows"] if "right" in row and (row["task"] == EVERY) == pooled]
    diagnoses = {name.replace("_", " "): name for name in DIAGNOSES if any(name in row for row in data["rows"])}
    if any("fetched" in row for row in data["rows"]):
        diagnoses = {"chunks fetched a token": lambda row: row.get("fetched", "-")}
        if any("mean_key_bytes" in row for row in data["rows"]):  # files of older commits count the correction's alone
            diagnoses["mean keys, MB"] = lambda row: row["mean_key_bytes"] / 1e6
        else:
            diagnoses["keys to choose by, MB"] = lambda row: row["key_bytes"] / 1e6 if "key_bytes" in row else "-"
    beside = {"minus the recipe's": "recipe", "minus recency's": "recency"}
    beside |= {
        f"minus {told}": name
        for name, told in AS_MANY_BYTES.items()
        if any(f"kl_beside_{name}" in row for row in texts)
    }
    return [
        "Text, KL from full attention:\n\n"
        + listed(texts, names | {"KL": "kl", "agreement": "agreement"}
                 | {head: interval(f"kl_beside_{name}") for head, name in beside.items()}
                 | {"KV kept": share("kept")} | diagnoses),
        "Questions answered:\n\n"
        + listed(questions, names | {"task": "task", "right": lambda row: round(row["right"] * row["documents"])}
                 | {"minus the recipe's": interval("right_beside_recipe"), "KV kept": share("kept")}),
        _correlations(data, {"with needles right": "right", "with text KL": "kl"}),
    ]  # fmt: skip


def _correlations(data: Row, outcomes: dict[str, str]) -> str:
    """What foretold the outcomes, heading -> key, with 95 % intervals."""
    columns = {head: lambda row, key=key: ranked(row[key], row["variations"]) for head, key in outcomes.items()}
    return (
        "Rank correlation (Spearman) of what held-back training documents said with the outcomes, 95 % intervals:\n\n"
        + listed(data["rank_correlations"], {name: name for name in ("set", "diagnosis", "variations")} | columns)
    )


def at_length(data: Row) -> list[str]:
    """The texts of `ablations` alone."""
    return ablations(data)[:1]


def ablations_at_length(data: Row) -> list[str]:
    """The texts of `ablations`, and what foretold them."""
    return [*at_length(data), _correlations(data, {"with text KL": "kl"})]


def needles(data: Row) -> list[str]:
    """Questions at a length, also beside mean-pooled keys and of those that full attention answers."""
    columns = {"tokens": "tokens", "task": "task", "policy": "policy", "n": "documents",
               "right": lambda row: round(row["right"] * row["documents"]),
               "of those full attention finds": lambda row: f"{row['solved']:.0%} of {row['solved_documents']}",
               "minus the recipe's": interval("right_beside_recipe"),
               "minus mean-pooled keys'": interval("right_beside_mean-pooled keys"),
               "KV kept": share("kept"), "chunks fetched a token": "fetched"}  # fmt: skip
    return [listed(data["rows"], columns)]


def answers(data: Row) -> list[str]:
    """Needles, then texts, under the loss with a quarter peaks."""
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


def recall(data: Row) -> list[str]:
    """Recall at 10 % kept, under the same loss."""
    rows = [row for row in data["rows"] if row["loss"].endswith(".25") and row["budget"] == 0.1]
    columns = {"tokens": "length", "task": "task", "policy": "policy", "n": "documents", "mass recall": "mass_recall",
               "golden recall": "golden_recall"}  # fmt: skip
    return [listed(rows, columns)]


def decode(data: Row) -> list[str]:
    """Kernels beside what bytes allow."""
    times = {"stage": "stage", "backend": "backend", "us": "us", "limit by bytes, us": "limit_us"}
    return [listed([row for row in data["rows"] if "us" in row], times)]


def decode_step(data: Row) -> list[str]:
    """A summary by model and context, then every measured mode."""
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


def runtime(data: Row) -> list[str]:
    """Speed, memory and fetches of whole decoding."""
    columns = {"budget": "budget", "backend": "backend", "lag": "lag", "tokens read": "prompt_tokens",
               "tokens/s": "tokens_per_second", "GPU memory at most, MB": "peak_mb", "resident KV, MB": "resident_mb",
               "fetched a window, MB": "fetched_mb_a_window", "sets as the CPU's": "windows_as_cpu"}  # fmt: skip
    return [listed(data["rows"], columns)]


def runtime_graph(data: Row) -> list[str]:
    """Speed of a captured step beside eager reading."""
    columns = {"sequences": "batch", "weights": "dtype", "step": "kind", "KV resident": share("resident_share"),
               "tokens/s": "tokens_per_second", "times eager": "times_eager", "times everything resident": "times_full",
               "tokens as eager": share("tokens_as_eager"), "sets as eager": "windows_as_eager",
               "GPU memory at most, MB": "peak_mb"}  # fmt: skip
    return [listed(data["rows"], columns)]


def runtime_batches(data: Row) -> list[str]:
    """The rows of `runtime_graph` of several calls."""
    return runtime_graph({"rows": [row for part in data.values() for row in part["rows"]]})


def train_gpu(data: Row) -> list[str]:
    """Samples a second by shape."""
    rows = [{"shape": shape, **row} for shape, row in data.items()]
    columns = {"shape": "shape", "samples/s": "samples_a_second", "ms a step": lambda row: 1e3 * row["seconds_a_step"],
               "of it the GPU works, ms": lambda row: 1e3 * row["device_seconds_a_step"],
               "host's share": share("host_share"), "GPU memory at most, GiB": "peak_gib"}  # fmt: skip
    return [listed(rows, columns)]


def evaluate_gpu(data: Row) -> list[str]:
    """Seconds of one evaluation by device."""
    rows = [{"device": name, **data[name]} for name in ("gpu_first", "gpu", "cpu")]
    apart = f"{data['figures']} figures, at most {data['largest_difference']:.1e} apart."
    return [listed(rows, {"device": "device", "seconds": "seconds", "CPU-seconds": "cpu_seconds"}), apart]


def two_gpus(data: Row) -> list[str]:
    """Training on both beside one, then a model spread over both."""
    speed, spread = data["speed"], data["spread"]
    training = [{"GPUs": number, **speed[f"gpus_{number}"]} for number in (1, 2)]
    tracing = [{"GPUs": number, **spread[f"gpus_{number}"]} for number in (1, 2)]
    held = {"GiB on each": lambda row: " / ".join(f"{each:.1f}" for each in row["gib"])}
    trained = {"GPUs": "GPUs", "samples/s": "samples_a_second", "ms a step": lambda row: 1e3 * row["seconds_a_step"],
               "host's share": share("host_share")}  # fmt: skip
    return [
        f"Training, ratio {speed['ratio']:.2f}; of two GPUs' steps {speed['waits']:.1%} waits for the other:",
        listed(training, trained),
        f"Tracing a spread model; the same bytes: {'yes' if spread['same'] else 'no'}:",
        listed(tracing, {"GPUs": "GPUs", "seconds": "seconds"} | held),
    ]


def train_release(data: Row) -> list[str]:
    """Both sides by shape."""
    rows = [
        {"shape": found["shape"], "side": side, "speed": speed, "memory": found["runs"][side][0]["memory"],
         "ratio": found["ratios"].get(side)}
        for found in data["results"]
        for side, speed in found["speed"].items()
    ]  # fmt: skip
    columns = {"heads x rank": "shape", "side": "side", "samples per CPU-second": "speed", "GiB": "memory",
               "ours / it": "ratio"}  # fmt: skip
    return [listed(rows, columns)]


def evaluate_release(data: Row) -> list[str]:
    """Both sides by shape. data: heads x rank -> what that call wrote."""
    rows = []
    for shape, found in data.items():
        speed, (ours, theirs) = found["tokens_per_cpu_second"], (found["runs"][side][0]["metrics"] for side in SIDES)
        apart = max(
            abs(value - theirs[what][metric])
            for what, values in ours.items()
            for metric, value in values.items()
            if metric in theirs[what]
        )
        for side in SIDES:
            memory = max(run["memory"] for run in found["runs"][side])
            rows.append({"shape": shape, "side": side, "speed": speed[side], "memory": memory,
                         "ratio": speed["ours"] / speed[side], "apart": f"{apart:.0e}"})  # fmt: skip
    columns = {"heads x rank": "shape", "side": "side", "tokens per CPU-second": "speed", "GiB": "memory",
               "ours / it": "ratio", "metrics apart, at most": "apart"}  # fmt: skip
    return [listed(rows, columns)]


def fallback(data: Row) -> list[str]:
    """Each setting on dense and sparse questions."""
    columns = {"setting": "setting", "questions": "task", "right": lambda row: f"{row['right']} of {row['questions']}",
               "windows fallen back": lambda row: f"{row['fallbacks']} of {row['windows']}",
               "KV kept": share("resident_share")}  # fmt: skip
    return [listed(data["rows"], columns)]


def cpu_tricks(data: Row) -> list[str]:
    """Each trick switched on and off."""
    sides = {f"{side} it": lambda row, key=key: statistics.median(row[key]) for side, key in
             (("with", "on"), ("without", "off"))}  # fmt: skip
    return [listed(data["results"], {"trick": "trick", **sides, "gain": lambda row: f"{row['ratio']:.2f}x"})]


def mla_keys(data: Row) -> list[str]:
    """Recall and divergence, by key and seed."""
    columns = {"key": "key", "numbers a layer": "width", "seed": "seed", "chunks kept": share("budget"),
               "documents": "n", "mass recall": "mass_recall", "KL": "kl",
               "same next token": share("same")}  # fmt: skip
    return [listed(data["rows"], columns)]


def serving(data: Row) -> list[str]:
    """Each server under the same requests."""
    columns = {"server": "server", "tokens/s": "tokens_per_second", "between tokens, median ms": "gap_median_ms",
               "95th percentile": "gap_p95_ms", "most requests at once": "most_running", "preempted": "preemptions",
               "blocks read of those held": lambda row: "-" if row["read"] is None else f"{row['read']:.1%}",
               "blocks fetched a window": "fetched_per_window",
               "needles": lambda row: f"{row['needles']} of {row['asked']}"}  # fmt: skip
    return [listed(data["rows"], columns)]


def decode_vllm(data: Row) -> list[str]:
    """Decoding speed of each server, beside stock vLLM's at the same size; with a profile also what of a step is the
    device's. data: what a call wrote, or several, by name."""
    rows = [row for part in ([data] if "rows" in data else data.values()) for row in part["rows"]]
    stock = {(row["context"], row["batch"]): row["step_ms"] for row in rows if row["server"] == "stock"}
    columns = {"tokens of context": "context", "requests": "batch", "server": "server", "tokens/s": "tokens_per_second",
               "ms a step": "step_ms", "times stock": lambda row: stock[row["context"], row["batch"]] / row["step_ms"],
               "blocks read": lambda row: "-" if row["read"] is None else f"{row['read']:.1%}"}  # fmt: skip
    if all("profile" in row for row in rows):
        columns |= {"operations a step": lambda row: sum(number for number, _ in row["profile"].values()),
                    "ms of them": lambda row: sum(spent for _, spent in row["profile"].values())}  # fmt: skip
    order = list(stock)
    return [listed(sorted(rows, key=lambda row: order.index((row["context"], row["batch"]))), columns)]


def runs(data: Row) -> list[str]:
    """Rows of `lookahead decode`, run by run."""
    tables = []
    for name, run in data["runs"].items():
        rows = [DecodeRow.model_validate(row) for row in run["decode"]]
        told = run["measured"]
        tables.append(f"{name} (commit {told['commit']}, {told['date']}), {told['documents']}:\n\n{decode_table(rows)}")
    return tables


def scale(data: Row) -> list[str]:
    """A table of each part that was measured."""
    found = {name: part["found"] for name, part in data.items()}
    plans = [found[name] for name in found if name.startswith("plan")]
    opened = [{"what": name, **row} for name, row in found.get("open", {}).items()]
    epochs = [{"candidates": kind, **row} for name in found if name.startswith("epoch")
              for kind, row in found[name].items()]  # fmt: skip
    estimates = [row for name in found if name.startswith("estimate") for row in found[name]]
    parts = [
        ("Planning", plans, {"documents": "documents", "tokens": "tokens", "source, MiB": "source_mib",
                             "plan, MiB": "plan_mib", "seconds": "seconds", "most memory, GiB": "peak_gib"}),
        ("Opening a store before training", opened,
         {"what": "what", "documents": "documents", "seconds": "seconds", "of it listing": "seconds_listing",
          "memory, GiB": "gib"}),
        ("An epoch's reading", epochs,
         {"file system": "file_system", "candidates": "candidates", "documents": "documents", "files, MiB": "mib",
          "of it batches need, MiB": "needed_mib", "read, MiB": "read_mib", "read / files": "ratio"}),
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


def before_after(data: Row) -> list[str]:
    """Places compared, then what the verbs took."""
    parts = [{"part": name, **row} for name, row in data.items() if isinstance(row, dict) and "unequal" in row]
    verbs = [{"verb": name, **row} for name, row in data.items() if isinstance(row, dict) and "cpu_seconds" in row]
    compared = {"part": "part", f"places of {data['before']}": "compared", f"unequal at {data['after']}": "unequal",
                "only at the latter": "only_after"}  # fmt: skip
    tables = [listed([row for row in parts if row["compared"]], compared)]
    return tables + [listed(verbs, {"verb": "verb", "CPU-seconds, after / before": "ratio"})] * bool(verbs)


def coverage(data: Row) -> list[str]:
    """For each part what a rule keeps and says beside the budget that keeps as much, then demand fallback."""

    def beside(metric: str) -> Callable[[Row], str]:
        return lambda row: "-" if row["rule"] == "budget" else interval(f"{metric}_beside")(row)

    rules = {"tokens": "length", "documents": "kind", "rule": "rule", "n": "texts", "chunks kept": share("kept"),
             "by that budget": share("kept_of_budget"), "right": "right", "minus the budget's": beside("right"),
             "KL": "kl", "minus the budget's KL": beside("kl")}  # fmt: skip
    windows = {"tokens": "length", "questions": "kind", "demand by": "rule",
               "fall back": lambda row: f"{row['fallbacks']} of {row['questions']}",
               "minus the threshold's": interval("fallbacks_beside"),
               "right": lambda row: f"{row['right']} of {row['questions']}",
               "minus the threshold's right": interval("right_beside"),
               "with full attention": "right_full"}  # fmt: skip
    tables = []
    for name, part in data.items():
        calibrated = f"calibrated on {part['calibrated']:,} tokens"
        tables += [f"{name}, {calibrated} to keep {part['share']:.1%}:\n\n{listed(part['rows'], rules)}",
                   f"{name}, demand fallback above {part['share']:.1%}, {calibrated} so that a part {part['rate']:.0%} "
                   f"of the sparse questions falls back:\n\n{listed(part['fallback'], windows)}"]  # fmt: skip
    return tables


def layer_sets(data: Row) -> list[str]:
    """Texts, then questions, under one set and under a set for each group of layers."""
    names = {"set": "set", "policy": "policy", "n": "documents"}
    texts = [row for row in data["rows"] if row["kind"] == "text"]
    questions = [row for row in data["rows"] if row["kind"] == "questions"]
    beside = {"minus the one set's": "shared", "minus recency's": "recency"}
    right = {"right": lambda row: round(row["right"] * row["documents"])}
    tables = []
    for rows, metric, shown in (
        (texts, "kl", {"KL": "kl", "KL gone of the one set's": share("fall")}),
        (questions, "right", right),
    ):
        columns = names | shown | {head: interval(f"{metric}_beside_{name}") for head, name in beside.items()}
        tables += [listed(rows, columns | {"KV kept": share("kept")})] * bool(rows)
    return tables
