"""What the benchmarks share: a clock, candidates that take turns, rows for JSON, goals that decide the exit code."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Work = Callable[[], object]


def milliseconds(work: Work, times: int = 1) -> float:
    """Of processor time, for which other jobs on the machine do not count; of the clock on a GPU. Mean of ``times``."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(times):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (clock() - start) / times


def in_turns(
    works: Mapping[str, Work], rounds: int, *, times: Mapping[str, int] | None = None, least_ms: float = 0
) -> dict[str, float]:
    """Median milliseconds of each; one more round to warm up.

    Args:
        works: by name, in the order of a round.
        rounds: that count.
        times: how often quick ones run within their turn.
        least_ms: or run again until so much time is over.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            elapsed = [milliseconds(work, (times or {}).get(name, 1))]
            while sum(elapsed) < least_ms:
                elapsed.append(milliseconds(work))
            if turn:
                found[name].append(statistics.fmean(elapsed))
    return {name: statistics.median(values) for name, values in found.items()}


def peak_megabytes() -> float:
    """Most memory of this program so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would still have the peak of the program that started this one
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Benchmark:
    """The command line of a benchmark, its rows and its goals.

    Args:
        script: ``__file__``; names the subject and ``results/SUBJECT.json``.
        doc: ``__doc__``.
        packages: whose versions go into each row.
        rounds: the usual number.
    """

    def __init__(self, script: str, doc: str | None, *, packages: Sequence[str], rounds: int) -> None:
        path = Path(script)
        self.subject, self.packages = path.stem, packages
        self.rows: list[dict[str, Any]] = []
        self.goals: list[tuple[str, float, float, bool]] = []
        self.parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
        add = self.parser.add_argument
        add("--rounds", type=int, default=rounds, help="the median of so many is reported")
        add("--no-check", action="store_true", help="report only; otherwise a missed goal is exit code 1")
        add("--out", type=Path, default=path.parent / "results" / f"{path.stem}.json")

    def start(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Read the command line, keep to one thread, print the head of the table."""
        self.options = self.parser.parse_args(arguments)
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        self.versions = {"python": platform.python_version()} | {
            name: version(name) for name in self.packages
        }
        print(f"{'case':44} {'peer':>12} {'ours ms':>10} {'peer ms':>10} {'ratio':>9} {'difference':>10}")
        return self.options

    def row(
        self, case: str, ours: float, peer: str, theirs: float, difference: float | None = None, **more: Any
    ) -> float:
        """Keep and print a comparison; gives how many times longer the peer takes."""
        self.rows.append({
            "subject": self.subject, "case": case, "ours_ms": round(ours, 4), "peer": peer, "peer_ms": round(theirs, 4),
            "ratio": round(theirs / ours, 3), "max_abs_diff": difference, "peak_mb": round(peak_megabytes(), 1),
            "threads": 1, "load": round(os.getloadavg()[0], 2), "device": DEVICE.type, "versions": self.versions,
            **more,
        })  # fmt: skip
        shown = "–" if difference is None else f"{difference:.0e}"
        print(
            f"{case:44} {peer:>12} {ours:>10.3f} {theirs:>10.3f} {theirs / ours:>8.2f}x {shown:>10}",
            flush=True,
        )
        return theirs / ours

    def note(self, case: str, **values: Any) -> None:
        """Keep numbers that are no comparison."""
        self.rows.append({"subject": self.subject, "case": case, **values})

    def at_least(self, name: str, reached: float, wanted: float) -> None:
        """A goal."""
        self.goals.append((name, reached, wanted, True))

    def at_most(self, name: str, reached: float, wanted: float) -> None:
        """Likewise."""
        self.goals.append((name, reached, wanted, False))

    def finish(self) -> int:
        """Write the rows, say which goals are reached, and give the exit code."""
        self.options.out.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        missed = 0
        for name, reached, wanted, at_least in self.goals:
            met = reached >= wanted if at_least else reached <= wanted
            missed += not met
            sign = ">=" if at_least else "<="
            print(f"{'reached' if met else 'MISSED':8} {name}: {reached:.4g}, wanted {sign} {wanted:g}")
        return 1 if missed and not self.options.no_check else 0
