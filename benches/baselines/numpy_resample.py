"""One process of vectorised numpy that does nothing but the resampling of the original's shape: 32 episodes
of 500 x 256 float32 at 100 Hz, gathered from episodes in RAM, to 250 steps at 50 Hz. The bracket and weights
are worked out once, outside the timing, and every result goes into the same array.

    python numpy_resample.py [--start 0.0033]
"""

import argparse
import json

import numpy as np
from timing import rates

EPISODES, BATCH, ROWS, STEPS, DIM = 128, 32, 500, 250, 256


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    store = rng.normal(size=(EPISODES, ROWS, DIM)).astype(np.float32)
    position = (args.start + np.arange(STEPS) / 50) * 100
    low = np.floor(position + 1e-4).astype(int)
    weight = np.where(position - low < 1e-4, 0, position - low).astype(np.float32)[:, None]
    out, above = np.empty((BATCH, STEPS, DIM), np.float32), np.empty((STEPS, DIM), np.float32)

    def step():
        for i, episode in enumerate(rng.integers(EPISODES, size=BATCH)):
            source, target = store[episode], out[i]
            np.take(source, low, axis=0, out=target, mode="clip")
            if weight.any():
                np.take(source, low + 1, axis=0, out=above, mode="clip")
                np.subtract(above, target, out=above)
                np.multiply(above, weight, out=above)
                np.add(target, above, out=target)
        return BATCH

    print(json.dumps({"samples_per_s": rates(step, args.reps, args.seconds)}))


if __name__ == "__main__":
    main()
