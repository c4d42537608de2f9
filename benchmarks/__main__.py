"""``python -m benchmarks [--quick] [CASE ...]``: run cases and show how far they are from their limit."""

from __future__ import annotations

import argparse

from benchmarks.harness import case_names, run_case


def main() -> int:
    """Run the cases named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(case_names())}; none runs all")
    parser.add_argument("--quick", action="store_true", help="small sizes; recorded in build/bench only")
    parser.add_argument("--rounds", type=int, default=0, help="repeats after the warm-up, at least 5")
    chosen = parser.parse_args()
    unknown = {name.upper() for name in chosen.cases} - set(case_names())
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case_names())}")
    failed = [
        name
        for name in [name.upper() for name in chosen.cases] or case_names()
        if not run_case(name, quick=chosen.quick, rounds=max(5, chosen.rounds))
    ]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
