"""Runs the benchmarks beside their rivals, keeps the figures as JSON and prints them as a table.

    python benches/run.py --bin target/release [ready] [lerobot] [resample] [decode] [deaths]

Called by tools/bench.sh, which builds what this runs. It needs tools/requirements.txt and robocache.
Datasets are made once, in .cache/bench. benches/README.md says what each figure means and what to expect.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = ROOT / ".cache" / "bench"
Json = dict[str, Any]
#: One line of the table: what was measured, ours, beside what, and the ratio that is wanted.
Row = tuple[str, str, str, str]


class Bench:
    """What every section needs: programs, a daemon, datasets, and a place for results."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        self.rows: list[Row] = []
        self.commands: dict[str, str] = {}

    def json(self, name: str, *command: str | Path) -> Json:
        """Runs a program that prints one JSON object."""
        words = [str(word) for word in command]
        self.commands[name] = portable(" ".join(words), self.binaries)
        print(f"  {name}", file=sys.stderr, flush=True)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"bench: {self.commands[name]} failed ({done.returncode}):\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def rust(self, name: str, *arguments: str | Path) -> Json:
        return self.json(name, self.binaries / "loader_bench", *arguments)

    def python(self, name: str, script: str, *arguments: str | Path) -> Json:
        return self.json(name, sys.executable, HERE / script, *arguments)

    def status(self) -> Json:
        asked = [self.binaries / "robocached", "status", "--json"]
        return json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)

    @contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        """A fresh daemon on $ROBOCACHE_SOCKET."""
        with tempfile.TemporaryDirectory(prefix="robocache-bench-") as scratch:
            os.environ["ROBOCACHE_SOCKET"] = f"{scratch}/robocached.sock"
            log = Path(scratch) / "log"
            with log.open("w") as out:
                serve = [self.binaries / "robocached", "serve", "--memory", "2GiB"]
                process = subprocess.Popen(serve, stderr=out)
            try:
                limit = time.monotonic() + 30
                asked = [self.binaries / "robocached", "status", "--json"]
                while subprocess.run(asked, capture_output=True, check=False).returncode != 0:
                    if process.poll() is not None or time.monotonic() > limit:
                        sys.exit(f"bench: the daemon did not start:\n{log.read_text()}")
                    time.sleep(0.01)
                yield process
            finally:
                process.terminate()
                process.wait(30)

    def dataset(self, name: str, make: Callable[[Path], None]) -> Path:
        """Made once: under another name first, so that what is there is whole."""
        path, part = DATA / name, DATA / f"{name}.part"
        if not path.exists():
            print(f"  making {path.relative_to(ROOT)}", file=sys.stderr, flush=True)
            subprocess.run(["rm", "-rf", part], check=True)
            DATA.mkdir(parents=True, exist_ok=True)
            make(part)
            part.rename(path)
        return path

    def synth(self, name: str, *arguments: str) -> Path:
        def make(path: Path) -> None:
            command = [self.binaries / "robocached", "synth", path, *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        return self.dataset(name, make)

    def lerobot(self) -> Path:
        def make(path: Path) -> None:
            script = [sys.executable, HERE / "baselines" / "lerobot_dataset.py", path]
            subprocess.run(script, check=True, capture_output=True)

        return self.dataset("lerobot", make)

    def row(self, what: str, ours: str, beside: str = "", wanted: str = "") -> None:
        self.rows.append((what, ours, beside, wanted))


def portable(command: str, binaries: Path) -> str:
    """A command as one would type it in the root of any checkout."""
    for place, said in ((sys.executable, "python"), (str(binaries), "target/release"), (f"{ROOT}/", "")):
        command = command.replace(place, said)
    return command


def ready(bench: Bench) -> Json:
    """A ready batch, and attaching to a running daemon."""
    data = bench.lerobot()
    with bench.daemon():
        out = {
            "rust": bench.rust("ready_rust", "ready", data),
            "python": bench.python("ready_python", "python_client.py", "ready", data),
            "attach_rust": bench.rust("attach_rust", "attach", data, "--reps", "20"),
            "attach_python": bench.python(
                "attach_python", "python_client.py", "attach", data, "--reps", "20"
            ),
        }
    for name, goal in (("rust", "p50 <= 5 us"), ("python", "p50 <= 30 us")):
        for key in ("next_ns", "next_and_drop_ns"):
            figures = out[name][key]
            text = f"p50 {figures['median'] / 1e3:.2f} us, p99 {figures['p99'] / 1e3:.2f} us"
            bench.row(f"ready batch, {name}: {key.removesuffix('_ns').replace('_', ' ')}", text, "", goal)
    for name in ("rust", "python"):
        ms = out[f"attach_{name}"]["attach_to_first_batch_ms"]
        bench.row(
            f"attach to first batch, {name}", f"{ms['median']:.1f} ms (max {ms['max']:.1f})", "", "<= 100 ms"
        )
    return out


def lerobot(bench: Bench) -> Json:
    """LeRobot's own kind of batch, beside a NumPy gather and LeRobot."""
    data = bench.lerobot()
    with bench.daemon() as process:
        out = {
            "numpy": bench.python("gather_numpy", "baselines/numpy_gather.py", data),
            "python": bench.python("gather_python", "python_client.py", "throughput", data),
            "python_touch": bench.python(
                "gather_python_touch", "python_client.py", "throughput", data, "--touch"
            ),
            "rust": bench.rust("gather_rust", "throughput", data),
            "second": second_trainer(bench, data, process.pid),
        }
    out["numpy_again"] = bench.python("gather_numpy_again", "baselines/numpy_gather.py", data)
    for workers in (0, 2):
        name = f"lerobot_{workers}"
        out[name] = bench.python(name, "baselines/lerobot_loader.py", data, "--workers", str(workers))
    rate = {name: figures["samples_per_s"]["median"] for name, figures in out.items() if name != "second"}
    beside = max(rate["numpy"], rate["numpy_again"])
    for name, what in (
        ("rust", "Rust"),
        ("python", "Python, next()"),
        ("python_touch", "Python, every column a tensor"),
    ):
        ours = f"{rate[name]:,.0f} samples/s"
        bench.row(
            f"LeRobot batches: {what}",
            ours,
            f"{rate[name] / beside:.2f} x NumPy gather ({beside:,.0f})",
            ">= 1.2 x",
        )
    for workers in (0, 2):
        theirs = rate[f"lerobot_{workers}"]
        text = f"{rate['python_touch'] / theirs:,.0f} x LeRobot 0.4.4, {workers} workers ({theirs:,.0f})"
        bench.row("", "", text)
    second = out["second"]
    text = f"{second['decoded_bytes']:,} bytes decoded, {second['added_mb']:.1f} MB more"
    bench.row("second trainer on the same daemon", text, "", "0 bytes, < 50 MB")
    return out


def second_trainer(bench: Bench, data: Path, pid: int) -> Json:
    """What a second trainer costs while a first one runs: decoding, memory of daemon and client together."""

    def rss() -> int:
        text = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]

    script = [
        sys.executable,
        HERE / "python_client.py",
        "throughput",
        data,
        "--framework",
        "numpy",
        "--reps",
        "1",
    ]
    with subprocess.Popen([*map(str, script), "--seconds", "8"], stdout=subprocess.DEVNULL) as first:
        while not any(one["counts"]["batches"] > 500 for one in bench.status()["loaders"]):
            if first.poll() is not None:
                sys.exit("bench: the first trainer ended before the second began")
            time.sleep(0.1)
        before, decoded = rss(), bench.status()["store"]["bytes_decoded"]
        other = subprocess.Popen([*map(str, script), "--seconds", "1"], stdout=subprocess.PIPE, text=True)
        most = before
        while other.poll() is None:
            most = max(most, rss())
            time.sleep(0.05)
        assert other.stdout is not None
        added = json.loads(other.stdout.read())["added_bytes"]
        decoded = bench.status()["store"]["bytes_decoded"] - decoded
        first.terminate()
    both = (most - before + added) / 1e6
    return {
        "decoded_bytes": decoded,
        "daemon_mb": (most - before) / 1e6,
        "client_mb": added / 1e6,
        "added_mb": both,
    }


