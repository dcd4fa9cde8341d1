"""Trains a small policy in Python: from two states, the next second of actions.

    python examples/train.py DATASET [--seconds 5] [--numpy]

In torch if it can be imported, on the GPU if it and the daemon have one; else in plain numpy. Both streams
are asked for at 50 Hz, whatever rates they were recorded at. The last line is JSON, for the demo's table.
"""

import argparse
import json
import math
import time
import warnings

import numpy as np
import policies

import robocache as rc

HZ = 50


def features(dataset):
    """The floating streams to learn from and to learn, by their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RoboCacheWarning)  # the trainer's own loader says them
        every = rc.DataLoader(dataset, batch_size=1, slots=2, anchors="episodes", framework="numpy")
    with every:
        names = [k for k, c in every.columns.items() if c["role"] == "data" and c["dtype"] == "float32"]
    if len(names) < 2:
        raise SystemExit(f"two floating streams are needed, {dataset} has {names}")
    action = next((n for n in names if any(part in n for part in ("action", "command", "cmd"))), names[-1])
    others = [n for n in names if n != action]
    state = next((n for n in others if any(part in n for part in ("state", "joint", "pose"))), others[0])
    return state, action


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="a path, or a name that the daemon serves")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--numpy", action="store_true", help="do not use torch, even if it is there")
    args = parser.parse_args()
    make_policy, framework = policies.choose(args.numpy)

    state, action = features(args.dataset)
    loader = rc.DataLoader(
        args.dataset,
        batch_size=64,
        anchors=rc.Every(hz=HZ),
        windows={
            state: rc.Window(hz=HZ, steps=2, start=-1 / HZ),
            action: rc.Window(hz=HZ, steps=50),
        },
        framework=framework,
    )
    sample_bytes = sum(math.prod(c["shape"]) * np.dtype(c["dtype"]).itemsize for c in loader.columns.values())

    batches = iter(loader)
    batch = next(batches)
    policy = make_policy(batch[state], batch[action])
    policy.step(batch[state], batch[action], batch[f"{action}_is_pad"])  # not timed: frameworks load late
    framework = f"{framework}, {getattr(batch[state], 'device', 'cpu')}"
    print(f"{len(loader)} batches of 64 an epoch: {state} -> {action}, 50 steps at 50 Hz, in {framework}")
    samples, waited, told, start = 0, 0.0, 0.0, time.perf_counter()
    while (now := time.perf_counter()) - start < args.seconds:
        batch = next(batches, None)
        if batch is None:  # the epoch is over
            batches = iter(loader)
            continue
        waited += time.perf_counter() - now
        x, y, is_pad = batch[state], batch[action], batch[f"{action}_is_pad"]
        loss = policy.step(x, y, is_pad)
        samples += len(x)
        if now - told > 1:
            print(f"epoch {batch.epoch} batch {batch.batch_index:4}: loss {float(loss):.5f}", flush=True)
            told = now
    seconds = time.perf_counter() - start
    total = {"samples": samples, "bytes": samples * sample_bytes, "seconds": seconds, "waited_s": waited}
    print(json.dumps(total | {"framework": framework}))


if __name__ == "__main__":
    main()
