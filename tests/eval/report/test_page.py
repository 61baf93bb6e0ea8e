"""The report: looked at in a browser, readable without one, and complete from whatever results there are."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from markupsafe import escape
from matplotlib import image

from data_gen.core.errors import InputError
from eval.offline.evaluation import DEPTH_BINS, evaluate
from eval.report.page import write_report
from eval.report.rows import DecodeRow, Results
from eval.report.setting import commit, setting_of
from eval.report.tables import calibrated_lines, decode_summary, decode_table, read_results, write_results
from tests.eval.report.conftest import BENCHMARK, DECODE, TEXT

PICTURES = [
    "accuracy",
    "benchmark",
    "depth",
    "kl",
    "recall",
    "heat",
    "reliability",
    "threshold",
    "timeline",
    "lookahead",
    "churn",
]
HEADINGS = [
    "Accuracy against KV bytes",
    "Benchmark: accuracy against KV bytes",
    "Text: KL from full attention",
    "Recall against budget",
    "Recall by length and depth",
    "Needle depth and document length",
    "Recall@K of golden chunks (macro)",
    "Every metric at the budget and as calibrated",
    "Calibration",
    "One document, token by token",
    "Lookahead and churn",
]
"""Answers, text and bytes lead; recall is diagnosis."""
HOSTILE = '<script>document.title = "broken"</script>&"\'$\\frac$'


@pytest.fixture(scope="module")
def folder(stores, indexer, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    measured = {verb: setting_of(indexer, "runs/mine.yaml", f"of {verb}") for verb in ("evaluate", "decode")}
    write_results(out, **evaluate({"indexer": indexer}, stores[1], 0.05, 0.1), **BENCHMARK, **TEXT, decode=DECODE)
    write_results(out, measured=measured)
    write_report(out)
    return out


def tables(page, anchor):
    """[table][row][cell] of a section of the page, headers first."""
    (section,) = re.findall(rf'<section id="{anchor}">(.*?)</section>', page, flags=re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", each) for each in re.findall(r"<table>(.*?)</table>", section, re.DOTALL)]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table] for table in rows]


def test_the_page_needs_nothing_from_outside(folder):
    page = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources) == len(PICTURES) and all(each.startswith("data:image/svg+xml;base64,") for each in sources)
    assert re.findall(r'<figure id="(\w+)">', page) == PICTURES
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_the_page_opens_with_its_setting_one_sentence_and_its_contents(folder):
    page = (folder / "report.html").read_text()
    head, body = page.split("</header>")
    assert html.unescape(re.search(r'<p class="sentence">(.*?)</p>', head)[1]) == (
        "With 20% of the KV cache resident (12.0 of 60.0 MB), the model answered 7 of 10 needle questions; with all of "
        "it, 8; its next token on text agreed with full attention's 90% of the time."
    )
    facts = dict(re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", head))
    assert list(facts) == ["model", "recipe", "commit", "hardware", "date", "chunking", "documents"]
    assert facts["recipe"] == "mine.yaml" and facts["documents"] == "evaluate: of evaluate<br>decode: of decode"
    assert facts["commit"] == (commit() or "unknown") and re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts["chunking"].startswith("chunks of 4 tokens, the first 1 and the newest ")
    links = re.findall(r'<li><a href="#(\w+)">(.*?)</a></li>', head)
    assert links == re.findall(r'<section id="(\w+)">\s*<h2>(.*?)</h2>', body)
    assert [title for _, title in links] == HEADINGS
    anchors = re.findall(r' id="(\w+)"', page)
    assert len(anchors) == len(set(anchors))


def test_diagnosis_leaves_out_what_says_nothing(folder):
    page = (folder / "report.html").read_text()
    for anchor in ("budgets", "places", "tops", "metrics"):
        assert tables(page, anchor) and "protected" not in str(tables(page, anchor))
    for table in tables(page, "metrics"):
        rows = [row[:3] for row in table[1:]]
        assert ["needles", "layer 0", "10.0%"] in rows and ["needles", "indexer", "threshold"] in rows
        assert not any(policy.startswith("layer") and cut == "threshold" for _, policy, cut in rows)
    assert not re.search(
        r"\d\.\d{3}", str([tables(page, anchor) for anchor in ("budgets", "places", "tops", "metrics")])
    )


def test_lengths_and_depths_are_in_order_and_recall_at_k_is_a_table_for_each_task(folder):
    page = (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    lengths, depths = ([row[0] for row in table[1:]] for table in tables(page, "places"))
    starts = [int(name.split("-")[0].replace(",", "")) for name in lengths]
    assert starts == sorted(starts) and len(set(starts)) > 1
    assert depths == sorted(depths, key=lambda name: int(name.split("%")[0])) and set(depths) <= set(DEPTH_BINS)
    captions = re.findall(r"<summary>(\w+) \(\d+ rows\)</summary>", page.split('id="tops"')[1].split("</section>")[0])
    assert captions == ["needles", "text", "multi_value"]
    cuts = {row["budget"] for row in results["recall"] if str(row["budget"]).startswith("top ")}
    for table in tables(page, "tops"):
        assert table[0] == ["policy", *sorted((f"@{cut[4:]}" for cut in cuts), key=lambda name: int(name[1:]))]
        policies = [row[0] for row in table[1:]]
        assert policies[:2] == ["oracle", "indexer"] and len(policies) == len(set(policies))


def test_long_tables_are_folded_and_the_first_ones_are_not(folder):
    page = (folder / "report.html").read_text()
    open_tables = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert all(
        len(table) <= 1 + 12 for anchor in ("places", "budgets", "text") for table in tables(open_tables, anchor)
    )
    assert len(tables(open_tables, "answers")[0]) == 4 and len(tables(open_tables, "tasks")[0]) == 4
    assert not tables(open_tables, "metrics") and not tables(open_tables, "tops")
    assert len(tables(page, "metrics")) == 2 and "<details open" not in page


def test_names_are_shown_and_not_run(folder, tmp_path):
    results = read_results(folder).content()
    results["timeline"]["document"] = HOSTILE
    for row in [*results["recall"], *results["benchmark"], *results["decode"]]:
        if row.get("task") in ("multi_value", "single"):
            row["task"] = HOSTILE
        elif row["policy"] == "random":
            row["policy"] = HOSTILE
    results["measured"]["decode"] |= {"recipe": HOSTILE, "documents": HOSTILE, "model": HOSTILE}
    results["evaluated"]["notes"] = [HOSTILE]
    write_results(tmp_path, **results)
    page = write_report(tmp_path)[0].read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == page.count(str(escape(HOSTILE))) > 10


def test_the_summary_holds_every_table(folder):
    summary = (folder / "report.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert re.findall(r"^## (.*)$", summary, flags=re.MULTILINE) == HEADINGS
    row = next(r for r in results["recall"] if (r["policy"], r["task"], r["budget"]) == ("indexer", "needles", 0.1))
    low, high = row["interval"]["mass_recall"]
    assert f"{row['mass_recall']:.2f} [{low:.2f}, {high:.2f}]" in summary
    assert f"{row['micro']['f1']:.2f}" in summary
    assert "macro precision | macro F1" in summary and "micro precision | micro F1" in summary
    assert re.search(r"\| -50 \[-50, -50\] +\| 15.0%", summary)  # beside full attention, and the share kept
    top = next(r for r in results["recall"] if (r["policy"], r["task"], r["budget"]) == ("indexer", "text", "top 8"))
    text = summary.split("**text**")[1]
    line = next(line for line in text.splitlines() if re.match(r"\| indexer +\| [01]\.\d{2} +\|", line))
    assert line.split("|")[2].strip() == f"{top['golden_recall']:.2f}"
    depth = next(r for r in results["by_depth"] if (r["policy"], r["budget"]) == ("indexer", 0.1))
    assert re.search(rf"\| {depth['task']} +\| indexer +\| {depth['mass_recall']:.2f}", summary)
    assert f"| {results['benchmark_text'][1]['kl']:.2f} [" in summary


def test_every_group_says_what_its_threshold_kept(folder):
    results = json.loads((folder / "results.json").read_text())
    rows = {r["task"]: r for r in results["recall"] if (r["policy"], r["budget"]) == ("indexer", "threshold")}
    lines = calibrated_lines(Results.model_validate(results))
    assert len(lines) == len(rows) and rows.keys() == {"text", "multi_value", "needles"}
    for line, (task, row) in zip(lines, rows.items(), strict=True):
        assert line.startswith(f"threshold, {task}: {results['evaluated']['thresholds']['indexer']}: kept ")
        decimals = 2 if row["documents"] < 20 else 3
        figures = f"{row['kept']:.1%}", *(f"{row[name]:.{decimals}f}" for name in ("mass_recall", "golden_recall"))
        assert line.endswith("kept {}, macro mass recall {}, golden recall {}".format(*figures))
    chat = dict(next(iter(rows.values())), task="chat", golden_recall=None)
    (line,) = calibrated_lines(Results.model_validate({"recall": [chat], "evaluated": results["evaluated"]}))
    assert line.startswith("threshold, chat: ") and line.endswith("golden recall -")
    evaluated = results["evaluated"] | {"coverages": {"A": "half"}}
    rows = [chat | {"policy": policy, "budget": "coverage"} for policy in ("A", "B", "A layer 2")]
    (line,) = calibrated_lines(Results.model_validate({"recall": rows, "evaluated": evaluated}))
    assert line.startswith("coverage of A, chat: half: kept ")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The command of a browser without a window, 1,280 px wide."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)(
            "no Chromium on this machine (Debian: apt-get install chromium)"
        )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    return [found, *options, f"--user-data-dir={tmp_path_factory.mktemp('user')}", "--window-size=1280,14000"]


def asked(browser, page, script, tmp_path, *options):
    """What `script`, an expression, says of the page."""
    told = tmp_path / "page.html"
    ask = f"<script>onload = () => {{ document.title = JSON.stringify({script}); }}</script></body>"
    told.write_text(page.read_text().replace("</body>", ask))
    command = [*browser, *options, "--dump-dom", f"file://{told}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom.stdout)[1]))


def test_a_browser_shows_every_plot(folder, browser, tmp_path):
    page = folder / "report.html"
    script = (
        "[...document.images].map(i => { const r = i.getBoundingClientRect(); "
        "return [i.alt, i.naturalWidth, Math.round(r.top), Math.round(r.left), Math.round(i.width), "
        "Math.round(i.height)]; })"
    )
    found = asked(browser, page, script, tmp_path)
    assert [alt for alt, *_ in found] == PICTURES
    assert all(natural > 0 for _, natural, *_ in found)
    shot = tmp_path / "shot.png"
    subprocess.run([*browser, f"--screenshot={shot}", f"file://{page}"], capture_output=True, check=True, timeout=120)
    pixels = (image.imread(shot)[:, :, :3] * 255).astype(int)
    for alt, _, top, left, width, height in found:
        assert top + height < len(pixels) and width > 300 and height > 150, alt
        area = pixels[top : top + height, left : left + width]
        assert len(np.unique(area.reshape(-1, 3), axis=0)) > 30, f"{alt}: an empty picture"
        assert (area.max(axis=2) - area.min(axis=2) > 60).any(), f"{alt}: no colour in it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_within_the_page_and_readable(folder, browser, tmp_path, scheme):
    script = """(() => {
        const folds = [...document.querySelectorAll("details")], shut = folds.filter(d => !d.open).length;
        const hidden = folds.filter(d => d.querySelector("table").checkVisibility()).length;
        folds.forEach(d => { d.open = true; });
        const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > 1265);
        const boxes = [...document.querySelectorAll("body *")].filter(e => e.scrollWidth > e.clientWidth + 1
            && getComputedStyle(e).overflowX != "visible");
        const style = getComputedStyle(document.body);
        const links = [...document.querySelectorAll("nav a")].map(a => {
            location.hash = a.getAttribute("href");
            return document.querySelector(":target h2").textContent;
        });
        return {shut, folds: folds.length, hidden, wide: wide.map(e => e.outerHTML.slice(0, 80)),
            boxes: boxes.map(e => e.outerHTML.slice(0, 80)), across: document.documentElement.scrollWidth,
            headings: [...document.querySelectorAll("h2")].map(h => h.textContent), links, ink: style.color,
            paper: style.backgroundColor};
    })()"""
    setting = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    long = read_results(folder).content()
    for row in long["benchmark"]:
        row["task"] = "a_task_whose_name_goes_on_and_on_" * 6
        row |= {"fallbacks": 1000, "windows": 2000}
    write_results(tmp_path, **long)
    found = asked(browser, write_report(tmp_path)[0], script, tmp_path, setting)
    assert found["across"] <= 1280 and not found["wide"] and not found["boxes"]
    assert found["shut"] == found["folds"] > 5 and found["hidden"] == 0
    assert found["headings"] == found["links"] == HEADINGS
    ink, paper = (sum(map(int, re.findall(r"\d+", found[name])[:3])) / 3 for name in ("ink", "paper"))
    assert (paper - ink > 150) if scheme == "light" else (ink - paper > 150)


def test_parts_of_the_results_make_a_report_of_their_own(folder, tmp_path):
    write_results(tmp_path, decode=DECODE)
    write_report(tmp_path)
    assert re.findall(r'<figure id="(\w+)">', (tmp_path / "report.html").read_text()) == ["accuracy", "kl"]
    with pytest.raises(InputError, match="no results there"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="damaged results"):
        write_report(tmp_path)


def test_the_plain_sentence_says_nothing_of_what_was_not_asked():
    row = {"examples": 0, "correct": 0, "low": 0.0, "high": 1.0, "kl": 0.1, "chunks": 9.0, "refreshes": 3}
    rows = [
        row | {"policy": "full", "kv_share": 1.0, "kv_mb": 8.0, "agreement": 1.0, "texts": 1},
        row | {"policy": "indexer", "kv_share": 0.25, "kv_mb": 2.0, "agreement": 0.875, "texts": 1},
    ]
    typed = [DecodeRow.model_validate(row) for row in rows]
    assert decode_summary(typed) == (
        "With 25% of the KV cache resident (2.0 of 8.0 MB), "
        "its next token on text agreed with full attention's 88% of the time."
    )
    assert "0 of 0" not in str(decode_table(typed))
    answered = [each.model_copy(update={"examples": 4, "correct": 3, "agreement": None}) for each in typed]
    assert decode_summary(answered).endswith("the model answered 3 of 4 needle questions; with all of it, 3.")
