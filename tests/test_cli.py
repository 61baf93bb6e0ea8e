"""The command line as people use it: all verbs on a tiny model, and what bad input gets."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import cli
from data_gen.core.files import read_sealed, write_sealed
from indexer_train.formats.convert import Exported
from tests.conftest import tiny_model

PLANNED = [path.stem for path in (Path(cli.__file__).parent / "eval/plan/configs").glob("*.json")]


def edited(recipe, folder, section, **changes):
    settings = yaml.safe_load(recipe.read_text())
    settings[section] |= changes
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_run_leaves_results_a_plot_a_bundle_and_one_plain_sentence(finished):
    results = json.loads((finished / "results.json").read_text())
    fields = {"policy", "task", "context", "budget", "golden_recall", "mass_recall", "documents", "windows"}
    assert all(fields <= row.keys() for row in results["recall"])
    policies = {"oracle", "indexer", "exact_attention", "mean_pooled", "frequency", "recency", "random", "protected"}
    assert {row["policy"] for row in results["recall"]} == policies | {"layer 0", "layer 2"}
    top = {f"top {count}" for count in (8, 16, 32, 64)}  # chunks; every document has more than 64
    assert {0.02, 0.05, 0.1, 0.135, 0.2, "threshold"} | top == {row["budget"] for row in results["recall"]}
    assert {row["policy"] for row in results["decode"]} == {"full", "indexer", "mean_pooled", "recency", "random"}
    assert max(row["refreshes"] for row in results["decode"]) >= 3  # 40 tokens, windows of 16
    assert (finished / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert '<figure id="accuracy">' in (finished / "report.html").read_text()
    assert (finished / "bundle" / "bundle.json").exists()
    last = (finished / "stdout.txt").read_text().splitlines()[-1]
    assert last.startswith("With ") and "of the KV cache resident" in last


def test_the_verbs_one_by_one_give_what_run_gives(finished, recipe, tmp_path, lookahead):
    assert lookahead("generate", recipe, "--out", tmp_path / "traces")[0] == 0
    assert lookahead("train", recipe, "--traces", tmp_path / "traces/train", "--out", tmp_path)[0] == 0
    heldout = ("--traces", tmp_path / "traces/heldout")
    assert lookahead("evaluate", recipe, "--indexer", tmp_path / "indexer", *heldout, "--out", tmp_path)[0] == 0
    assert lookahead("export", "--indexer", tmp_path / "indexer", "--out", tmp_path / "bundle")[0] == 0
    assert lookahead("decode", recipe, "--bundle", tmp_path / "bundle", "--out", tmp_path)[0] == 0
    assert lookahead("card", "--indexer", tmp_path / "indexer", "--results", tmp_path)[0] == 0
    made, given = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished))
    for results in (made, given):
        for setting in results["measured"].values():
            del setting["date"]  # midnight may lie between the two
    assert made == given
    cards = [(folder / "indexer/README.md").read_text() for folder in (tmp_path, finished)]
    assert re.sub(r"\d{4}-\d\d-\d\d", "", cards[0]) == re.sub(r"\d{4}-\d\d-\d\d", "", cards[1])
    (row,) = (row for row in given["decode"] if row["policy"] == "indexer")
    assert f"| held-out documents | {row['correct']} of {row['examples']} |" in cards[0]
    weights = "bundle/indexer.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished / weights).read_bytes()


def test_a_prompt_is_continued_and_its_windows_are_traced(finished, recipe, tmp_path, lookahead):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The bicycle is kept behind the shed. " * 10)
    arguments = ("--bundle", finished / "bundle", "--prompt", prompt, "--out", tmp_path, "--new-tokens")
    code, printed, _ = lookahead("decode", recipe, *arguments, 40)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert code == 0 and f"windows of {trace['tau']} tokens: {len(trace['windows'])}," in printed
    first = trace["windows"][0]
    assert first["position"] == 368 and first["chunks"] == 92 and 3 < first["resident"] < 92
    assert lookahead("decode", recipe, *arguments, 4, "--budget", 0.05, "--cap", 6)[0] == 0
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["selection"] == "the best 5.0% of the chunks" and trace["cap"] == trace["windows"][0]["resident"] == 6
    settings = yaml.safe_load(recipe.read_text())
    settings["decode"]["first_window"] = 1
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(settings))
    assert lookahead("decode", again, *arguments, 4)[0] == 0
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["first_window"] == 1 and [window["position"] for window in trace["windows"]] == [368, 369]
    for options, what in [
        (("--budget", 0.05, "--cap", 6, "--fallback"), "fallback: the bundle serves a budget"),
        (("--fallback",), "--fallback needs --cap"),
        (("--documents", tmp_path), "leave one of them out"),
    ]:
        code, _, line = lookahead("decode", recipe, *arguments, 4, *options)
        assert code == 2 and what in line
    code, _, line = lookahead("decode", recipe, "--bundle", finished / "bundle", "--out", tmp_path, "--cap", 9)
    assert code == 2 and "apply only to a --prompt" in line
    prompt.write_bytes(b"\xff")
    code, _, line = lookahead("decode", recipe, *arguments, 40)
    assert code == 2 and "not a text file" in line


def test_two_indexers_side_by_side(finished, recipe, tmp_path, lookahead):
    pair, heldout = ("--compare", *[finished / "indexer"] * 2), ("--traces", finished / "traces/heldout")
    code, printed, _ = lookahead("evaluate", recipe, *pair, *heldout, "--every-token", "--out", tmp_path)
    assert code == 0 and f"B: {finished / 'indexer'}" in printed and "A - B" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluated"]["every_token"] and all(row["difference"] == 0 for row in results["comparison"])
    assert "A beside B" in (tmp_path / "report.md").read_text()


def test_running_again_rewrites_no_trace(finished, recipe, lookahead):
    files = [*sorted(finished.glob("traces/*/*/doc_*")), finished / "indexer" / "modules.json"]
    before = [path.stat().st_mtime_ns for path in files]
    assert lookahead("run", recipe, "--out", finished)[0] == 0
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("generate", "Missing argument"),
        ("frobnicate", "No such command"),
        ("train smollm2-quickstart --bogus 1", "No such option"),
        ("generate nope --out x", "recipe 'nope'"),
        ("generate missing.yaml --out x", "missing.yaml: no such file"),
        ("train smollm2-quickstart --traces nowhere --out x", "no trace store there"),
        ("evaluate smollm2-quickstart --indexer nowhere --traces nowhere --out x", "no indexer there"),
        ("evaluate smollm2-quickstart --traces nowhere --out x", "one indexer (--indexer A) or two (--compare A B)"),
        ("export --indexer nowhere --out x", "no indexer there"),
        ("decode smollm2-quickstart --bundle nowhere --out x", "no bundle there"),
        ("generate smollm2-quickstart --out x --backbone ./nowhere", "no such file or folder"),
    ],
)
def test_bad_arguments_get_one_line(arguments, complaint, lookahead, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, line = lookahead(*arguments.split())
    assert code == 2
    assert line.startswith("lookahead: ") and complaint in line


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no document there"),
        ({"a.txt": ""}, "empty"),
        ({"a.md": "too short to fill a window"}, "need at least"),
    ],
)
def test_bad_documents_get_one_line_and_leave_nothing(recipe, tmp_path, lookahead, files, complaint):
    source = tmp_path / "texts"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    changed = edited(recipe, tmp_path, "documents", source=str(source), train={"document": 1}, heldout={"document": 1})
    code, _, line = lookahead("generate", changed, "--out", tmp_path / "out")
    assert code == 2 and complaint in line, line
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("section", "changes", "complaint"),
    [
        ("documents", {"heldout": {"text": 0}}, "documents.heldout: the recipe asks for no heldout document"),
        ("trace", {"layers": [0, 7]}, "trace.layers: [7] are not full-attention layers; choose from [0, 1, 2]"),
        ("trace", {"oracle": "indexer"}, "trace.oracle `indexer`: the backbone has no indexer; use `attention`"),
        ("trace", {"own_tokens": 100}, "but the backbone's context is 412"),
    ],
)
def test_settings_that_do_not_fit_are_found_before_tracing(recipe, tmp_path, lookahead, section, changes, complaint):
    changed = edited(recipe, tmp_path, section, **changes)
    code, _, line = lookahead("generate", changed, "--out", tmp_path / "out")
    assert code == 2 and complaint in line, line
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"plan.parquet"}


def test_a_document_longer_than_the_context_is_refused(recipe, tmp_path, lookahead):
    changed = edited(recipe, tmp_path, "documents", tokens=[600, 600])
    code, _, line = lookahead("generate", changed, "--out", tmp_path / "out")
    assert code == 2 and "512" in line


def test_an_unwritable_folder_is_named(recipe, tmp_path, lookahead):
    (tmp_path / "file").write_text("in the way")
    code, _, line = lookahead("generate", recipe, "--out", tmp_path / "file" / "out")
    assert code == 2 and str(tmp_path / "file") in line


def test_a_truncated_shard_is_named_before_training(finished, recipe, tmp_path, lookahead):
    shutil.copytree(finished / "traces" / "train", tmp_path / "train")
    shard = sorted((tmp_path / "train").glob("*/doc_*"))[3]
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, _, line = lookahead("train", recipe, "--traces", tmp_path / "train", "--out", tmp_path / "out")
    assert code == 2 and shard.name in line
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("verb", ["evaluate", "calibrate", "mine", "select-layers"])
def test_a_flipped_bit_is_found_before_the_work(finished, recipe, tmp_path, lookahead, verb):
    shutil.copytree(finished / "traces" / "heldout", tmp_path / "heldout")
    shard = sorted((tmp_path / "heldout").glob("*/doc_*"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    more = {"evaluate": [recipe, "--out", tmp_path / "out"], "select-layers": ["--count", 1]}.get(verb, [recipe])
    code, _, line = lookahead(verb, *more, "--indexer", finished / "indexer", "--traces", tmp_path / "heldout")
    assert code == 2 and f"{shard}: damaged trace (its bytes are not those that were written)" in line
    assert not (tmp_path / "out").exists()


def with_nothing(verb, recipe, nothing):
    """A verb that adds to results, and its arguments: whatever it opens first complains of `nothing`."""
    return {
        "run": ["run", recipe, "--backbone", nothing],
        "evaluate": ["evaluate", recipe, "--indexer", nothing, "--traces", nothing],
        "decode": ["decode", recipe, "--bundle", nothing],
        "benchmark": ["benchmark", nothing, "--recipe", recipe],
    }[verb]


@pytest.mark.parametrize("below", ["", "below/it"])
@pytest.mark.parametrize("verb", ["run", "evaluate", "decode", "benchmark"])
def test_a_file_in_the_place_of_the_results_is_found_before_the_work(recipe, tmp_path, lookahead, verb, below):
    (tmp_path / "out").write_text("a file")
    out = tmp_path / "out" / below
    code, _, line = lookahead(*with_nothing(verb, recipe, tmp_path / "nothing"), "--out", out)
    assert code == 2 and f"{out}: a file stands where that folder is to be" in line


def test_a_name_of_two_lines_is_told_in_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "heed_signals", lambda: None)
    damaged = tmp_path / "a\nb"
    damaged.mkdir()
    (damaged / "results.json").write_text("{")
    for name, lines in (("c\nd", [0, 1]), ("a\nb", [2, 0])):
        monkeypatch.setattr(sys, "argv", ["lookahead", "inspect", str(tmp_path / name)])
        with pytest.raises(SystemExit):
            cli.main()
        assert [len(stream.splitlines()) for stream in capsys.readouterr()] == lines


def test_what_is_named_on_the_command_line_is_named_in_the_refusal(finished, recipe, tmp_path, lookahead):
    prompt, model = tmp_path / "prompt.txt", tmp_path / "model"
    prompt.write_text("")
    model.mkdir()
    decode = ("decode", recipe, "--bundle", finished / "bundle", "--out", tmp_path / "out")
    asked = ("benchmark", finished / "bundle", "--recipe", recipe, "--out", tmp_path / "out", "--task", "single")
    for arguments, complaint in [
        ((*decode, "--prompt", prompt), f"--prompt {prompt}: a text of fewer than two tokens"),
        (("generate", recipe, "--out", tmp_path / "out", "--backbone", model), f"backbone {model}: no model there"),
        (("generate", recipe, "--out", tmp_path / "out", "--documents", ""), "documents: an empty name"),
        ((*asked, "--documents", ""), "documents: an empty name"),
        (("convert", model, "--out", tmp_path / "out"), f"{model}: a folder; name a checkpoint in it"),
    ]:
        code, _, line = lookahead(*arguments)
        assert code == 2 and complaint in line, line


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("verb", ["run", "evaluate", "decode", "benchmark"])
def test_damaged_results_are_found_before_the_work(recipe, tmp_path, lookahead, verb, content):
    results = tmp_path / "results.json"
    results.write_text(content)
    code, _, line = lookahead(*with_nothing(verb, recipe, tmp_path / "nothing"), "--out", tmp_path)
    assert code == 2 and f"{results}: damaged results (" in line and results.read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_traces_of_another_backbone_or_layer_are_refused(finished, recipe, tmp_path, lookahead):
    changed = tmp_path / "heldout"
    shutil.copytree(finished / "traces" / "heldout", changed)
    manifest = read_sealed(changed / "manifest.json")
    for section, field, value in (("trace", "layers", [1]), ("backbone", "fingerprint", "other")):
        edited_manifest = manifest | {section: manifest[section] | {field: value}}
        write_sealed(changed / "manifest.json", edited_manifest)
        arguments = ("--indexer", finished / "indexer", "--traces", changed, "--out", tmp_path / "out")
        code, _, line = lookahead("evaluate", recipe, *arguments)
        assert code == 2 and ("layers" if field == "layers" else "another backbone") in line
        assert not (tmp_path / "out").exists()
    training = ("--indexer", finished / "indexer", "--traces", finished / "traces" / "train", "--out", tmp_path / "out")
    code, _, line = lookahead("evaluate", recipe, *training)
    assert code == 2 and "training documents" in line and not (tmp_path / "out").exists()
    (changed / "manifest.json").write_text('{"format": 1}')
    code, _, line = lookahead("evaluate", recipe, *arguments)
    assert (
        code == 2
        and "manifest.json: the store has format 1, but this version reads format 4; generate it again" in line
    )


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("0000/doc_0000001.safetensors", b'\\"last\\": 6', b'\\"last\\": 5'),
        ("0000/doc_0000001.safetensors", b'"checksum"', b'"checksun"'),
        ("0000/doc_0000001.safetensors", b'"dtype":"BF16"', b'"dtype":"F16" '),
        ("manifest.json", b'"checksum"', b'"checksun"'),
        ("manifest.json", b'"split": "SIDE', b'"split": "side'),
        ("manifest.json", b'"key_width": 32', b'"key_width": 64'),
        ("manifest.json", b'"context": 512', b'"context": 312'),
        ("manifest.json", b'"full_layers": [\n      0', b'"full_layers": [\n      1'),
        ("manifest.json", b'"fingerprint": "', b'"fingerprint": "a'),
    ],
)
@pytest.mark.parametrize("side", ["train", "heldout"])
def test_no_fact_of_a_store_can_be_changed(finished, recipe, tmp_path, lookahead, side, file, before, after):
    store = shutil.copytree(finished / "traces" / side, tmp_path / side)
    before, after = before.replace(b"SIDE", side.encode()), after.replace(b"side", b"other")
    content = (store / file).read_bytes()
    assert before in content
    (store / file).write_bytes(content.replace(before, after, 1))
    verbs = {
        "train": ("train", recipe, "--traces", store, "--out", tmp_path / "out"),
        "heldout": (
            "evaluate", recipe, "--indexer", finished / "indexer", "--traces", store, "--out", tmp_path / "out"
        ),
    }  # fmt: skip
    code, _, line = lookahead(*verbs[side])
    assert code == 2 and f"{store / file}: damaged " in line and not (tmp_path / "out").exists()
    code, printed, _ = lookahead("inspect", store)
    assert code == 1 and f"DAMAGED {store / file}: damaged " in printed


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layers": [0]}, "trace.layers [0, 2], but the recipe says [0]"),
        ({"window": 8}, "trace.window 16, but the recipe says 8"),
        ({"oracle": "indexer"}, "trace.oracle attention, but the recipe says indexer"),
        ({"chunking": {"tokens": 4, "sink": 1, "recent": 3}}, "trace.chunking.recent 2, but the recipe says 3"),
    ],
)
def test_traces_made_with_other_settings_are_refused(finished, recipe, tmp_path, lookahead, changes, complaint):
    changed, traces = edited(recipe, tmp_path, "trace", **changes), finished / "traces" / "train"
    code, _, line = lookahead("train", changed, "--traces", traces, "--out", tmp_path / "out")
    assert code == 2 and f"{traces}: traced with {complaint}; " in line
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_bundles_are_refused(finished, recipe, tmp_path, tokenizer, lookahead):
    bundle = tmp_path / "bundle"
    shutil.copytree(finished / "bundle", bundle)
    weights = bundle / "indexer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    code, _, line = lookahead("decode", recipe, "--bundle", bundle, "--out", tmp_path / "out")
    assert code == 2 and "damaged" in line
    (bundle / "bundle.json").write_text('{"format": 99}')
    code, _, line = lookahead("decode", recipe, "--bundle", bundle, "--out", tmp_path / "out")
    assert code == 2 and "not a bundle of this version" in line
    tiny_model("qwen3").save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    other = ("--backbone", tmp_path / "qwen", "--out", tmp_path / "out")
    code, _, line = lookahead("decode", recipe, "--bundle", finished / "bundle", *other)
    assert code == 2 and "fingerprint" in line
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_with_130_and_the_same_command_continues(recipe, tmp_path, lookahead):
    out = tmp_path / "traces"
    many = edited(recipe, tmp_path, "documents", train={"single": 100}, heldout={"single": 2})
    command = [sys.executable, "-m", "cli", "generate", str(many), "--out", str(out)]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
    where = Path(cli.__file__).parent
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=where, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(out.rglob("doc_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "lookahead: stopped; the same command continues"
    early = {path: path.stat().st_mtime_ns for path in out.rglob("doc_*")}
    assert 0 < len(early) < 102 and not list(out.rglob(".unfinished*"))
    assert lookahead("generate", many, "--out", out)[0] == 0
    assert len(list(out.rglob("doc_*"))) == 102
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in early.items())


def heeds(process, number):
    """Whether a process has a handler for a signal, as the kernel sees it."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("delay", [0, 0.3, 0.8, 1.5, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_ends_in_one_line(recipe, tmp_path, number, delay):
    command = [sys.executable, "-m", "cli", "generate", str(recipe), "--out", str(tmp_path / "traces")]
    where, heed = Path(cli.__file__).parent, partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=where, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not heeds(process, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or takes no signal"
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 128 + number and "Traceback" not in error
    assert error.splitlines()[-1] == "lookahead: stopped; the same command continues"


@pytest.mark.parametrize("shared", [False, True])
def test_text_on_both_sides_is_warned_of(recipe, tmp_path, lookahead, shared):
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. "
    for number in range(10):
        text = f"Text number {number} is about something of its own. " * 8
        (tmp_path / f"{number}.txt").write_text(f"{licence}\n\n{text}" if shared else text)
    one = {"document": 1}
    changed = edited(recipe, tmp_path, "documents", source=str(tmp_path), train=one, heldout=one)
    code, printed, _ = lookahead("generate", changed, "--out", tmp_path / "out")
    warning = "warning: 1 of 1 held-out documents share paragraphs with training ones (20.8%"
    assert code == 0 and (warning in printed) == shared


def test_benchmark_adds_to_results_and_continues(finished, recipe, tmp_path, lookahead):
    arguments = ("benchmark", finished / "bundle", "--out", tmp_path / "out", "--length", 500, "--task", "single")
    code, printed, line = lookahead(*arguments, "--recipe", recipe, "--examples", 2, "--budget", 0.1)
    assert code == 0 and "| needles single" in printed and "| mrcr" in printed, line
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["benchmark"]
    policies = {"full", "indexer", "mean_pooled", "recency", "random", "protected", "oracle", "indexer+fallback"}
    assert {row["policy"] for row in rows} == policies and {row["task"] for row in rows} == {"single", "mrcr"}
    assert all((row["policy"] == "indexer+fallback") == ("fallbacks" in row) for row in rows)
    assert '<figure id="benchmark">' in (tmp_path / "out" / "report.html").read_text()
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    model = ("--model", recipe.parent / "model", "--examples", 1, "--budget", 0.1)
    assert lookahead(*arguments, *model)[0] == 0 and (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    for more, complaint in [
        ((), "--backbone PATH, or a --recipe"),
        ((*model, "--task", "poetry"), "benchmark.tasks.1: Input should be"),
        ((*model, "--file", "ruler"), "benchmark.files.0.source: Field required"),
        ((*model, "--file", f"mrcr={recipe}.json"), "no such file"),
        ((*model, "--budget", 0.3), "other settings (budgets)"),
    ]:
        code, _, line = lookahead(*arguments, *more)
        assert code == 2 and complaint in line, line


def test_select_layers_saves_what_it_found_best(finished, tmp_path, lookahead):
    traces = ("--traces", finished / "traces" / "heldout")
    indexer = ("--indexer", finished / "indexer")
    code, table, _ = lookahead("select-layers", *indexer, *traces, "--count", 1, "--out", tmp_path / "served")
    assert code == 0
    first = [cell.strip() for cell in table.splitlines()[2].split("|")[1:4]]
    spec = json.loads(next((tmp_path / "served").rglob("spec.json")).read_text())
    assert [str(layer) for layer in spec["layers"]] == [first[0]] and spec["shape"]["join"] == first[1]
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    before = {path: path.read_bytes() for path in finished.glob("indexer/**/*") if path.is_file()}
    for out in (finished / "indexer", tmp_path / "served"):
        code, table, line = lookahead("select-layers", *indexer, *traces, "--count", 2, "--out", out)
        assert code == 2 and f"{out}: not empty" in line and not table
    assert {path: path.read_bytes() for path in finished.glob("indexer/**/*") if path.is_file()} == before
    code, _, line = lookahead("select-layers", *indexer, *traces, "--count", 3)
    assert code == 2 and "cannot choose 3" in line


def test_what_cannot_be_trained_on_is_refused(finished, recipe, tmp_path, lookahead, monkeypatch):
    monkeypatch.chdir(finished)
    for stores, complaint in (
        (("traces/heldout",), "held-out documents; train on others"),
        (("traces/train", "traces/train"), "given twice"),
        (("traces/train", finished / "traces/train"), "given twice"),
    ):
        options = [word for store in stores for word in ("--traces", store)]
        code, _, line = lookahead("train", recipe, *options, "--out", tmp_path / "out")
        assert code == 2 and complaint in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"learning_rate": float("inf")}, "train.learning_rate: Input should be a finite number"),
        ({"loss_options": {"gamma": float("inf")}}, "train.loss_options.gamma.float: Input should be a finite number"),
        ({"clip": float("nan")}, "train.clip: Input should be"),
        ({"seed": -5}, "train.seed: Input should be greater than or equal to 0"),
        ({"seed": 1 << 32}, "train.seed: Input should be less than 4294967296"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused(finished, recipe, tmp_path, lookahead, changes, complaint):
    changed = edited(recipe, tmp_path, "train", **changes)
    code, _, line = lookahead("train", changed, "--traces", finished / "traces/train", "--out", tmp_path / "out")
    assert code == 2 and complaint in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", ["inf", "nan", "0"])
def test_weights_are_numbers(finished, recipe, tmp_path, lookahead, weight):
    traces = ("--traces", finished / "traces/train", "--weight", weight)
    code, _, line = lookahead("train", recipe, *traces, "--out", tmp_path / "out")
    assert code == 2 and "Invalid value for '--weight'" in line and not (tmp_path / "out").exists()


def test_mine_writes_beside_the_traces_and_training_reads_it(finished, recipe, tmp_path, lookahead, caplog):
    pytest.importorskip("faiss")
    traces = tmp_path / "train"
    shutil.copytree(finished / "traces" / "train", traces)
    hard = edited(recipe, tmp_path, "train", loss="focal", epochs=1, candidates={"kind": "sampled", "source": "hard"})
    code, _, line = lookahead("train", hard, "--traces", traces, "--out", tmp_path / "run")
    assert code == 2 and "run `lookahead mine`" in line
    code, out, _ = lookahead("mine", recipe, "--indexer", finished / "indexer", "--traces", traces, "--count", 8)
    assert code == 0 and str(traces / "hard_negatives") in out
    assert caplog.messages[-1] == f"next: lookahead train {recipe} --traces {traces} --out RUN"
    assert lookahead("train", hard, "--traces", traces, "--out", tmp_path / "run")[0] == 0


def test_calibrate_stores_what_is_served_and_says_what_it_costs(finished, recipe, tmp_path, lookahead, caplog):
    shutil.copytree(finished / "indexer", tmp_path / "indexer")
    heldout = finished / "traces" / "heldout"
    asked = ("calibrate", recipe, "--indexer", tmp_path / "indexer", "--traces")
    code, out, _ = lookahead(*asked, heldout, "--recall", 0.5, "--longest", 450)
    assert code == 0 and "served: scores from" in out and "for a mass recall of 50.0%" in out
    assert (tmp_path / "indexer" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "indexer" / "calibration.json").read_text())["rows"]
    assert lookahead("export", "--indexer", tmp_path / "indexer", "--out", tmp_path / "bundle")[0] == 0
    (served, *others) = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["spec"]["selections"]
    assert served["target"] == "recall" and len(served["cuts"]) == 2 and len(others) == 2
    code, out, _ = lookahead(*asked, heldout, "--recall", 0.5, "--longest", 512)
    assert code == 0 and "no held-out context beyond 512 tokens" in out
    code, out, _ = lookahead(*asked, heldout, "--by", "coverage")
    assert code == 0 and "served: the best chunks up to a predicted share of 0." in out and "(to keep 10.0%)" in out
    code, out, _ = lookahead(*asked, heldout, "--by", "budget")
    assert code == 0 and "served: the best 10.0% of the chunks" in out
    assert caplog.messages[-1] == f"next: lookahead export --indexer {tmp_path / 'indexer'} --out BUNDLE"
    for more, complaint in (
        ((finished / "traces" / "train",), "training documents"),
        ((heldout, "--recall", 0.5, "--by", "budget"), "--recall sets the threshold or the coverage"),
        ((heldout, "--longest", 3), "no held-out window"),
    ):
        code, _, line = lookahead(*asked, *more)
        assert code == 2 and complaint in line


