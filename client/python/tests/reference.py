"""Resampling written a second time, plainly: float64 values on integer nanoseconds, one target at a time in
meaning.

The semantics are those of docs/resampling.md; nothing here is taken from the code under test.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: A target this near a stamp is that stamp.
SNAP_NS = 1000

Floats = npt.NDArray[np.float64]
Stamps = npt.NDArray[np.int64]


class Resampled(NamedTuple):
    values: Floats
    pad: npt.NDArray[np.bool_]
    #: The larger magnitude of the two neighbouring rows, which bounds the rounding error between them.
    scale: Floats


def seconds_to_ns(seconds: npt.NDArray[np.floating]) -> Stamps:
    """The nanosecond nearest to the exact value of each float."""
    return np.array([round(Fraction(float(t)) * 10**9) for t in seconds], dtype=np.int64)


def offsets_to_ns(seconds: list[float]) -> list[int]:
    return [round(Fraction(t) * 10**9) for t in seconds]


def resample(
    stamps: Stamps, rows: Floats, targets: Stamps, interp: str, max_gap_ns: int | None = None
) -> Resampled:
    """`rows` `[n, D]` at `stamps` `[n]`, read at `targets` `[m]`, as `[m, D]`."""
    n = len(stamps)
    # The stamp before or at a target, and the one after; at the edges the same one twice.
    after = np.searchsorted(stamps, targets, side="right")
    low, high = np.clip(after - 1, 0, n - 1), np.clip(after, 0, n - 1)
    to_low, to_high = np.abs(targets - stamps[low]), np.abs(stamps[high] - targets)
    snapped_low = (to_low <= SNAP_NS) & (to_low <= to_high)
    snapped_high = (to_high <= SNAP_NS) & ~snapped_low
    snapped = snapped_low | snapped_high
    outside = ((targets < stamps[0]) | (targets > stamps[-1])) & ~snapped
    gap = stamps[high] - stamps[low]
    in_gap = np.zeros(len(targets), bool) if max_gap_ns is None else (gap > max_gap_ns) & ~snapped & ~outside
    pad = outside | in_gap
    nearer = np.where(to_low <= to_high, low, high)
    chosen = nearer if interp == "nearest" else low
    chosen = np.where(in_gap, low, chosen)
    chosen = np.where(outside, np.where(targets < stamps[0], 0, n - 1), chosen)
    chosen = np.where(snapped_low, low, np.where(snapped_high, high, chosen))
    values = rows[chosen].astype(np.float64)
    between = ~(snapped | pad)
    if interp in ("linear", "slerp") and between.any():
        a, b = rows[low[between]].astype(np.float64), rows[high[between]].astype(np.float64)
        weight = (to_low[between].astype(np.float64) / gap[between].astype(np.float64))[:, None]
        values[between] = a + (b - a) * weight if interp == "linear" else great_circle(a, b, weight)
    scale = np.maximum(np.abs(rows[low]), np.abs(rows[high])).astype(np.float64)
    return Resampled(values, pad, scale)


def great_circle(a: Floats, b: Floats, weight: Floats) -> Floats:
    """Slerp of unit quaternions, the short way, by the textbook's arc cosine."""
    dot = np.sum(a * b, axis=1, keepdims=True)
    b = np.where(dot < 0, -b, b)
    angle = np.arccos(np.clip(np.abs(dot), 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        curved = (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)
    made = np.where(angle < 1e-7, a + (b - a) * weight, curved)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def ulps_apart(found: npt.NDArray[np.float32], wanted: Floats, scale: Floats) -> float:
    """The largest distance, in float32 ulps of the larger neighbour. NaN must meet NaN."""
    assert found.dtype == np.float32
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    ulp = np.spacing(np.maximum(scale, np.abs(wanted)).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(found.astype(np.float64) - wanted)[~nan] / ulp[~nan], initial=0.0))
