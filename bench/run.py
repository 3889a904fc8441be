"""`make bench`: every bench in turn, written into docs/benchmarks.md; half an hour or so on two idle cores.

python bench/run.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHES = (
    "light",
    "submit",
    "store",
    "worst_messages",
    "scale",
    "start",
    "answer",
    "explain",
    "exports",
    "choosing",
    "reading",
    "loader",
    "planner",
    "trainer",
)


def main(names: list[str]) -> int:
    """Run the benches of these names (none: all); how many missed a target or failed."""
    missed = 0
    for name in names or BENCHES:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, HERE / f"{name}.py", "--write"], cwd=HERE.parent, check=False)
        if done.returncode:
            print(f"== {name} missed a target or failed (exit code {done.returncode})", flush=True)
        missed += done.returncode != 0
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
