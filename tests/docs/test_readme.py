"""README.md: the numbers of its table are those of benchmarks/results/, and its walk asks for text enough."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.train_on_my_texts import CHARACTERS, PARTS, SHORTEST

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
NEEDLES = ("single", "multi_key", "multi_value")
COLUMNS = {
    "full": ["full"], "indexer": ["indexer", "recipe"], "recency": ["recency"],
    "mean-pooled": ["mean_pooled", "mean-pooled keys"], "oracle": ["oracle of peaks"],
}  # fmt: skip
"""What the files call the policies of README's table."""


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def line(by_policy: dict[str, tuple[float, str]]) -> list[str]:
    """Cells of one row, from the share kept and what is shown by policy."""
    found = [next((by_policy[name] for name in names if name in by_policy), None) for names in COLUMNS.values()]
    _, (kept, _), *baselines = found
    assert all(baseline is None or round(baseline[0], 4) >= round(kept, 4) for baseline in baselines)
    return [f"{kept:.0%}", *("" if cell is None else cell[1] for cell in found)]


def nats(kl: float) -> str:
    return f"{kl:.3f}".lstrip("0") if kl else "0"


def ablated(file: str, tokens: int, *tasks: str) -> list[str]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read(file)["rows"]:
        if (row["set"], row["tokens"]) == ("report", tokens) and row["task"] in tasks:
            rows.setdefault(row["policy"], []).append(row)

    def shown(found: list[dict[str, Any]]) -> str:
        return (
            nats(found[0]["kl"]) if tasks == ("text",) else str(round(sum(r["right"] * r["documents"] for r in found)))
        )

    return line({policy: (fmean(row["kept"] for row in found), shown(found)) for policy, found in rows.items()})


def quickstart(file: str, run: str, shown: str) -> list[str]:
    rows = read(file)["runs"][run]["decode"]
    tell = {"correct": str, "kl": nats}[shown]
    return line({row["policy"]: (row["kv_share"], tell(row[shown])) for row in rows})


def corrected() -> list[str]:
    asked = (32768, "text", "recipe + 8 by previous")
    rows = read("ablations-gemma-again-h200")["rows"]
    (row,) = (row for row in rows if (row["tokens"], row["task"], row["policy"]) == asked)
    return [f"{row['kept']:.0%}", "0", nats(row["kl"]), "", "", ""]


def pocket() -> list[str]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read("pocket-table")["rows"]:
        if row["pocket"] == "pocket" and row["task"] == "all":
            rows.setdefault(row["policy"], []).append(row)
    return line({
        policy: (fmean(row["kept"] for row in found), f"{fmean(row['score'] for row in found):.1%}")
        for policy, found in rows.items()
    })  # fmt: skip


def table() -> Iterator[list[str]]:
    """The share kept and what each policy reaches, as README has it."""
    for text in README.split("\n## Results\n")[1].split("\n## ")[0].splitlines():
        if text.startswith("| ") and "KV cache kept" not in text:
            _, kept, _, *policies = (cell.strip(" *").replace(" %", "%") for cell in text.strip("|").split("|"))
            yield [kept, *policies[:5]]


def test_the_tables_numbers_are_those_of_the_raw_figures():
    assert list(table()) == [
        quickstart("quickstart-cpu", "quickstart", "correct"),
        quickstart("quickstart-cpu", "quickstart-again", "correct"),
        quickstart("quickstart-cpu", "quickstart-again", "kl"),
        quickstart("quickstart-avx2", "quickstart-fresh", "correct"),
        quickstart("quickstart-avx2", "quickstart-fresh", "kl"),
        ablated("ablations-smollm2-cpu", 0, *NEEDLES),
        ablated("ablations-smollm2-cpu", 0, "text"),
        ablated("ablations-smollm2-h200", 0, *NEEDLES),
        ablated("ablations-smollm2-h200", 0, "text"),
        ablated("needles-gemma-h200", 32768, "single"),
        ablated("needles-gemma-h200", 32768, "multi_key"),
        ablated("ablations-gemma-again-h200", 32768, "text"),
        corrected(),
        pocket(),
    ]


def test_the_walk_with_own_texts_says_how_much_text_it_needs():
    assert f"at least {PARTS * SHORTEST * CHARACTERS:,} characters" in README
