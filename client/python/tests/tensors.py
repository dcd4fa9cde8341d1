"""What `resample` and `fuse` must give, from numpy alone, and inputs to give them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

VALUES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
TIMES = ("float32", "float64", "int64")
# Bits of the fraction; those of the type that values are computed in.
FRACTION = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
COMPUTED = {"float16": 23, "bfloat16": 23, "float32": 23, "float64": 52}


def times(rng: np.random.Generator, batch: int, rows: int, dtype: str) -> np.ndarray:
    """Irregular times, some of them equal: a second in all, or 10^9 ns of a recent epoch."""
    steps = rng.exponential(size=(batch, rows)) * (rng.random((batch, rows)) < 0.9)
    seconds = np.cumsum(steps, axis=1) / rows
    if dtype == "int64":
        return 1_763_800_000_000_000_000 + (seconds * 1e9).astype(np.int64)
    return seconds.astype(dtype)


def targets(rng: np.random.Generator, stamps: np.ndarray, steps: int) -> np.ndarray:
    """Times in no order: in between, far outside on both sides, and exactly on stamps."""
    batch, rows = stamps.shape
    low, high = stamps[:, :1], stamps[:, -1:]
    spread = rng.uniform(-0.2, 1.2, (batch, steps))
    found = (low + ((high - low) * spread).astype(stamps.dtype)).astype(stamps.dtype)
    on_stamp = rng.random((batch, steps)) < 0.3
    exact = np.take_along_axis(stamps, rng.integers(0, rows, (batch, steps)), axis=1)
    return np.where(on_stamp, exact, found)


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (rng.normal(size=shape) * 10).astype(VALUES[dtype])


def _ulp(of: np.ndarray, fraction: int) -> np.ndarray:
    _, exponent = np.frexp(of)
    return np.ldexp(1.0, exponent - 1 - fraction)


def check(out: np.ndarray, src: np.ndarray, stamps: np.ndarray, at: np.ndarray) -> None:
    """`out` is `src` at `at`: bit for bit where that is a row, else near the exact value.

    Near: two ulps, of the larger neighbour and the type that is computed in, and one rounding to the dtype.
    """
    assert out.dtype == src.dtype
    assert out.shape == (*at.shape, src.shape[2])
    name = src.dtype.name
    rows = stamps.shape[1]
    for b in range(stamps.shape[0]):
        after = np.searchsorted(stamps[b], at[b], side="right")
        row = np.maximum(after - 1, 0)
        between = (after > 0) & (after < rows)
        between[between] = stamps[b][row[between]] != at[b][between]
        exact = ~between
        assert out[b][exact].tobytes() == src[b][row[exact]].tobytes()
        before, behind = stamps[b][row[between]], stamps[b][after[between]]
        # Differences first, in the times' own type where that is exact, or wider.
        wide = np.int64 if stamps.dtype == np.int64 else np.longdouble
        offset = (at[b][between].astype(wide) - before.astype(wide)).astype(np.longdouble)
        weight = (offset / (behind.astype(wide) - before.astype(wide)).astype(np.longdouble))[:, None]
        left = src[b][row[between]].astype(np.longdouble)
        right = src[b][after[between]].astype(np.longdouble)
        wanted = left + weight * (right - left)
        larger = np.maximum(abs(left), abs(right))
        allowed = 2 * _ulp(larger, COMPUTED[name])
        if FRACTION[name] != COMPUTED[name]:
            allowed = allowed + _ulp(larger, FRACTION[name]) / 2
        error = abs(out[b][between].astype(np.longdouble) - wanted)
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3} times what is allowed"
