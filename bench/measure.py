"""What the benches share: medians with bootstrap intervals, the machine in words, rows of docs/benchmarks.md."""

from __future__ import annotations

import platform
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
RESAMPLES = 5000


@dataclass(frozen=True)
class Ratio:
    """A median ratio with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    num_pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.num_pairs} blocks a side)"


def ratio_of(ours: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Ratio:
    """The median of ours ÷ others over pairs of neighbouring blocks. Raises ValueError for unequal lengths."""
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def machine() -> str:
    """The machine in a few words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))):
        model = found.group(1)
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {model}, {memory:.0f} GiB, Python {platform.python_version()}"


def report(name: str, rows: Sequence[tuple[str, str, str]], *, write: bool) -> None:
    """Print rows (what, target, measured); with `write` put them in their place in docs/benchmarks.md too."""
    header = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}."
    table = ["| What | Target | Measured |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    body = "\n".join([header, "", *table])
    print(body, flush=True)
    if not write:
        return
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    text = PAGE.read_text(encoding="utf-8")
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not place.search(text):
        raise ValueError(f"no place for {name} in {PAGE}")
    PAGE.write_text(place.sub(lambda _: f"{begin}\n{body}\n{end}", text), encoding="utf-8")
