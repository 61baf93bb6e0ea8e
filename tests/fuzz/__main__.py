"""`python -m tests.fuzz --seconds N [--seed S]` exits with 1 where it finds faults; `--case` repeats one."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.machine import origin
from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import Results, fuzz, try_case
from tests.fuzz.world import build


def main() -> None:
    """Build what is changed, fuzz it, say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=KINDS, help="these alone")
    parser.add_argument("--case", help="KIND/NUMBER of a fault: try it alone, both ways")
    parser.add_argument("--out", type=Path, help="write counts and faults here, as JSON")
    options = parser.parse_args()
    kind, _, number = (options.case or "").partition("/")
    if options.case and (kind not in KINDS or not number.isdecimal()):
        parser.error(f"--case {options.case}: give KIND/NUMBER with one of the kinds {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as folder:
        world = build(Path(folder))
        if options.case:
            results = Results()
            try_case(world, options.seed, kind, int(number), results, apart=True)
        else:
            results = fuzz(world, options.seed, options.seconds, options.kind or KINDS)
    total = sum(sum(counts.values()) for counts in results.counts.values())
    made = origin() | {"command": " ".join(["python -m tests.fuzz", *sys.argv[1:]])}
    told = {"made": made, "seed": options.seed, "seconds": options.seconds, "cases": total,
            "counts": {kind: dict(sorted(counts.items())) for kind, counts in sorted(results.counts.items())},
            "faults": results.faults}  # fmt: skip
    print(json.dumps(told, indent=1))
    if options.out:
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(1 if results.faults else 0)


if __name__ == "__main__":
    main()
