"""The measuring rules that every benchmark here follows.

Both sides run in one process in alternating order; what counts is the median of the pair ratios with its 10-90 % band; an
A/A control voids a run when its median leaves 0.90-1.11; memory is the growth of VmHWM in one fresh process a way. Two
threads, warm caches, garbage collected outside the timer. Eleven pairs, five where one side takes over 30 s.
"""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def timed(way: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    result = way()
    took = time.perf_counter() - started
    del result
    return took


def pairs(ours: Callable[[], object], other: Callable[[], object], count: int) -> dict[str, float]:
    """Seconds of both sides, and the ratio other / ours of ``count`` alternating pairs."""
    first, second = [], []
    for n in range(count):
        for way, times in ((ours, first), (other, second)) if n % 2 == 0 else ((other, second), (ours, first)):
            times.append(timed(way))
    return ratios(first, second)


def ratios(ours: list[float], other: list[float]) -> dict[str, float]:
    """As :func:`pairs`, of seconds that were measured in turn."""
    low, middle, high = np.percentile(np.array(other) / np.array(ours), (10, 50, 90))
    return {"seconds": float(np.median(other)), "ours": float(np.median(ours)), "ratio": float(middle), "low": float(low), "high": float(high), "pairs": len(ours)}


def high_water() -> int:
    """Bytes of memory this process has held at most."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def alone(script: str, *arguments: str) -> float:
    """The last word that ``python script arguments`` prints, as a number: how memory is measured in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def ratio_text(row: dict) -> str:
    return f"{row['ratio']:.1f} ({row['low']:.1f}-{row['high']:.1f})" if "ratio" in row else "1"


def heading(what: str, control: dict) -> str:
    """What was measured, on what, and whether the control allows the figures."""
    fit = "" if 0.9 <= control["ratio"] <= 1.11 else ": VOID"
    return (f"{what}, {platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}\n"
            f"A/A control: median {control['ratio']:.2f} (10-90 %: {control['low']:.2f}-{control['high']:.2f}){fit}")  # fmt: skip


def record(result: dict, path: Path | None) -> None:
    """The figures as JSON, on the terminal and in a file."""
    result = {"processors": os.cpu_count(), "load": os.getloadavg()[0], **result}
    print(json.dumps(result))
    if path:
        path.write_text(json.dumps(result, indent=1))
