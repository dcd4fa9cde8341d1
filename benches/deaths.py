"""How soon a death is noticed: of a client that holds slots, and of the daemon. Prints one JSON object.

python deaths.py ROBOCACHED DATASET [--kills 20]

A client's: from `kill -9` of a process that holds batches to the first status of the daemon without its
loader. A status takes a connection of its own, about a millisecond here, and so much is what the figure can
be too long. The daemon's: from its `kill -9` to the error that `next()` raises in a client, which first takes
what was ready.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "baselines"))
from timing import figures

import robocache as rc

HOLDER = """
import sys, time
import robocache as rc
batches = iter(rc.DataLoader(sys.argv[1], batch_size=64, framework="numpy", slots=4, device="cpu"))
held = [next(batches) for _ in range(3)]
print("holds", flush=True)
time.sleep(600)
"""


def loader(dataset):
    return rc.DataLoader(dataset, batch_size=64, framework="numpy", slots=4, device="cpu")


def serve(robocached, scratch):
    """A daemon on $ROBOCACHE_SOCKET that answers."""
    os.environ["ROBOCACHE_SOCKET"] = f"{scratch}/robocached.sock"
    with (Path(scratch) / "log").open("a") as log:
        daemon = subprocess.Popen([robocached, "serve"], stderr=log)
    asked = [robocached, "status", "--json"]
    while subprocess.run(asked, capture_output=True, check=False).returncode != 0:
        if daemon.poll() is not None:
            sys.exit(f"the daemon did not start:\n{(Path(scratch) / 'log').read_text()}")
    return daemon


def of_a_client(dataset, kills):
    """Milliseconds; the bystander must get its batches all the while."""
    bystander, times = loader(dataset), []
    batches = iter(bystander)
    for _ in range(kills):
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, dataset], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        holder.send_signal(signal.SIGKILL)
        start = time.perf_counter()
        while any(client["pid"] == holder.pid for client in bystander.stats()["loaders"]):
            pass
        times.append((time.perf_counter() - start) * 1e3)
        holder.wait()
        assert len(next(batches)["index"]) == 64
    return times


def of_the_daemon(robocached, dataset, scratch, kills):
    """Milliseconds until the error, and batches that were ready and taken first."""
    times = []
    for _ in range(kills):
        daemon = serve(robocached, scratch)
        batches = iter(loader(dataset))
        held = next(batches)
        daemon.kill()
        start = time.perf_counter()
        try:
            for _ in batches:
                pass
            sys.exit("the epoch ended, which it cannot have")
        except rc.DaemonGone:
            times.append((time.perf_counter() - start) * 1e3)
        assert len(held["index"]) == 64
        daemon.wait()
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("robocached")
    parser.add_argument("dataset")
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="robocache-bench-") as scratch:
        daemon = serve(args.robocached, scratch)
        client = of_a_client(args.dataset, args.kills)
        daemon.terminate()
        daemon.wait()
        gone = of_the_daemon(args.robocached, args.dataset, scratch, args.kills)
    print(json.dumps({"client_ms": figures(client), "daemon_ms": figures(gone)}))


if __name__ == "__main__":
    main()
