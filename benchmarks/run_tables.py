"""Keep what finished runs answered: the rows of `decode` in their results.json, with day, commit and this machine.

    python -m benchmarks.run_tables runs/quickstart runs/quickstart-again --output FILE.json

Run it on the machine that made the runs.
"""

import argparse
import json
from pathlib import Path

from benchmarks.machine import origin
from eval.report.tables import RESULTS, read_results


def main() -> None:
    """Collect the runs in one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that `lookahead run` or `decode` wrote")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    runs = {}
    for folder in options.runs:
        found = read_results(folder).model_dump(mode="json", exclude_none=True)
        if "decode" not in found:
            parser.error(f"{folder / RESULTS}: nothing was decoded; run `lookahead decode`")
        runs[folder.name] = {"measured": found["measured"]["decode"], "decode": found["decode"]}
    options.output.write_text(json.dumps({"origin": origin(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
