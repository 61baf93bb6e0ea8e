"""The report: looked at in a browser, readable without one, and complete from whatever results there are."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib import image

from data_gen.core.errors import InputError
from eval.offline.evaluation import evaluate
from eval.report.page import write_report
from eval.report.tables import decode_summary, decode_table, threshold_lines, write_results
from tests.eval.report.conftest import BENCHMARK, DECODE

PICTURES = [
    "recall",
    "accuracy",
    "benchmark",
    "depth",
    "reliability",
    "threshold",
    "heat",
    "timeline",
    "lookahead",
    "churn",
]


@pytest.fixture(scope="module")
def folder(stores, indexer, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    write_results(out, **evaluate({"indexer": indexer}, stores[1], 0.05, 0.1), **BENCHMARK, decode=DECODE)
    write_report(out)
    return out


def test_the_page_needs_nothing_from_outside(folder):
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == len(PICTURES) and all(each.startswith("data:image/svg+xml;base64,") for each in sources)
    assert re.findall(r'<figure id="(\w+)">', page) == PICTURES
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_the_summary_holds_every_table(folder):
    summary = (folder / "report.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    for title in ("Recall against budget", "Accuracy against KV bytes", "Calibration", "Lookahead and churn"):
        assert f"## {title}" in summary
    row = next(r for r in results["recall"] if (r["policy"], r["task"], r["budget"]) == ("indexer", "needles", 0.1))
    low, high = row["interval"]["mass_recall"]
    assert f"{row['mass_recall']:.3f} [{low:.3f}, {high:.3f}]" in summary
    assert f"{row['micro']['f1']:.3f}" in summary
    assert "macro precision | macro F1" in summary and "micro precision | micro F1" in summary
    assert "-50 [-50, -50] / 15.0%" in summary  # beside full attention, and the share kept
    top = next(r for r in results["recall"] if (r["policy"], r["task"], r["budget"]) == ("indexer", "text", "top 8"))
    line = next(line for line in summary.splitlines() if re.match(r"\| text +\| indexer +\| [01]\.\d{3} +\|", line))
    assert f" {top['golden_recall']:.3f} " in line
    depth = next(r for r in results["by_depth"] if (r["policy"], r["budget"]) == ("indexer", 0.1))
    assert re.search(rf"\| depth +\| {depth['task']} +\| indexer +\| {depth['mass_recall']:.3f}", summary)


def test_every_group_says_what_its_threshold_kept(folder):
    results = json.loads((folder / "results.json").read_text())
    rows = {r["task"]: r for r in results["recall"] if (r["policy"], r["budget"]) == ("indexer", "threshold")}
    lines = threshold_lines(results)
    assert len(lines) == len(rows) and rows.keys() == {"text", "multi_value", "needles"}
    for line, (task, row) in zip(lines, rows.items(), strict=True):
        assert line.startswith(f"threshold, {task}: {results['evaluated']['thresholds']['indexer']}: kept ")
        figures = (f"{row['kept']:.1%}", f"{row['mass_recall']:.3f}", f"{row['golden_recall']:.3f}")
        assert line.endswith("kept {}, macro mass recall {}, golden recall {}".format(*figures))
    chat = dict(next(iter(rows.values())), task="chat", golden_recall=None)
    (line,) = threshold_lines({"recall": [chat], "evaluated": results["evaluated"]})
    assert line.startswith("threshold, chat: ") and line.endswith("golden recall -")


def test_a_browser_shows_every_plot(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)(
            "no Chromium on this machine (Debian: apt-get install chromium)"
        )
    script = (
        "<script>onload = () => { document.title = JSON.stringify([...document.images].map(i => "
        "[i.alt, i.naturalWidth, Math.round(i.getBoundingClientRect().top), Math.round(i.width), Math.round(i.height)]"
        ")); }</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", script))
    common = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/u",
    ]
    common += ["--window-size=1200,12000", "--virtual-time-budget=5000"]
    dom = subprocess.run([*common, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<title>(\[.*?\])</title>", dom.stdout)[1].replace("&quot;", '"'))
    assert [alt for alt, *_ in found] == PICTURES
    assert all(natural > 0 for _, natural, *_ in found)
    shot = tmp_path / "shot.png"
    command = [*common, f"--screenshot={shot}", f"file://{folder / 'report.html'}"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    pixels = (image.imread(shot)[:, :, :3] * 255).astype(int)
    for alt, _, top, width, height in found:
        assert top + height < len(pixels) and width > 300 and height > 150, alt
        area = pixels[top : top + height, :width]
        assert len(np.unique(area.reshape(-1, 3), axis=0)) > 30, f"{alt}: an empty picture"
        assert (area.max(axis=2) - area.min(axis=2) > 60).any(), f"{alt}: no colour in it"


def test_parts_of_the_results_make_a_report_of_their_own(folder, tmp_path):
    write_results(tmp_path, decode=DECODE)
    write_report(tmp_path)
    assert re.findall(r'<figure id="(\w+)">', (tmp_path / "report.html").read_text()) == ["accuracy"]
    with pytest.raises(InputError, match="no results there"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="damaged results"):
        write_report(tmp_path)


def test_the_plain_sentence_says_nothing_of_what_was_not_asked():
    row = {"examples": 0, "correct": 0, "low": 0.0, "high": 1.0, "kl": 0.1, "chunks": 9.0, "refreshes": 3}
    rows = [
        row | {"policy": "full", "kv_share": 1.0, "kv_mb": 8.0, "agreement": 1.0},
        row | {"policy": "indexer", "kv_share": 0.25, "kv_mb": 2.0, "agreement": 0.875},
    ]
    assert decode_summary(rows) == (
        "With 25% of the KV cache resident (2.0 of 8.0 MB), "
        "its next token on text agreed with full attention's 88% of the time."
    )
    assert "0 of 0" not in decode_table(rows)
    asked = [each | {"examples": 4, "correct": 3, "agreement": None} for each in rows]
    assert decode_summary(asked).endswith("the model answered 3 of 4 needle questions; with all of it, 3.")
