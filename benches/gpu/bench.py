"""What the sections share: daemons, the dataset, loaders, the Rust client, and variants that take turns."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from step import BATCH, DIM, STEPS

import robocache as rc
from daemon import Daemon
from robocache._daemon import carried

Json = dict[str, Any]
KEY = "observation.tactile"
#: Seconds from the anchor to the first target. Off the grid every target lies between two rows, and a batch
#: reads each of an episode's 500 rows exactly once; on it, it reads every second row.
OFF_GRID, ON_GRID = 0.0033, 0.0
ROW_BYTES, ROWS = 4 * DIM, 500


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.program = str(args.daemon or carried())
        self.rows: list[tuple[str, str, str, str]] = []
        self.commands: dict[str, str] = {}
        self._daemons = 0

    def daemon(self, *flags: str) -> Daemon:
        self._daemons += 1
        return Daemon(self.program, self.folder / f"daemon-{self._daemons}", *flags)

    def rust(self, name: str, *arguments: str, socket: str = "") -> Json:
        self.commands[name] = " ".join(["gpu_bench", *arguments]).replace(str(self.folder), "SCRATCH")
        command = [str(self.args.gpu_bench), *arguments]
        environment = os.environ | ({"ROBOCACHE_SOCKET": socket} if socket else {})
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=300
        )
        if done.returncode != 0:
            said = done.stderr[-4000:]
            raise RuntimeError(f"{self.commands[name]} failed ({done.returncode}):\n{said}")
        return json.loads(done.stdout.splitlines()[-1])

    def dataset(self) -> str:
        path = self.folder / "episodes"
        if not path.exists():
            shape = [
                "--frames",
                str(ROWS),
                "--fps",
                "100",
                "--tactile-dim",
                str(DIM),
                "--episodes",
                str(self.args.episodes),
            ]
            command = [self.program, "synth", str(path), *shape, "--codec", "none"]
            self.commands["synth"] = " ".join(["robocached", "synth", "SCRATCH/episodes", *command[3:]])
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return str(path)

    def loader(self, daemon: Daemon, start: float, **arguments: Any) -> rc.DataLoader:
        window = rc.Window(hz=50, steps=STEPS, start=start)
        return rc.DataLoader(
            self.dataset(),
            batch_size=BATCH,
            windows={KEY: window},
            anchors="episodes",
            device=self.args.device,
            dtype="bfloat16",
            framework="torch",
            drop_last=True,
            socket=daemon.socket,
            **arguments,
        )

    def row(self, what: str, ours: str, beside: str = "", wanted: str = "") -> None:
        self.rows.append((what, ours, beside, wanted))

    def rounds(self, variants: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Each in turn, and again: A B A B. The first turn is not counted."""
        found: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(self.args.rounds + 1):
            for name, measure in variants.items():
                figure = measure()
                if turn:
                    found[name].append(figure)
        return found


def endless(loader: rc.DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def figures(values: list[float]) -> Json:
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def gpu_work(daemon: Daemon, before: Json, seconds: float) -> Json:
    """What the daemon did on its GPU since `before`, a batch."""
    after = daemon.gpu()
    batches = max(after["batches"] - before["batches"], 1)

    def hits(of: Json) -> dict[str, int]:
        return {
            "gpu_cache": of["gpu_cache"]["hits"],
            "pinned_cache": of["pinned_cache"]["hits"],
            "passing": of["passing"],
        }

    reads = {name: count - hits(before)[name] for name, count in hits(after).items()}
    return {
        "batches": batches,
        "bursts": after["bursts"] - before["bursts"],
        "kernel_us_a_batch": (after["kernel_s"] - before["kernel_s"]) * 1e6 / batches,
        "burst_us_a_batch": (after["burst_s"] - before["burst_s"]) * 1e6 / batches,
        "enqueue_us_a_batch": (after["enqueue_s"] - before["enqueue_s"]) * 1e6 / batches,
        "streams_read_from": reads,
        "uploaded_bytes": after["uploaded_bytes"] - before["uploaded_bytes"],
        "upload_s": after["upload_s"] - before["upload_s"],
        "gpu_cache_used": after["gpu_cache"]["used"],
        "seconds": seconds,
    }
