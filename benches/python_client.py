"""The Python client of a running daemon, timed on the LeRobot workload. Prints one JSON object.

ROBOCACHE_SOCKET=... python python_client.py ready|attach|throughput DATASET
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "baselines"))
from timing import figures, rates

SLOTS, FPS = 4, 50


def private_bytes():
    """Memory of this process alone, and its part of what it shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["ready", "attach", "throughput"])
    parser.add_argument("dataset")
    parser.add_argument("--framework", default="torch")
    parser.add_argument("--touch", action="store_true", help="throughput: make a tensor of every column")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    if args.framework == "torch":
        import torch

        torch.set_num_threads(1)
    import numpy  # noqa: F401  so that it does not count as ours

    before = private_bytes()
    import robocache as rc

    def loader():
        lately = [-1 / FPS, 0.0]
        deltas = {
            "action": [k / FPS for k in range(50)],
            "observation.state": lately,
            "observation.tactile": lately,
        }
        return rc.DataLoader(
            args.dataset, batch_size=64, delta_timestamps=deltas, framework=args.framework, slots=SLOTS
        )

    out = globals()[args.what](loader, args)
    print(json.dumps(out | {"added_bytes": private_bytes() - before}))


def ready(loader, args):
    """`next()` and giving the batch back, with the whole ring full, in nanoseconds; 200 a repetition."""
    with loader() as made:
        pid, nexts, both = os.getpid(), [], []

        def full():
            slots = next(one["slots"] for one in made.stats()["loaders"] if one["pid"] == pid)
            return slots["ready"] == slots["total"]

        # The garbage collector belongs to the program around, as in timeit.
        gc.disable()
        count = 0
        while count < 200 * (args.reps + 1):
            it = iter(made)
            for _ in range(len(made) - SLOTS):
                while not full():
                    time.sleep(0.0002)
                start = time.perf_counter_ns()
                batch = next(it)
                took = time.perf_counter_ns()
                del batch
                gone = time.perf_counter_ns()
                count += 1
                if count > 200:
                    nexts.append(took - start)
                    both.append(gone - start)
                if count == 200 * (args.reps + 1):
                    break
        gc.enable()
    return {"next_ns": figures(nexts), "next_and_drop_ns": figures(both)}


def attach(loader, args):
    """From nothing to the first batch in hand, in milliseconds."""
    times = []
    for rep in range(args.reps + 1):
        start = time.perf_counter()
        made = loader()
        batch = next(iter(made))
        took = (time.perf_counter() - start) * 1e3
        del batch
        made.close()
        if rep:
            times.append(took)
    return {"attach_to_first_batch_ms": figures(times)}


def throughput(loader, args):
    """Samples a second of a consumer that does nothing but `next()`, or touches every column as well."""
    with loader() as made:

        def endless():
            while True:
                yield from made

        batches = endless()

        def step():
            batch = next(batches)
            if args.touch:
                for key in batch:
                    batch[key]
            return batch.rows

        for _ in range(len(made)):  # one epoch: everything is decoded
            step()
        return {"samples_per_s": rates(step, args.reps, args.seconds)}


if __name__ == "__main__":
    main()
