"""What the Python benchmarks share: repeated timings as figures, in the form of benches/src/lib.rs."""

import time


def figures(values):
    """Median, 99th percentile, extremes and number."""
    values = sorted(values)

    def at(share):
        return values[round(share * (len(values) - 1))]

    return {"median": at(0.5), "p99": at(0.99), "min": values[0], "max": values[-1], "n": len(values)}


def rates(step, reps, seconds):
    """Units a second of `step()`, which returns how many it did; `reps` times after one uncounted."""
    out = []
    for rep in range(reps + 1):
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            done += step()
        if rep:
            out.append(done / elapsed)
    return figures(out)
