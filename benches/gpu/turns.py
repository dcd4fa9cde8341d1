"""What a turn of two processes at one GPU costs: from one's publication to what the other does then.

    python3 benches/gpu/turns.py        # one GPU, half a minute; no torch, no robocache

The owner does a little work, waits until it is over, and publishes through shared memory. The user, who looks
all the time, does one of several things. It is a context of its own that the GPU has to turn to.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PUBLISHED, AT, DONE = 0, 8, 16
OWNERS = ("11 us of a kernel", "a copy of 256 bytes from the host", "a record of its event", "nothing")
USERS = (
    "query",
    "wait",
    "record",
    "query, synchronise",
    "wait, synchronise",
    "record, synchronise",
    "query, kernel, synchronise",
    "wait, kernel, synchronise",
)
TURNS = 500 * len(USERS)


def worker() -> Any:
    """The bare driver, as the experiment on fences has it."""
    spec = importlib.util.spec_from_file_location("fences", ROOT / "docs" / "adr" / "0007-fences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Worker()
    made.stream("stream")
    made.event("mine")
    made.alloc("memory", 4 << 20)
    return made


class Shared:
    def __init__(self, path: str) -> None:
        self.map = mmap.mmap(os.open(path, os.O_RDWR), 4096)

    def get(self, at: int) -> int:
        return struct.unpack_from("<q", self.map, at)[0]

    def put(self, at: int, value: int) -> None:
        struct.pack_into("<q", self.map, at, value)

    def until(self, at: int, value: int) -> None:
        while self.get(at) < value:
            pass


def owner(shared: Shared) -> None:
    cuda, numbers = worker(), itertools.count(1)
    print(json.dumps([cuda.export("memory", "Mem"), cuda.export("mine", "Event")]), flush=True)
    cuda.open_event("theirs", sys.stdin.readline().strip())
    host = ctypes.c_void_p()
    cuda.must("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(4096), 0)
    to, size, stream = cuda.made["memory"], ctypes.c_size_t(256), cuda.made["stream"]
    for work in OWNERS:
        for _ in range(TURNS):
            time.sleep(0.0004)
            if "kernel" in work:
                cuda.spin("stream", 0.011)
            if "copy" in work:
                cuda.must("cuMemcpyHtoDAsync_v2", to, host, size, stream)
            if work != "nothing":
                cuda.record("mine", "stream")
                while cuda.query("mine") == "NOT_READY":
                    pass
            shared.put(AT, time.monotonic_ns())
            number = next(numbers)
            shared.put(PUBLISHED, number)
            shared.until(DONE, number)


def user(shared: Shared, memory: str, event: str) -> None:
    cuda, numbers = worker(), itertools.count(1)
    cuda.open_memory("ring", memory)
    cuda.open_event("theirs", event)
    print(cuda.export("mine", "Event"), flush=True)
    steps = {
        "query": lambda: cuda.query("theirs"),
        "wait": lambda: cuda.wait("stream", "theirs"),
        "record": lambda: cuda.record("mine", "stream"),
        "kernel": lambda: cuda.spin("stream", 0.0),
        "synchronise": lambda: cuda.finish("stream"),
    }
    ways = [[steps[step] for step in way.split(", ")] for way in USERS]
    for work in OWNERS:
        took: dict[str, list[int]] = {way: [] for way in USERS}
        for turn in range(TURNS):
            number = next(numbers)
            shared.until(PUBLISHED, number)
            for step in ways[turn % len(ways)]:
                assert step() == "SUCCESS"
            took[USERS[turn % len(ways)]].append(time.monotonic_ns() - shared.get(AT))
            cuda.finish("stream")
            shared.put(DONE, number)
        print(
            json.dumps({"owner": work, "us": {way: percentiles(ns) for way, ns in took.items()}}), flush=True
        )


def percentiles(ns: list[int]) -> dict[str, float]:
    ns.sort()
    return {name: ns[int(share * (len(ns) - 1))] / 1e3 for name, share in (("p50", 0.5), ("p99", 0.99))}


def both() -> Iterator[dict[str, Any]]:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4096)

        def start(*role: str) -> subprocess.Popen[str]:
            command = [sys.executable, __file__, file.name, *role]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        first = start("owner")
        second = start("user", *json.loads(first.stdout.readline()))
        first.stdin.write(second.stdout.readline())
        first.stdin.flush()
        for line in second.stdout:
            yield json.loads(line)
        if first.wait() or second.wait():
            sys.exit("a process failed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        {"owner": owner, "user": user}[sys.argv[2]](Shared(sys.argv[1]), *sys.argv[3:])
    else:
        for found in both():
            for way, us in found["us"].items():
                print(f"{found['owner']:34} {way:28} p50 {us['p50']:6.1f} us, p99 {us['p99']:6.1f}")