def resample(bench: Bench) -> Json:
    """The original's shape, from the cached store."""
    data = bench.synth(
        "resample",
        "--episodes",
        "128",
        "--frames",
        "500",
        "--fps",
        "100",
        "--tactile-dim",
        "256",
        "--codec",
        "none",
    )
    step, row = 250 * 256 * 4, 256 * 4
    #: Bytes read and written for one episode: on the grid every second row is read, off it all but the last.
    touched = {"resample": 250 * row + step, "resample-off-grid": 500 * row + step}
    out: Json = {"memcpy": bench.rust("memcpy", "memcpy", "--threads", str(os.cpu_count()))}
    with bench.daemon():
        for workload, start in (("resample", "0"), ("resample-off-grid", "0.0033")):
            out[workload] = bench.rust(workload, "throughput", data, "--workload", workload)
            name = f"{workload}-numpy"
            out[name] = bench.python(name, "baselines/numpy_resample.py", "--start", start)
    out["memcpy_again"] = bench.rust("memcpy_again", "memcpy", "--threads", str(os.cpu_count()))
    memcpy = max(out[name]["gb_per_s"]["median"] for name in ("memcpy", "memcpy_again"))
    for workload, touches in touched.items():
        rate = out[workload]["samples_per_s"]["median"]
        theirs = out[f"{workload}-numpy"]["samples_per_s"]["median"]
        gb_per_s = rate * touches / 1e9
        out[workload] |= {"gb_per_s": gb_per_s, "of_memcpy": gb_per_s / memcpy}
        ours = f"{rate:,.0f} episodes/s, {gb_per_s:.2f} GB/s"
        bench.row(
            workload.replace("-", " "),
            ours,
            f"{gb_per_s / memcpy:.0%} of memcpy ({memcpy:.1f} GB/s)",
            ">= 60 %",
        )
        bench.row("", "", f"{rate / theirs:.2f} x one process of NumPy ({theirs:,.0f})", "> 1 x")
    return out


