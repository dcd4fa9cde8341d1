"""What a sample is, over streams of several clocks: anchors, gaps, offsets in any order, dtypes, text.

The recordings are made up here, with holes and late starts where a test needs them, so that every mask and
every held value is known beforehand.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from epochs import check, whole_epoch

import robocache as rc

Recording = dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]

MODES = ["idle", "reach", "grasp \u00e9", ""]


def recording(seed: int) -> Recording:
    """Three clocks that start apart: `fast` with a hole of 0.4 s, `slow` late, `mode` now and then."""
    rng = np.random.default_rng(seed)
    start = 1_650_000_000_000_000_000 + seed * 10**12
    fast = start + 3_000_000 + np.cumsum(rng.integers(8_000_000, 12_000_000, 300))
    fast[150:] += 400_000_000
    slow = start + 700_000_000 + np.cumsum(rng.integers(90_000_000, 110_000_000, 30))
    mode = start + np.array([0, 900, 1_800, 3_100]) * 1_000_000
    return {
        "fast": (fast, rng.standard_normal((300, 2)) * 100),
        "slow": (slow, rng.standard_normal((30, 3)).astype(np.float32)),
        "mode": (mode, rng.integers(-100, 100, (4, 1)).astype(np.int16)),
    }


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Recording]]:
    """Episodes `flight_2` and `flight_10`, in this order, with a manifest of their own."""
    root = tmp_path_factory.mktemp("flights")
    recordings = [recording(1), recording(2)]
    for name, streams in zip(["flight_2", "flight_10"], recordings, strict=True):
        folder = root / "flights" / name
        folder.mkdir(parents=True)
        for key, (stamps, rows) in streams.items():
            table = pa.table({"t": stamps} | {f"c{i}": rows[:, i] for i in range(rows.shape[1])})
            if key == "mode":
                table = table.append_column("text", pa.array(MODES).dictionary_encode())
            pq.write_table(table, folder / f"{key}.parquet", compression="gzip")
    (root / "robocache.toml").write_text(
        """
        layout = "streams"
        episodes = "flights/*"
        [streams.fast]
        file = "fast.parquet"
        time = { column = "t", unit = "ns" }
        columns = ["c0", "c1"]
        [streams.slow]
        file = "slow.parquet"
        time = { column = "t", unit = "ns" }
        columns = ["c0", "c1", "c2"]
        [streams.mode]
        file = "mode.parquet"
        time = { column = "t", unit = "ns" }
        columns = ["c0"]
        [streams.text]
        file = "mode.parquet"
        time = { column = "t", unit = "ns" }
        columns = ["text"]
        """
    )
    return root, recordings


def epoch_of(path: Path, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 50, "framework": "numpy", "shuffle": False}
    return whole_epoch(rc.DataLoader(path, **(defaults | arguments)))


Flights = tuple[Path, list[Recording]]


def test_the_frames_of_a_chosen_stream_are_the_anchors(flights: Flights, sock: str) -> None:
    root, recordings = flights
    offsets = [-1.0, 0.0, 0.5]
    for anchor in ("fast", "slow", "text"):
        batch = epoch_of(root, windows={"slow": rc.Window(at=offsets)}, anchor_stream=anchor)
        clocks = [streams["mode" if anchor == "text" else anchor][0] for streams in recordings]
        np.testing.assert_array_equal(batch["t_ns"], np.concatenate(clocks))
        np.testing.assert_array_equal(batch["episode_index"], np.repeat([0, 1], [len(c) for c in clocks]))
        np.testing.assert_array_equal(
            batch["frame_index"], np.concatenate([np.arange(len(c)) for c in clocks])
        )
        np.testing.assert_array_equal(
            batch["timestamp"], np.concatenate([((c - c[0]) / 1e9).astype(np.float32) for c in clocks])
        )
        for episode, streams in enumerate(recordings):
            check(batch, "slow", *streams["slow"], offsets, "linear", episode=episode)


def test_a_feature_at_the_anchor_of_another_stream_has_a_mask(flights: Flights, sock: str) -> None:
    root, recordings = flights
    batch = epoch_of(root, features=["fast", "slow", "mode", "text"], anchor_stream="fast")
    # The anchor's own row, never padded.
    np.testing.assert_array_equal(
        batch["fast"], np.concatenate([s["fast"][1] for s in recordings]).astype(np.float32)
    )
    assert "fast_is_pad" not in batch
    for key in ("slow", "mode", "text"):
        assert batch[f"{key}_is_pad"].shape == (600,)
    for episode, streams in enumerate(recordings):
        here = batch["episode_index"] == episode
        late = batch["t_ns"][here] < streams["slow"][0][0] - 1000
        over = batch["t_ns"][here] > streams["slow"][0][-1] + 1000
        np.testing.assert_array_equal(batch["slow_is_pad"][here], late | over)
        assert late.any()
        np.testing.assert_array_equal(batch["slow"][here][late], streams["slow"][1][:1].repeat(late.sum(), 0))
        at = np.clip(np.searchsorted(streams["mode"][0], batch["t_ns"][here], side="right") - 1, 0, None)
        assert batch["mode"].dtype == np.int16
        np.testing.assert_array_equal(batch["mode"][here], streams["mode"][1][at, 0])
        assert batch["text"][here].tolist() == [MODES[i] for i in at]


def test_episodes_begin_at_the_first_stamp_of_any_stream_and_grids_end_with_the_last(
    flights: Flights, sock: str
) -> None:
    root, recordings = flights
    spans = [
        (min(t[0] for t, _ in streams.values()), max(t[-1] for t, _ in streams.values()))
        for streams in recordings
    ]
    offsets = [0.0, 0.8]
    windows = {"fast": rc.Window(at=offsets), "slow": rc.Window(at=offsets)}
    batch = epoch_of(root, windows=windows, anchors="episodes")
    np.testing.assert_array_equal(batch["t_ns"], [start for start, _ in spans])
    np.testing.assert_array_equal(batch["timestamp"], np.zeros(2, np.float32))
    np.testing.assert_array_equal(batch["index"], [0, 1])
    # A rate whose period is no whole number of nanoseconds drifts nowhere.
    for hz in (7.0, 1000 / 3, 0.25):
        batch = epoch_of(root, windows=windows, anchors=rc.Every(hz=hz))
        grids = []
        for start, end in spans:
            steps = int((end - start) * Fraction(hz) / 10**9) + 2
            grid = np.array([round(k * 10**9 / Fraction(hz)) for k in range(steps)]) + start
            grids.append(grid[grid <= end])
        assert np.abs(batch["t_ns"] - np.concatenate(grids)).max() <= 1  # ties may be rounded either way
        np.testing.assert_array_equal(
            batch["frame_index"], np.concatenate([np.arange(len(g)) for g in grids])
        )
        for episode, streams in enumerate(recordings):
            for key in ("fast", "slow"):
                check(batch, key, *streams[key], offsets, "linear", episode=episode)


@pytest.mark.parametrize("interp", ["linear", "nearest", "previous"])
def test_inside_a_longer_hole_the_row_before_it_is_held_and_masked(
    flights: Flights, sock: str, interp: str
) -> None:
    root, recordings = flights
    for max_gap in (0.2, 0.5):
        batch = epoch_of(
            root,
            windows={"fast": rc.Window(at=[0.0], interp=interp, max_gap=max_gap)},
            anchors=rc.Every(hz=200),
            dtype="float64",
        )
        for episode, streams in enumerate(recordings):
            here = batch["episode_index"] == episode
            t_ns, (stamps, rows) = batch["t_ns"][here], streams["fast"]
            hole = (t_ns > stamps[149] + 1000) & (t_ns < stamps[150] - 1000)
            outside = (t_ns < stamps[0] - 1000) | (t_ns > stamps[-1] + 1000)
            assert hole.sum() > 70
            masked = (hole | outside) if max_gap == 0.2 else outside
            np.testing.assert_array_equal(batch["fast_is_pad"][here][:, 0], masked)
            found = batch["fast"][here][:, 0]
            if max_gap == 0.2 or interp == "previous":
                np.testing.assert_array_equal(found[hole], rows[149:150].repeat(hole.sum(), 0))
            else:
                assert (found[hole][-1] != rows[149]).all()
            after = t_ns > stamps[-1] + 1000
            np.testing.assert_array_equal(found[after], rows[-1:].repeat(after.sum(), 0))


def test_offsets_come_in_the_order_they_were_asked_for(flights: Flights, sock: str) -> None:
    root, recordings = flights
    offsets = [0.3, -0.2, 0.0, 0.3, -5.0, 0.01]
    batch = epoch_of(root, windows={"fast": rc.Window(at=offsets)}, anchor_stream="slow")
    for episode, streams in enumerate(recordings):
        check(batch, "fast", *streams["fast"], offsets, "linear", episode=episode)
    np.testing.assert_array_equal(batch["fast"][:, 0], batch["fast"][:, 3])
    assert batch["fast_is_pad"][:, 4].all()


def test_a_window_over_text_holds_the_last_text_and_masks_the_edges(flights: Flights, sock: str) -> None:
    root, recordings = flights
    offsets = [-0.5, 0.0, 2.0]
    loader = rc.DataLoader(
        root,
        windows={"text": rc.Window(at=offsets)},
        anchor_stream="slow",
        framework="torch",
        shuffle=False,
        episodes=[1],
        batch_size=30,
    )
    batch = next(iter(loader))
    anchors, stamps = recordings[1]["slow"][0], recordings[1]["mode"][0]
    targets = anchors[:, None] + np.array([-500_000_000, 0, 2_000_000_000])
    at = np.clip(np.searchsorted(stamps, targets, side="right") - 1, 0, None)
    assert batch["text"] == [[MODES[i] for i in row] for row in at]
    outside = (targets < stamps[0] - 1000) | (targets > stamps[-1] + 1000)
    np.testing.assert_array_equal(batch["text_is_pad"].numpy(), outside)
    assert outside.any()
    assert not outside.all()


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_each_stream_has_the_dtype_asked_for_it_and_integers_keep_theirs(
    flights: Flights, sock: str, framework: str
) -> None:
    root, recordings = flights
    rows = np.concatenate([streams["fast"][1] for streams in recordings])
    windows = {key: rc.Window(at=[0.0]) for key in ("fast", "slow", "mode")}
    kinds: dict[str, Any] = {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
    }
    for name, kind in kinds.items():
        for dtype in (name, {"fast": name, "default": "float16"}):
            loader = rc.DataLoader(
                root, windows=windows, anchor_stream="fast", dtype=dtype, framework=framework, shuffle=False
            )
            found, at = [], "float16" if isinstance(dtype, dict) else name
            for batch in loader:
                if framework == "torch":
                    assert batch["fast"].dtype == getattr(torch, name)
                    assert batch["slow"].dtype == getattr(torch, at)
                    assert batch["mode"].dtype == torch.int16
                    # As bits, since torch's bfloat16 has no numpy.
                    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[batch["fast"].element_size()]
                    found.append(batch["fast"].view(width).numpy().view(kind).copy())
                else:
                    assert batch["fast"].dtype == kind
                    assert batch["slow"].dtype == kinds[at]
                    assert batch["mode"].dtype == np.int16
                    found.append(batch["fast"].copy())
            # One rounding of the stored double, to nearest even.
            whole = np.concatenate(found)[:, 0]
            if name == "bfloat16":
                wanted = torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy().view(kind)
            else:
                wanted = rows.astype(kind)
            np.testing.assert_array_equal(whole.view(np.uint8), wanted.view(np.uint8))


def test_what_a_dtype_cannot_be_asked_for_is_an_error(flights: Flights, sock: str) -> None:
    root, _ = flights
    windows = {"fast": rc.Window(at=[0.0]), "mode": rc.Window(at=[0.0])}
    for dtype, message in [
        ({"fats": "float16"}, r"\"fats\".*it has fast, mode"),
        ({"slow": "float16"}, r"\"slow\".*it has fast, mode"),
        ({"mode": "float16"}, r"\"mode\".*int16"),
    ]:
        with pytest.raises((rc.RequestError, rc.DatasetError), match=message):
            rc.DataLoader(root, windows=windows, anchor_stream="fast", dtype=dtype)
