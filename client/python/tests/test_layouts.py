"""Datasets that are not LeRobot's, from files to batches: frame tables, nested rows, stream tables, and what
a manifest can say of them.

The tables are real (octo_bridge) or written here with pyarrow; what must come out is computed with pyarrow
and numpy, never read from the code under test.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Daemon
from epochs import check, rows_of, whole_epoch
from reference import seconds_to_ns

import robocache as rc


def loader_of(path: Path | str, manifest: Any = None, **arguments: Any) -> rc.DataLoader:
    """In order, for numpy."""
    defaults: dict[str, Any] = {"batch_size": 32, "framework": "numpy", "shuffle": False}
    return rc.DataLoader(path, manifest=manifest, **(defaults | arguments))


# A table of frames without stamps: BridgeData.

OCTO = {
    "layout": "frames",
    "frames": {"files": "parquet/*.parquet", "episode": "episode_index", "time": {"rate": 5.0}},
    "streams": {
        "observation.state": {},
        "action": {},
        "instruction": {"columns": ["language_instruction"]},
        "is_last": {},
        "source_episode_id": {},
    },
}


@pytest.fixture(scope="module")
def octo(data: Path) -> pa.Table:
    columns = [name for stream, of in OCTO["streams"].items() for name in of.get("columns", [stream])]  # type: ignore[attr-defined]
    return pq.read_table(
        data / "octo_bridge/parquet/train.parquet", columns=[*columns, "episode_index", "frame_index"]
    )


def test_a_frame_tables_time_comes_from_its_declared_rate(data: Path, sock: str, octo: pa.Table) -> None:
    offsets = [-0.4, -0.05, 0.0, 0.1, 0.2, 1.0]
    batch = whole_epoch(
        loader_of(
            data / "octo_bridge",
            OCTO,
            windows={
                "observation.state": rc.Window(at=offsets),
                "action": rc.Window(at=offsets, interp="nearest"),
                "is_last": rc.Window(at=offsets),
            },
            features=["instruction", "source_episode_id"],
        )
    )
    numbers = octo["episode_index"].to_numpy()
    np.testing.assert_array_equal(batch["episode_index"], numbers)
    np.testing.assert_array_equal(batch["frame_index"], octo["frame_index"].to_numpy())
    np.testing.assert_array_equal(batch["index"], np.arange(len(octo)))
    np.testing.assert_array_equal(batch["t_ns"], octo["frame_index"].to_numpy() * 200_000_000)
    np.testing.assert_array_equal(batch["timestamp"], (octo["frame_index"].to_numpy() / 5).astype(np.float32))
    np.testing.assert_array_equal(batch["task_index"], np.zeros(len(octo), np.int64))
    np.testing.assert_array_equal(batch["source_episode_id"], octo["source_episode_id"].to_numpy())
    assert batch["instruction"].tolist() == octo["language_instruction"].to_pylist()
    assert len(set(batch["instruction"])) == 4
    last = octo["is_last"].to_numpy(zero_copy_only=False)
    assert batch["is_last"].dtype == np.bool_
    np.testing.assert_array_equal(batch["is_last"][:, 2], last)
    padded = 0
    for episode in sorted(set(numbers.tolist())):
        rows = octo.filter(pa.compute.equal(octo["episode_index"], episode))
        stamps = np.arange(len(rows)) * 200_000_000
        states, actions = rows_of(rows, ["observation.state"]), rows_of(rows, ["action"])
        padded += check(batch, "observation.state", stamps, states, offsets, "linear", episode=episode)
        check(batch, "action", stamps, actions, offsets, "nearest", episode=episode)
    # Of 10 frames: 2 targets before, 1 before, none, 1, 1 and 5 after.
    assert padded == 25 * (2 + 1 + 0 + 1 + 1 + 5)


def test_a_batch_of_text_is_a_list_and_over_a_window_a_list_for_each_sample(
    data: Path, sock: str, octo: pa.Table
) -> None:
    windows = {"instruction": rc.Window(at=[-0.2, 0.0])}
    loader = loader_of(data / "octo_bridge", OCTO, windows=windows, batch_size=16)
    batch = next(iter(loader))
    texts = octo["language_instruction"].to_pylist()[:16]
    episodes = octo["episode_index"].to_pylist()[:16]
    before = [texts[max(i - 1, 0)] if i and episodes[i - 1] == episodes[i] else texts[i] for i in range(16)]
    assert batch["instruction"] == [[b, t] for b, t in zip(before, texts, strict=True)]
    wanted = [[i == 0 or episodes[i - 1] != episodes[i], False] for i in range(16)]
    np.testing.assert_array_equal(batch["instruction_is_pad"], wanted)


def test_delta_timestamps_of_a_frame_table_are_frames_of_its_rate(
    data: Path, sock: str, octo: pa.Table
) -> None:
    deltas = [-0.2, 0.0, 0.6]
    batch = whole_epoch(loader_of(data / "octo_bridge", OCTO, delta_timestamps={"action": deltas}))
    actions, numbers = rows_of(octo, ["action"]), octo["episode_index"].to_numpy()
    starts = np.searchsorted(numbers, numbers, side="left")
    ends = np.searchsorted(numbers, numbers, side="right")
    for step, frames in enumerate([-1, 0, 3]):
        wanted = np.arange(len(octo)) + frames
        np.testing.assert_array_equal(batch["action_is_pad"][:, step], (wanted < starts) | (wanted >= ends))
        held = np.clip(wanted, starts, ends - 1)
        np.testing.assert_array_equal(batch["action"][:, step], actions[held])
    # And everything else at the anchor, text included, as in LeRobot.
    np.testing.assert_array_equal(batch["observation.state"], rows_of(octo, ["observation.state"]))
    assert batch["instruction"].tolist() == octo["language_instruction"].to_pylist()
    with pytest.raises((rc.RequestError, rc.DatasetError), match=r"0\.1 s is no multiple of 1/5"):
        loader_of(data / "octo_bridge", OCTO, delta_timestamps={"action": [0.1]})


def test_every_column_is_a_stream_where_the_manifest_names_none(
    data: Path, sock: str, octo: pa.Table
) -> None:
    manifest = {key: value for key, value in OCTO.items() if key != "streams"}
    batch = whole_epoch(loader_of(data / "octo_bridge", manifest))
    # Numeric ones by default, at the anchor.
    np.testing.assert_array_equal(batch["action"], rows_of(octo, ["action"]))
    np.testing.assert_array_equal(batch["is_last"], octo["is_last"].to_numpy(zero_copy_only=False))
    assert "language_instruction" not in batch
    with pytest.raises((rc.RequestError, rc.DatasetError), match=r"observation\.images\.image_0.*not decode"):
        loader_of(data / "octo_bridge", manifest, features=["observation.images.image_0"])


# A table of frames with stamps.

T0 = 1_700_000_000_123_456_789
JITTER_NS = np.cumsum(np.random.default_rng(5).integers(5_000_000, 50_000_000, 60))
#: Stamps in every form that the documentation promises, and what they are in nanoseconds.
STAMPS: dict[str, tuple[pa.Array, str | None]] = {
    "float64 s": (pa.array((T0 + JITTER_NS) / 1e9), "s"),
    "float32 s": (pa.array((JITTER_NS / 1e9).astype(np.float32)), "s"),
    "int32 s": (pa.array(np.arange(60, dtype=np.int32) * 3 + 1_700_000_000), "s"),
    "float64 ms": (pa.array((T0 + JITTER_NS) / 1e6), "ms"),
    "int64 ms": (pa.array((T0 + JITTER_NS) // 1_000_000), "ms"),
    "uint64 us": (pa.array(((T0 + JITTER_NS) // 1000).astype(np.uint64)), "us"),
    "uint32 us": (pa.array((JITTER_NS // 1000).astype(np.uint32)), "us"),
    "int64 ns": (pa.array(T0 + JITTER_NS), "ns"),
    "timestamp s": (pa.array(np.arange(60) + 1_700_000_000, pa.timestamp("s")), None),
    "timestamp ms": (pa.array((T0 + JITTER_NS) // 1_000_000, pa.timestamp("ms")), None),
    "timestamp us": (pa.array((T0 + JITTER_NS) // 1000, pa.timestamp("us", tz="Europe/Zurich")), None),
    "timestamp ns": (pa.array(T0 + JITTER_NS, pa.timestamp("ns")), None),
}


def in_ns(stamps: pa.Array, unit: str | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    if unit is None:
        return stamps.cast(pa.timestamp("ns", stamps.type.tz)).cast(pa.int64()).to_numpy()
    scale = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    return np.array([round(Fraction(value) * scale) for value in stamps.to_pylist()], np.int64)


# Parquet has no timestamps in seconds: pyarrow would write them as milliseconds.
@pytest.mark.parametrize(
    ("form", "container"),
    [
        (form, kind)
        for form in STAMPS
        for kind in ("parquet", "arrow")
        if (form, kind) != ("timestamp s", "parquet")
    ],
)
def test_stamps_of_every_unit_become_nanoseconds_without_loss(
    tmp_path: Path, sock: str, form: str, container: str
) -> None:
    column, unit = STAMPS[form]
    values = np.random.default_rng(6).standard_normal((60, 3)).astype(np.float32)
    episode = np.repeat([4, 2], [25, 35])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 3)
    table = pa.table({"episode": episode, "stamp": column, "value": vectors})
    if container == "parquet":
        pq.write_table(table, tmp_path / "frames.parquet", row_group_size=17, compression="zstd")
    else:
        with (
            pa.OSFile(str(tmp_path / "frames.arrow"), "wb") as file,
            pa.ipc.new_file(file, table.schema) as w,
        ):
            w.write_table(table, max_chunksize=17)
    time = {"column": "stamp"} | ({} if unit is None else {"unit": unit})
    manifest = {
        "layout": "frames",
        "frames": {"files": f"*.{container}", "episode": "episode", "time": time},
        "streams": {"value": {}},
    }
    offsets = [-0.03, 0.0, 0.011]
    batch = whole_epoch(loader_of(tmp_path, manifest, windows={"value": rc.Window(at=offsets)}))
    stamps = in_ns(column, unit)
    assert len(set(stamps.tolist())) == 60
    np.testing.assert_array_equal(batch["t_ns"], stamps)
    np.testing.assert_array_equal(batch["episode_index"], episode)
    for number in (4, 2):
        rows = episode == number
        check(batch, "value", stamps[rows], values[rows], offsets, "linear", episode=number)
    with pytest.raises((rc.RequestError, rc.DatasetError), match=r"windows="):
        loader_of(tmp_path, manifest, delta_timestamps={"value": [0.0]})


# A row an episode.


def test_nested_rows_are_episodes_whose_streams_have_clocks_of_their_own(tmp_path: Path, sock: str) -> None:
    rng = np.random.default_rng(7)
    rows: dict[str, list[Any]] = {
        key: [] for key in ("id", "success", "pose_t", "pose", "force_t", "fx", "fy")
    }
    for number, success in [(12, True), (5, False), (7, True), (9, True)]:
        poses, forces = int(rng.integers(10, 30)), int(rng.integers(50, 90))
        rows["id"].append(number)
        rows["success"].append(success)
        rows["pose_t"].append((10**15 + np.cumsum(rng.integers(20_000, 60_000, poses))).tolist())
        rows["pose"].append(rng.standard_normal((poses, 3)).astype(np.float32).tolist())
        rows["force_t"].append((1e9 + 0.031 + np.cumsum(rng.uniform(0.002, 0.02, forces))).tolist())
        rows["fx"].append(rng.standard_normal(forces).tolist())
        rows["fy"].append(rng.standard_normal(forces).tolist())
    schema = pa.schema(
        {
            "id": pa.int32(),
            "success": pa.bool_(),
            "pose_t": pa.list_(pa.uint64()),
            "pose": pa.list_(pa.list_(pa.float32(), 3)),
            "force_t": pa.large_list(pa.float64()),
            "fx": pa.list_(pa.float64()),
            "fy": pa.list_(pa.float64()),
        }
    )
    pq.write_table(pa.table(rows, schema), tmp_path / "episodes.parquet", row_group_size=2)
    manifest = {
        "layout": "nested",
        "frames": {"files": "*.parquet", "episode": "id", "where": {"success": True}},
        "streams": {
            "pose": {"time": {"column": "pose_t", "unit": "us"}},
            "force": {"time": {"column": "force_t", "unit": "s"}, "columns": ["fx", "fy"]},
        },
    }
    offsets = [-0.1, 0.0, 0.0125, 0.3]
    windows = {"pose": rc.Window(at=offsets), "force": rc.Window(at=offsets, interp="nearest")}
    clocks: dict[int, tuple[Any, Any]] = {}
    for at, number in enumerate(rows["id"]):
        clocks[number] = np.array(rows["pose_t"][at]) * 1000, seconds_to_ns(np.array(rows["force_t"][at]))

    def same_values(batch: dict[str, Any]) -> None:
        for at, number in enumerate(rows["id"]):
            if number == 5:
                continue
            pose_t, force_t = clocks[number]
            check(batch, "pose", pose_t, np.array(rows["pose"][at]), offsets, "linear", episode=number)
            force = np.stack([rows["fx"][at], rows["fy"][at]], axis=1)
            check(batch, "force", force_t, force, offsets, "nearest", episode=number)

    batch = whole_epoch(loader_of(tmp_path, manifest, windows=windows, anchor_stream="pose"))
    wanted = [(number, int(t)) for number in (12, 7, 9) for t in clocks[number][0]]
    assert list(zip(batch["episode_index"].tolist(), batch["t_ns"].tolist(), strict=True)) == wanted
    same_values(batch)
    # Episodes start at the first stamp of any stream, and end at the last.
    spans = {number: (min(p[0], f[0]), max(p[-1], f[-1])) for number, (p, f) in clocks.items()}
    batch = whole_epoch(loader_of(tmp_path, manifest, windows=windows, anchors="episodes"))
    np.testing.assert_array_equal(batch["t_ns"], [spans[number][0] for number in (12, 7, 9)])
    np.testing.assert_array_equal(batch["frame_index"], [0, 0, 0])
    same_values(batch)
    batch = whole_epoch(loader_of(tmp_path, manifest, windows=windows, anchors=rc.Every(hz=40)))
    grid = [np.arange(spans[number][0], spans[number][1] + 1, 25_000_000) for number in (12, 7, 9)]
    np.testing.assert_array_equal(batch["t_ns"], np.concatenate(grid))
    np.testing.assert_array_equal(batch["frame_index"], np.concatenate([np.arange(len(g)) for g in grid]))
    same_values(batch)
    with pytest.raises((rc.RequestError, rc.DatasetError), match=r"anchor_stream=.*pose, force"):
        loader_of(tmp_path, manifest, windows=windows)


# One table, several instances, stamps out of order and equal.


def log_of_two_instances(tmp_path: Path) -> tuple[pa.Table, Any, Any, Any]:
    rng = np.random.default_rng(8)
    # Each stamp up to four times, and all of them shuffled.
    t_us = rng.permutation(np.repeat(np.arange(40) * 10_000 + 5_000_000, rng.integers(1, 5, 40)))
    instance = rng.integers(0, 2, len(t_us)).astype(np.uint8)
    x = rng.standard_normal((len(t_us), 2)).astype(np.float32)
    table = pa.table({"t": t_us, "I": instance, "x": x[:, 0], "y": x[:, 1], "n": np.arange(len(t_us))})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=13)
    return table, t_us, instance, x


@pytest.mark.parametrize("duplicates", ["last", "first", "mean"])
def test_a_filter_picks_instances_and_equal_stamps_are_settled_as_the_manifest_says(
    tmp_path: Path, sock: str, duplicates: str
) -> None:
    _, t_us, instance, x = log_of_two_instances(tmp_path)
    stream = {"file": "log.parquet", "time": {"column": "t", "unit": "us"}, "columns": ["x", "y"]}
    streams = {
        name: stream | {"where": {"I": which}, "order": "sort", "duplicates": duplicates}
        for name, which in [("even", 0), ("odd", 1)]
    }
    # Numbers of rows have no mean.
    settled = duplicates if duplicates != "mean" else "last"
    streams["row"] = streams["even"] | {"columns": ["n"], "duplicates": settled}
    manifest = {"layout": "streams", "streams": streams}
    for name, which in [("even", 0), ("odd", 1)]:
        windows = {name: rc.Window(at=[0.0])} | ({"row": rc.Window(at=[0.0])} if name == "even" else {})
        batch = whole_epoch(loader_of(tmp_path, manifest, windows=windows, anchor_stream=name))
        own = np.flatnonzero(instance == which)
        order = own[np.argsort(t_us[own], kind="stable")]
        stamps = np.unique(t_us[own])
        runs = [order[t_us[order] == stamp] for stamp in stamps]
        assert max(len(run) for run in runs) > 1
        np.testing.assert_array_equal(batch["t_ns"], stamps * 1000)
        pick = {"last": -1, "first": 0}
        if duplicates == "mean":
            wanted = np.stack([x[run].astype(np.float64).mean(axis=0) for run in runs]).astype(np.float32)
        else:
            wanted = np.stack([x[run[pick[duplicates]]] for run in runs])
        np.testing.assert_array_equal(batch[name][:, 0], wanted)
        if name == "even":
            np.testing.assert_array_equal(batch["row"][:, 0], [run[pick[settled]] for run in runs])


def test_stamps_that_run_backwards_or_repeat_are_errors_that_name_file_row_and_stamps(
    tmp_path: Path, sock: str
) -> None:
    t_ns = np.arange(10) * 1_000_000
    pq.write_table(pa.table({"t": t_ns, "x": np.arange(10.0)}), tmp_path / "good.parquet")
    backwards, twice = t_ns.copy(), t_ns.copy()
    backwards[6], twice[4] = 1_500_000, 3_000_000
    pq.write_table(pa.table({"t": backwards, "x": np.arange(10.0)}), tmp_path / "backwards.parquet")
    pq.write_table(pa.table({"t": twice, "x": np.arange(10.0)}), tmp_path / "twice.parquet")
    time = {"column": "t", "unit": "ns"}
    manifest = {
        "layout": "streams",
        "streams": {
            "good": {"file": "good.parquet", "time": time, "columns": ["x"]},
            "backwards": {"file": "backwards.parquet", "time": time, "columns": ["x"]},
            "twice": {"file": "twice.parquet", "time": time, "columns": ["x"], "duplicates": "error"},
        },
    }
    for key, message in [
        ("backwards", r"(?s)backwards\.parquet.*row 6.*5000000.*1500000.*sort"),
        ("twice", r"(?s)twice\.parquet.*3 and 4.*3000000"),
    ]:
        with pytest.raises(rc.DatasetError, match=message):
            next(
                iter(loader_of(tmp_path, manifest, windows={key: rc.Window(at=[0.0])}, anchor_stream="good"))
            )
    # What is not asked for does not stand in the way.
    windows = {"good": rc.Window(at=[0.0])}
    batch = whole_epoch(loader_of(tmp_path, manifest, windows=windows, anchor_stream="good"))
    np.testing.assert_array_equal(batch["good"][:, 0], np.arange(10.0))


# By name.


def test_a_dataset_is_served_by_name(data: Path, daemon_program: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    daemon = Daemon(daemon_program, tmp_path, "--dataset", f"pick={data / 'g1_v30_conv'}")
    try:
        windows = {"action": rc.Window(hz=30, steps=2)}
        arguments: dict[str, Any] = {"windows": windows, "episodes": [3], "socket": daemon.socket}
        by_name = whole_epoch(loader_of("pick", **arguments))
        by_path = whole_epoch(loader_of(data / "g1_v30_conv", **arguments))
        assert len(by_name["index"]) == 459
        for key, value in by_path.items():
            np.testing.assert_array_equal(by_name[key], value, err_msg=key)
        # A state belongs to the dataset, however it was named.
        loader = loader_of("pick", **arguments)
        next(iter(loader))
        other = loader_of(data / "g1_v30_conv", **arguments)
        other.load_state_dict(loader.state_dict())
        np.testing.assert_array_equal(next(iter(other))["index"], by_path["index"][32:64])
        with pytest.raises((rc.RequestError, rc.DatasetError), match="pick"):
            loader_of("place", **arguments)
        del loader, other
    finally:
        daemon.stop()
    assert daemon.process.returncode == 0, "".join(daemon.log)
