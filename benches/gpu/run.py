"""Benchmarks on a GPU, beside their rivals in the same run: prints a table, keeps all figures as JSON.

    python benches/gpu/run.py --gpu-bench target/release/gpu_bench [store] [pinned] [hand-off] [train]

It needs robocache, torch with CUDA, numpy, and `cargo build --release -p robocache-benches`. The dataset
(2,000 episodes, 1 GB) is made anew in --scratch. benches/README.md says what each figure means.
`--device cpu train` tries the program where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from bench import Bench, Json
from delivery import hand_off, pinned, store
from training import train

#: What was expected before the first run, from figures of single parts; kept beside what was found.
PREDICTIONS = {
    "store": "the kernel alone takes 11.0 us a batch off the grid and 8.6 on it (2.9 and 3.7 M episodes/s), "
    "describing and enqueuing 32 sources 20 us of one thread: 1.3 to 1.6 M; Python's next() some 15 us a "
    "batch: the same",
    "pinned": "two bursts always under way, of which one is being copied, in pieces of 500 KiB that by "
    "themselves reach 98 %: 95 %",
    "hand-off": "spinning: lease 0.3 us, wait for the event 1.6, synchronise 3: 5 us; asleep: a futex wake "
    "more, 10 to 15",
    "train": "eager: 10.1 ms a step and some 60 us of Python for a batch: 0.6 %; graph: 3 us of copying in "
    "2.45 ms and nothing from bursts of 16: 0.3 %; torch's DataLoader some 3,000 episodes/s",
}


def machine() -> Json:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = [", , "]
    gpu, driver, memory = (part.strip() for part in lines[0].split(","))
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "gpu": gpu or None,
        "driver": driver or None,
        "gpu_memory": memory or None,
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


SECTIONS: dict[str, Callable[[Bench], Json]] = {
    "store": store,
    "pinned": pinned,
    "hand-off": hand_off,
    "train": train,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; absent: all")
    parser.add_argument(
        "--gpu-bench", type=Path, help="the program of benches/src/bin/gpu_bench, built for release"
    )
    parser.add_argument("--daemon", type=Path, help="robocached; absent: the one that robocache carries")
    parser.add_argument("--commit", default="unknown", help="of the tree that the programs were built from")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    parser.add_argument("--scratch", type=Path, help="where the dataset and sockets are made; absent: /tmp")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn of store and pinned")
    parser.add_argument("--batches", type=int, default=24_000, help="of hand-off")
    turns = {"type": int, "nargs": 2, "metavar": ("ROUNDS", "STEPS")}
    parser.add_argument("--eager", type=int, metavar="ROUNDS", default=600, help="of train, of one step each")
    parser.add_argument(
        "--graph", **turns, default=[12, 180], help="of train; steps in multiples of 30, a burst"
    )
    parser.add_argument("--rival-steps", type=int, default=20, help="of a turn of torch's DataLoader")
    parser.add_argument("--workers", type=int, nargs="*", default=[4, 8, 14], help="of torch's DataLoader")
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    args.sections = args.sections or list(SECTIONS)
    if args.gpu_bench is None and set(args.sections) - {"train"}:
        parser.error("store, pinned and hand-off need --gpu-bench")
    return args


def main() -> None:
    args, failed = arguments(), []
    made: Json = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit,
        "command": f"benches/gpu/run.py {' '.join(args.sections)}",
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "method": f"variants take turns, {args.rounds} of each after one that is not counted; medians. "
        f"{args.episodes} episodes of 500 x 256 float32 at 100 Hz; batches of 32 x 250 x 256 bfloat16 at "
        "50 Hz, 3.3 ms off the grid unless said otherwise; train says how many turns it took",
        "predictions": {name: PREDICTIONS[name] for name in args.sections},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="robocache-gpu-", dir=args.scratch) as folder:
        bench = Bench(args, Path(folder))
        for name in args.sections:
            print(f"{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                made[name] = SECTIONS[name](bench)
            except Exception as error:
                # The other sections are worth having all the same.
                traceback.print_exc()
                made[name] = {"failed": str(error)}
                failed.append(name)
            made[name]["took_s"] = time.perf_counter() - start
            made |= {"load_after": os.getloadavg()[0], "commands": bench.commands, "table": bench.rows}
            # After each section, so that what was measured is kept whatever comes after.
            kind = re.search(r"[HABL]\d+\w*", made["machine"]["gpu"] or "")
            gpu = kind[0].lower() if kind else args.device
            path = args.out / f"{made['date'][:10]}-{gpu}-{args.commit}.json"
            path.write_text(json.dumps(made, indent=1) + "\n")
    widths = [
        max(len(row[i]) for row in [*bench.rows, ("", "robocache", "beside", "wanted")]) for i in range(4)
    ]
    print()
    for row in [("", "robocache", "beside", "wanted"), *bench.rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        f"\n{made['machine']['gpu']}, driver {made['machine']['driver']}, commit {args.commit}; {path.name}"
    )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
