"""What the tests of whole datasets share: an epoch as arrays, and a window of it beside the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from reference import offsets_to_ns, resample, ulps_apart

import robocache as rc

Arrays = dict[str, npt.NDArray[Any]]


def whole_epoch(loader: rc.DataLoader) -> Arrays:
    """Every batch of one epoch, joined."""
    parts: dict[str, list[Any]] = {}
    for batch in loader:
        for key, value in batch.items():
            parts.setdefault(key, []).append(list(value) if isinstance(value, list) else value.copy())
    return {key: np.concatenate([np.asarray(part) for part in found]) for key, found in parts.items()}


def rows_of(table: pa.Table, columns: Iterable[str]) -> npt.NDArray[Any]:
    """Columns packed side by side, `[rows, D]`."""
    found = []
    for name in columns:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            found.append(column.flatten().to_numpy().reshape(len(column), -1))
        else:
            found.append(column.to_numpy(zero_copy_only=False)[:, None])
    return np.concatenate(found, axis=1)


def check(
    batch: Arrays,
    key: str,
    stamps: npt.NDArray[np.int64],
    rows: npt.NDArray[Any],
    offsets: list[float],
    interp: str,
    max_gap: float | None = None,
    episode: int | None = None,
) -> int:
    """Compares one window of a whole epoch, or of the samples of one episode in it, with `reference.py`;
    returns how many targets were padded."""
    here = slice(None) if episode is None else batch["episode_index"] == episode
    anchors = batch["t_ns"][here]
    assert len(anchors) > 0
    found, found_pad = batch[key][here], batch[f"{key}_is_pad"][here]
    assert found_pad.shape == (len(anchors), len(offsets))
    found = found.reshape(len(anchors), len(offsets), rows.shape[1])
    limit = {"linear": 2.0, "slerp": 4.0}.get(interp, 0.5)
    gap_ns = None if max_gap is None else offsets_to_ns([max_gap])[0]
    for step, offset_ns in enumerate(offsets_to_ns(offsets)):
        wanted = resample(stamps, rows, anchors + offset_ns, interp, gap_ns)
        np.testing.assert_array_equal(found_pad[:, step], wanted.pad, err_msg=f"{key} step {step}: masks")
        scale = np.ones_like(wanted.scale) if interp == "slerp" else wanted.scale
        apart = ulps_apart(found[:, step], wanted.values, scale)
        assert apart <= limit, f"{key} step {step}: {apart} ulps"
        if interp in ("nearest", "previous"):
            np.testing.assert_array_equal(found[:, step], wanted.values.astype(np.float32))
    return int(found_pad.sum())