def decode(bench: Bench) -> Json:
    """Every file of a dataset into memory, beside pyarrow."""
    out: Json = {}
    wide = ("--episodes", "100", "--frames", "500", "--tactile-dim", "256")
    kinds = [
        ("snappy", "fixed"),
        ("snappy", "variable"),
        ("zstd", "fixed"),
        ("none", "fixed"),
        ("lz4", "variable"),
    ]
    for codec, list_kind in kinds:
        data = bench.synth(f"decode-{codec}-{list_kind}", *wide, "--codec", codec, "--list", list_kind)
        for threads in ("1", "2"):
            name = f"decode_{codec}_{list_kind}_{threads}"
            theirs = bench.python(f"{name}_pyarrow", "baselines/pyarrow_read.py", data, "--threads", threads)
            ours = bench.json(name, bench.binaries / "decode_bench", data, "--threads", threads)
            ratio = theirs["read_ms"]["median"] / ours["read_ms"]["median"]
            out[name] = {"ours": ours, "pyarrow": theirs, "ratio": ratio}
            mb_per_s = ours["bytes"] / 1e3 / ours["read_ms"]["median"]
            text = f"{ratio:.2f} x pyarrow ({theirs['read_ms']['median']:.0f} ms)"
            rate = f"{ours['read_ms']['median']:.0f} ms, {mb_per_s:,.0f} MB/s"
            bench.row(f"decode {codec}, {list_kind} lists, threads: {threads}", rate, text, ">= 0.8 x")
    return out


def deaths(bench: Bench) -> Json:
    """How soon a killed client's ring is gone, and a killed daemon's clients know it."""
    out = bench.python("deaths", "deaths.py", bench.binaries / "robocached", bench.lerobot())
    for who, wanted in (("client", "<= 100 ms"), ("daemon", "<= 1,000 ms")):
        ms = out[f"{who}_ms"]
        what = "its slots are free" if who == "client" else "a client raises an error"
        bench.row(
            f"kill -9 of a {who}: {what}", f"median {ms['median']:.1f} ms, max {ms['max']:.1f}", "", wanted
        )
    return out


def machine() -> Json:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + (
        "-dirty" if git("status", "--porcelain") else ""
    )


SECTIONS = {"ready": ready, "lerobot": lerobot, "resample": resample, "decode": decode, "deaths": deaths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; absent: all")
    parser.add_argument(
        "--bin", type=Path, required=True, help="directory of robocached and the benchmark programs"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    bench, load = Bench(args.bin.resolve()), os.getloadavg()[0]
    if load > 0.5:
        print(f"bench: the machine is not idle (load {load:.1f}); the figures will show it", file=sys.stderr)
    made: Json = {
        "commit": commit(),
        "machine": machine(),
        "load_before": load,
        "command": " ".join(["tools/bench.sh", *args.sections]),
    }
    made["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for name in args.sections or SECTIONS:
        print(f"{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}", file=sys.stderr, flush=True)
        made[name] = SECTIONS[name](bench)
    made |= {"load_after": os.getloadavg()[0], "commands": bench.commands, "table": bench.rows}
    cpu = re.sub(r"[^a-z0-9]+", "-", made["machine"]["cpu"].lower()).strip("-")
    name = f"{made['date'][:10]}-{cpu}-{made['machine']['cores']}c-{made['commit']}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / name).write_text(json.dumps(made, indent=1) + "\n")
    widths = [max(len(row[i]) for row in bench.rows) for i in range(4)]
    print()
    for row in [("", "robocache", "beside", "wanted"), *bench.rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    host = f"{made['machine']['cpu']}, {made['machine']['cores']} cores, commit {made['commit']}"
    print(f"\n{host}; all figures: {args.out / name}")


if __name__ == "__main__":
    main()
