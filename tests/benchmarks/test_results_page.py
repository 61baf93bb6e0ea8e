"""docs/results.md is what its command makes of the raw figures, all of them."""

from benchmarks import results_page, results_tables


def test_the_page_is_made_of_the_files_there_are():
    assert results_page.PAGE.read_text() == results_page.page(), "run python -m benchmarks.results_page"
    shown = {section.file for section in results_page.SECTIONS}
    assert shown == {path.name for path in results_page.RESULTS.glob("*.json")}


def test_every_part_of_a_file_says_how_it_was_made():
    def part(name, commit):
        return {"origin": {"command": f"python -m benchmarks.x {name}", "commit": commit, "device": "a", "cores": 2}}

    told = results_page.made({"one": part("one", "1234567"), "two": part("two", "89abcde")})
    assert told.split("\n\n") == [
        "`python -m benchmarks.x one`; commit 1234567; a, 2 cores.",
        "`python -m benchmarks.x two`; commit 89abcde; a, 2 cores.",
    ]


def test_the_page_of_scale_has_a_table_of_each_part():
    timed, of = {"documents": 7, "seconds": 1.5}, {"documents": 7, "tokens": 90}
    numbers = {"query_tokens": 5, "terabytes": 0.5, "hours_copying": 2.5, "hours_reading": 3.5}
    found = {
        "plan 7 x 10-20": timed | of | {"source_mib": 3.25, "plan_mib": 1.25, "gib_before": 1, "peak_gib": 2},
        "open": {"golden chunks": timed | {"seconds_listing": 0.25, "gib": 0.75}},
        "epoch ext4": {"sampled": timed | {"file_system": "ext4", "mib": 8.5, "read_mib": 9.5, "ratio": 1.125}},
        "workers": [{"workers": 4, "documents_a_second": 6.5, "of_the_model_alone": 0.625}],
        "estimate": [numbers | of | {"model": "computed"}],
        "estimate mine": [numbers | of | {"model": "traced", "tokens_a_second": 11.5, "hours_tracing": 12.5}],
    }
    parts = results_tables.scale({name: {"found": part} for name, part in found.items()})
    rows = [[part.count("|\n") + 1, part.splitlines()[-1]] for part in parts]
    assert [count - 2 for count, _ in rows] == [1, 1, 1, 1, 2], parts
    for (_, row), shown in zip(rows, ["3.25", "golden chunks", "sampled", "0.625", "traced"], strict=True):
        assert shown in row and "None" not in row
