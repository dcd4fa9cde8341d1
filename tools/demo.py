"""Runs a daemon and two trainers on it, one in Python and one in Rust, and prints what each got.

Called by tools/demo.sh and tools/examples.sh, which build what it runs. However it ends (Ctrl-C, SIGTERM, an
error), the processes it started have ended too. Exit code 1 if any of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: How long a daemon may take to start or to stop.
PATIENCE_S = 30.0


def status(robocached: Path) -> dict[str, Any] | None:
    """What the daemon says of itself; None while none answers."""
    asked = subprocess.run([robocached, "status", "--json"], capture_output=True, text=True, check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else None


@contextmanager
def daemon(robocached: Path, log: Path) -> Iterator[None]:
    """A daemon on $ROBOCACHE_SOCKET, stopped on leaving."""
    with log.open("w") as out:
        process = subprocess.Popen([robocached, "serve"], stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while status(robocached) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"demo: the daemon did not start; its log, {log}:\n{log.read_text()}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code != 0:
        sys.exit(f"demo: the daemon ended with code {code}; its log, {log}:\n{log.read_text()}")
    print("\nThe daemon was stopped and left nothing behind.")


class Trainer:
    """One trainer process: its lines are printed under its name; the last one, JSON, is kept."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.total: dict[str, Any] = {}
        self.ready: list[int] = []
        self.slots = 0
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.started = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "batches of 64" in line:
                self.started.set()
            if line.startswith("{"):
                self.total = json.loads(line)
            else:
                print(f"{self.name:>6} | {line}", end="", flush=True)

    def wait_started(self) -> None:
        """Until it has its first batch, or ended."""
        while not self.started.wait(0.1) and self.process.poll() is None:
            pass

    def finish(self) -> None:
        self._thread.join()
        code = self.process.wait()
        if code != 0 or not self.total:
            sys.exit(f"demo: the {self.name} trainer ended with code {code}; what it said is above")


def watch(robocached: Path, trainers: list[Trainer]) -> dict[str, Any]:
    """Looks at the rings five times a second until a trainer ends; returns the daemon's last status."""
    last: dict[str, Any] = {}
    while all(trainer.process.poll() is None for trainer in trainers):
        seen = status(robocached)
        by_pid = {trainer.process.pid: trainer for trainer in trainers}
        for loader in (seen or {}).get("loaders", []):
            trainer = by_pid.get(loader["pid"])
            # Before the first batch was made there is nothing to see.
            if trainer is not None and loader["batch_size"] > 1 and loader["counts"]["batches"] > 0:
                trainer.ready.append(loader["slots"]["ready"])
                trainer.slots = loader["slots"]["total"]
        last = seen or last
        time.sleep(0.2)
    return last


def table(trainers: list[Trainer], last: dict[str, Any]) -> str:
    lines = [
        f"{'trainer':20} {'samples/s':>10} {'MB/s':>8} {'waited for a batch':>20} {'slots ready (mean)':>20}"
    ]
    for trainer in trainers:
        total = trainer.total
        seconds = total["seconds"]
        name = f"{trainer.name} ({total['framework']})" if "framework" in total else trainer.name
        ready = (
            f"{sum(trainer.ready) / len(trainer.ready):.1f} of {trainer.slots}"
            if trainer.ready
            else "not seen"
        )
        lines.append(
            f"{name:20} {total['samples'] / seconds:10,.0f} {total['bytes'] / seconds / 1e6:8,.0f} "
            f"{total['waited_s'] / seconds:19.1%} {ready:>21}"
        )
    store = last["store"]
    asked = store["hits"] + store["misses"]
    lines += [
        "",
        f"Daemon: decoded {store['bytes_decoded'] / 1e6:,.1f} MB from files once, for both trainers, in "
        f"{store['read_s']:.2f} s; {store['hits']:,} of {asked:,} look-ups were in memory.",
        *(gpu_line(gpu) for gpu in last.get("gpus", [])),
        "Waited: share of a trainer's time spent in next(). Slots ready: batches made ahead of it.",
    ]
    return "\n".join(lines)


def gpu_line(gpu: dict[str, Any]) -> str:
    """What one GPU did for the trainers."""
    each_us = gpu["kernel_s"] / max(gpu["batches"], 1) * 1e6
    return (
        f"{gpu['name']}: {gpu['gpu_cache']['used'] / 1e6:,.1f} MB of episodes in its memory; "
        f"{gpu['batches']:,} batches made there in {gpu['bursts']:,} bursts, {each_us:.0f} us each."
    )


def run(dataset: str, binaries: Path, seconds: float) -> None:
    robocached = binaries / "robocached"
    with tempfile.TemporaryDirectory(prefix="robocache-demo-") as scratch:
        # The two trainers and the daemon share the cores: no pool of BLAS threads on top.
        for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(pool, "1")
        os.environ["ROBOCACHE_SOCKET"] = f"{scratch}/robocached.sock"
        trainers: list[Trainer] = []
        with daemon(robocached, Path(scratch) / "daemon.log"):
            print(f"\nA daemon runs. Two trainers use it for {seconds:g} s, side by side, on {dataset}:\n")
            python = [sys.executable, "-u", str(EXAMPLES / "train.py"), dataset, "--seconds", str(seconds)]
            try:
                trainers.append(Trainer("python", python))
                trainers[0].wait_started()  # importing torch takes a while; then both start at once
                trainers.append(Trainer("rust", [str(binaries / "train"), dataset, str(seconds)]))
                last = watch(robocached, trainers)
                for trainer in trainers:
                    trainer.finish()
            finally:
                for trainer in trainers:
                    if trainer.process.poll() is None:
                        trainer.process.terminate()
                        trainer.process.wait()
            print(f"\n{table(trainers, last)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--bin", type=Path, required=True, help="directory of robocached and train")
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(args.dataset, args.bin, args.seconds)
    except KeyboardInterrupt:
        sys.exit("\ndemo: stopped; the daemon and the trainers have ended")


if __name__ == "__main__":
    main()