def test_inspect_says_what_lies_there_and_exits_1_on_damage(finished, tmp_path, lookahead):
    for place, kind in (("indexer", "indexer"), ("bundle", "bundle"), ("traces/train", "trace store"), (".", "run")):
        code, out, _ = lookahead("inspect", finished / place)
        assert code == 0 and kind in out.splitlines()[0], out
    shutil.copytree(finished / "traces" / "heldout", tmp_path / "store")
    shard = next((tmp_path / "store").glob("*/doc_*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    code, out, _ = lookahead("inspect", tmp_path / "store")
    assert code == 1 and f"DAMAGED {shard}" in out
    (tmp_path / "nothing").mkdir()
    code, _, line = lookahead("inspect", tmp_path / "nothing")
    assert code == 2 and "neither" in line


def test_help_groups_the_verbs_and_gives_each_an_example(lookahead):
    code, printed, _ = lookahead("--help")
    assert code == 0
    for group in ("Make data", "Train", "Look", "Serve", "Exchange"):
        assert f" {group} " in printed
    assert "--install-completion" in printed
    printed = " ".join(lookahead("plan", "--help")[1].split())
    assert all(name in printed for name in PLANNED)
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert command.epilog.startswith(f"Example: `lookahead {name} "), name
        assert command.rich_help_panel in (cli.MAKE, cli.TRAIN, cli.LOOK, cli.SERVE, cli.EXCHANGE), name


def test_the_version_is_the_distributions(lookahead):
    assert lookahead("--version")[:2] == (0, f"lookahead {version('lookahead-indexer')}\n")


EXPORT = "lookahead export --indexer"


@pytest.mark.parametrize(
    ("asked", "then"),
    [
        (
            "generate RECIPE --out OUT --plan-only --backbone MODEL",
            "lookahead generate RECIPE --out OUT --backbone MODEL",
        ),
        (
            "generate RECIPE --out 'OUT 1' --plan-only --max-failures 5% --ray --workers 2 --gpus-per-worker 0.5",
            "lookahead generate RECIPE --out 'OUT 1' --ray --max-failures 5% --workers 2 --gpus-per-worker 0.5",
        ),
        ("inspect DONE/traces/heldout", "lookahead train ANY --traces DONE/traces/heldout --out RUN"),
        ("inspect DONE/indexer", f"{EXPORT} DONE/indexer --out BUNDLE"),
        ("inspect DONE/bundle/bundle.json", "lookahead decode ANY --bundle DONE/bundle --out RUN"),
        ("inspect DONE/indexer/README.md", "lookahead --help, for the verbs that read it"),
        (
            "verify --traces DONE/traces/heldout --indexer DONE/indexer",
            "lookahead train ANY --traces DONE/traces/heldout --out RUN",
        ),
        (
            "train RECIPE --traces DONE/traces/train --out DONE",
            "lookahead evaluate RECIPE --indexer DONE/indexer --traces HELDOUT --out DONE",
        ),
        ("generate RECIPE --out OUT", "lookahead train RECIPE --traces OUT/train --out RUN"),
        (
            "generate RECIPE --out OUT --shard 0/2",
            "when all 2 shards are done, lookahead train RECIPE --traces OUT/train --out RUN",
        ),
        (
            "select-layers --indexer DONE/indexer --traces DONE/traces/heldout --count 1 --out OUT",
            f"{EXPORT} OUT --out BUNDLE",
        ),
        (
            "select-layers --indexer DONE/indexer --traces DONE/traces/heldout --count 1",
            f"the same with --out SERVED, then {EXPORT} SERVED --out BUNDLE",
        ),
        (
            "evaluate RECIPE --indexer DONE/indexer --traces DONE/traces/heldout --out OUT",
            f"{EXPORT} DONE/indexer --out BUNDLE",
        ),
        (
            "evaluate RECIPE --indexer DONE/indexer --traces DONE/traces/heldout --out OUT --shard 0/2",
            f"when all 2 shards are done, {EXPORT} DONE/indexer --out BUNDLE",
        ),
        ("card --indexer DONE/indexer --results DONE", f"{EXPORT} DONE/indexer --out BUNDLE"),
        (
            "run RECIPE --out DONE --backbone MODEL",
            "lookahead benchmark DONE/bundle --recipe RECIPE --out DONE --backbone MODEL",
        ),
        (
            "benchmark DONE/bundle --recipe RECIPE --out OUT --length 500 --task single --examples 1",
            "OUT/report.html, in a browser",
        ),
        ("plan deepseek-v4-flash --recipe RECIPE", "lookahead generate RECIPE --out TRACES"),
    ],
)
def test_what_comes_next_is_true_of_what_was_asked(finished, recipe, tmp_path, lookahead, caplog, asked, then):
    places = {"RECIPE": recipe, "OUT": tmp_path / "out", "DONE": finished, "MODEL": recipe.parent / "model"}
    places["ANY"] = "RECIPE"  # what the verb could not know

    def placed(text):
        return re.sub(r"\b(RECIPE|OUT|DONE|MODEL|ANY)\b", lambda word: str(places[word[0]]), text)

    assert lookahead(*shlex.split(placed(asked)))[0] == 0
    assert caplog.messages[-1] == f"next: {placed(then)}"


def test_what_was_exported_for_others_is_looked_at_next(finished, tmp_path, lookahead, caplog, monkeypatch):
    monkeypatch.setattr("indexer_train.formats.convert.export_indexer", lambda indexer, out, *rest: Exported([out]))
    asked = ("--indexer", finished / "indexer", "--out", tmp_path / "joint.pt", "--format", "flashmemory-joint")
    assert lookahead("export", *asked)[0] == 0
    assert caplog.messages[-1] == f"next: lookahead inspect {tmp_path / 'joint.pt'}, then serve it as told above"


@pytest.mark.parametrize("started", ["RANK WORLD_SIZE", "SLURM_PROCID SLURM_STEP_NUM_TASKS"])
def test_a_driver_of_ray_has_no_shard_whoever_started_it(recipe, tmp_path, lookahead, caplog, monkeypatch, started):
    for name, value in zip(started.split(), "02", strict=True):
        monkeypatch.setenv(name, value)
    evaluated = []
    monkeypatch.setattr(cli, "_trace_on_ray", lambda *given: None)
    monkeypatch.setattr("eval.offline.verbs.evaluate_traces", lambda *given: evaluated.append(given[5]))
    assert lookahead("generate", recipe, "--out", tmp_path, "--ray")[0] == 0
    assert caplog.messages[-1] == f"next: lookahead train {recipe} --traces {tmp_path}/train --out RUN"
    assert lookahead("evaluate", recipe, "--indexer", "A", "--traces", "B", "--out", tmp_path, "--ray")[0] == 0
    assert caplog.messages[-1] == "next: lookahead export --indexer A --out BUNDLE"
    assert evaluated[0].shard.count == 1 and evaluated[0].cluster is not None


def test_messages_of_libraries_are_shown_only_when_asked_for(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "cli", "plan", tmp_path]
    for options in ([], ["--verbose"]):
        done = subprocess.run([*command[:3], *options, *command[3:]], capture_output=True, text=True, check=True,
                              cwd=Path(cli.__file__).parent)  # fmt: skip
        assert ("loading configuration file" in done.stderr) == bool(options), done.stderr


def test_a_librarys_line_is_written_once_whoever_writes_it():
    """Transformers writes its own, which CI makes reach the root as well; a NullHandler writes nothing."""
    code = (
        "import logging, transformers, cli; logging.getLogger('silent').addHandler(logging.NullHandler());"
        "cli.app(['--verbose', 'plan', '--help'], standalone_mode=False);"
        "logging.getLogger('silent.part').info('heard');"
        "transformers.logging.get_logger('transformers.part').warning('said')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(cli.__file__).parent, env=os.environ | {"CI": "true"},
    )  # fmt: skip
    assert [done.stderr.count(word) for word in ("heard", "said")] == [1, 1], done.stderr


def test_a_verb_says_what_comes_next_unless_it_is_to_be_quiet(finished, tmp_path):
    command = [sys.executable, "-m", "cli", "export", "--indexer", finished / "indexer", "--out", tmp_path / "bundle"]
    where = Path(cli.__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=where, check=True)
    assert done.stderr.endswith(f"next: lookahead decode RECIPE --bundle {tmp_path / 'bundle'} --out RUN\n")
    command[3:3] = ["--quiet"]
    quiet = subprocess.run(command, capture_output=True, text=True, cwd=where, check=True)
    assert quiet.stdout == done.stdout and not quiet.stderr
    quiet = subprocess.run(
        [sys.executable, "-m", "cli", "--quiet", "inspect", finished / "traces" / "train"],
        capture_output=True, text=True, cwd=where, check=True,
    )  # fmt: skip
    assert quiet.stdout and not quiet.stderr
