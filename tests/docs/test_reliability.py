"""docs/reliability.md: the figures of the fuzz run are those of its file, and every test that it names is there."""

import json
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_the_figures_are_those_of_the_fuzz_runs_file():
    found = json.loads((ROOT / "tests" / "fuzz" / "results.json").read_text())
    became = sum(map(Counter, found["counts"].values()), Counter())
    command = f"python -m tests.fuzz --seconds {found['seconds']:g} --seed {found['seed']}"
    sentence = (
        f"`tests/fuzz/results.json` holds the counts of `{command}` at commit {found['made']['commit']}: "
        f"of {found['cases']:,} cases, {became['refused']:,} were refused, {became['honoured']:,} done as they say, "
        f"{became['unchanged']:,} changed nothing, and {len(found['faults']):,} were faults."
    )
    assert sentence in " ".join(PAGE.split())
    assert {"device", "cores", "torch"} <= found["made"].keys()
    assert found["cases"] == became.total() and found["made"]["command"].startswith(command)


def test_every_test_that_it_names_is_there():
    named, path = 0, None
    for file, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", PAGE):
        path = ROOT / file if file else path
        if file or test:
            assert path is not None and path.is_file(), file
            assert not test or f"def {test}(" in path.read_text(), f"{path}: {test}"
            named += 1
    assert named > 40
