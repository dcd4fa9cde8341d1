"""Several clocks on one: real recordings against a float64 reference on integer nanoseconds (reference.py).

Nearest, previous and masks must be exact (after the cast to float32); linear within 2 float32 ulps of the
larger neighbour; slerp within 4 ulps of 1, since its reference goes through an arc cosine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from epochs import check, rows_of, whole_epoch
from reference import offsets_to_ns, resample, seconds_to_ns

import robocache as rc

COMMA = {
    "acceleration": ("imu_accelerometer", ["value"], "linear"),
    "wheels": ("can_wheel_speed", ["value"], "linear"),
    "steering": ("can_steering_angle", ["value"], "previous"),
    "position": ("camera_frame_pose", ["frame_positions"], "nearest"),
    "orientation": ("camera_frame_pose", ["frame_orientations"], "slerp"),
}


def test_a_drives_imu_wheels_steering_and_camera_pose_on_one_50_hz_clock(data: Path, sock: str) -> None:
    folder = data / "comma2k19_seg" / "parquet"
    manifest = {
        "layout": "streams",
        "streams": {
            key: {
                "file": f"{file}.parquet",
                "time": {"column": "t", "unit": "s"},
                "columns": columns,
                "interp": interp,
            }
            for key, (file, columns, interp) in COMMA.items()
        },
    }
    offsets = [-0.04, -0.02, 0.0, 0.02, 0.1]
    loader = rc.DataLoader(
        folder,
        manifest=manifest,
        batch_size=256,
        windows={key: rc.Window(at=offsets, max_gap=0.05005 if key == "position" else None) for key in COMMA},
        anchors=rc.Every(hz=50),
        framework="numpy",
        shuffle=False,
    )
    batch = whole_epoch(loader)
    streams = {}
    for key, (file, columns, _) in COMMA.items():
        table = pq.read_table(folder / f"{file}.parquet")
        streams[key] = seconds_to_ns(table["t"].to_numpy()), rows_of(table, columns)
    first = min(stamps[0] for stamps, _ in streams.values())
    last = max(stamps[-1] for stamps, _ in streams.values())
    # The episode's whole span, start included.
    np.testing.assert_array_equal(batch["t_ns"], np.arange(first, last + 1, 20_000_000))
    padded = {}
    for key, (_, _, interp) in COMMA.items():
        stamps, rows = streams[key]
        padded[key] = check(batch, key, stamps, rows, offsets, interp, 0.05005 if key == "position" else None)
    # The camera's own jitter goes past 50.05 ms, or max_gap would go untested.
    assert padded["position"] > padded["orientation"] > 0


def husky_manifest(suffix: str) -> dict[str, Any]:
    time = {"column": "header.stamp_ns", "unit": "ns"}
    return {
        "layout": "streams",
        "streams": {
            "gyro": {
                "file": f"imu_data.{suffix}",
                "time": time,
                "columns": [f"angular_velocity.{axis}" for axis in "xyz"],
            },
            "imu_attitude": {
                "file": f"imu_data.{suffix}",
                "time": time,
                "columns": [f"orientation.{axis}" for axis in "xyzw"],
                "interp": "slerp",
            },
            "odometry": {
                "file": f"husky_velocity_controller_odom.{suffix}",
                "time": time,
                "columns": ["pose.pose.position.x", "pose.pose.position.y", "twist.twist.linear.x"],
            },
            "gps": {
                "file": f"fix.{suffix}",
                "time": time,
                "columns": ["latitude", "longitude", "altitude"],
            },
            "gps_status": {"file": f"fix.{suffix}", "time": time, "columns": ["status.status"]},
        },
    }


def test_a_huskys_imu_odometry_and_gps_at_20_hz_are_the_same_from_parquet_and_arrow(
    data: Path, sock: str
) -> None:
    folder = data / "husky_outdoor" / "data"
    offsets = [-0.5, -0.05, 0.0, 0.05]
    batches = {}
    for suffix in ("parquet", "arrow"):
        loader = rc.DataLoader(
            folder,
            manifest=husky_manifest(suffix),
            batch_size=512,
            windows={
                "gyro": rc.Window(at=offsets),
                "imu_attitude": rc.Window(at=offsets),
                "odometry": rc.Window(at=offsets, interp="linear"),
                "gps": rc.Window(at=offsets, interp="nearest"),
                "gps_status": rc.Window(at=offsets),
            },
            anchors=rc.Every(hz=20),
            dtype={"gps": "float64"},
            framework="numpy",
            shuffle=False,
        )
        batches[suffix] = whole_epoch(loader)
    parquet, arrow = batches["parquet"], batches["arrow"]
    assert parquet.keys() == arrow.keys()
    for key, value in parquet.items():
        assert value.dtype == arrow[key].dtype
        np.testing.assert_array_equal(value.view(np.uint8), arrow[key].view(np.uint8), err_msg=key)

    imu = pq.read_table(folder / "imu_data.parquet")
    odometry = pq.read_table(folder / "husky_velocity_controller_odom.parquet")
    fix = pq.read_table(folder / "fix.parquet")
    stamps = {
        name: table["header.stamp_ns"].to_numpy()
        for name, table in {"imu": imu, "odometry": odometry, "fix": fix}.items()
    }
    first, last = min(s[0] for s in stamps.values()), max(s[-1] for s in stamps.values())
    np.testing.assert_array_equal(parquet["t_ns"], np.arange(first, last + 1, 50_000_000))
    streams = husky_manifest("parquet")["streams"]
    for key, table, clock, interp in [
        ("gyro", imu, "imu", "linear"),
        ("imu_attitude", imu, "imu", "slerp"),
        ("odometry", odometry, "odometry", "linear"),
    ]:
        check(parquet, key, stamps[clock], rows_of(table, streams[key]["columns"]), offsets, interp)
    # Integers stay integers, and doubles asked for as such are exact.
    rows = rows_of(fix, ["status.status"])
    assert parquet["gps_status"].dtype == np.int64
    assert parquet["gps"].dtype == np.float64
    for step, offset_ns in enumerate(offsets_to_ns(offsets)):
        targets = parquet["t_ns"] + offset_ns
        wanted = resample(stamps["fix"], rows, targets, "previous")
        found = parquet["gps_status"].reshape(len(targets), len(offsets))
        np.testing.assert_array_equal(found[:, step], wanted.values[:, 0].astype(np.int64))
        np.testing.assert_array_equal(parquet["gps_status_is_pad"][:, step], wanted.pad)
        wanted = resample(stamps["fix"], rows_of(fix, streams["gps"]["columns"]), targets, "nearest")
        np.testing.assert_array_equal(parquet["gps"][:, step], wanted.values)


def px4_manifest(**more: dict[str, Any]) -> dict[str, Any]:
    time = {"column": "timestamp", "unit": "us"}
    attitude = "vehicle_attitude_0.parquet"
    return {
        "layout": "streams",
        "streams": {
            "attitude": {
                "file": attitude,
                "time": time,
                "columns": [f"q[{i}]" for i in range(4)],
                "interp": "slerp",
            },
            "rates": {
                "file": attitude,
                "time": time,
                "columns": ["rollspeed", "pitchspeed", "yawspeed"],
            },
            "gyro": {
                "file": "sensor_combined_0.parquet",
                "time": time,
                "columns": [f"gyro_rad[{i}]" for i in range(3)],
            },
            **more,
        },
    }


def test_a_flights_attitude_by_slerp_and_rates_by_linear(data: Path, sock: str) -> None:
    folder = data / "px4_auavx21" / "parquet"
    offsets = [0.0, 0.004, 0.0131]
    loader = rc.DataLoader(
        folder,
        manifest=px4_manifest(),
        batch_size=1000,
        windows={
            "attitude": rc.Window(at=offsets, max_gap=0.05),
            "rates": rc.Window(at=offsets, interp="linear"),
            "gyro": rc.Window(at=offsets, interp="nearest"),
        },
        anchors="frames",
        anchor_stream="gyro",
        framework="numpy",
        shuffle=False,
    )
    batch = whole_epoch(loader)
    attitude = pq.read_table(folder / "vehicle_attitude_0.parquet")
    sensor = pq.read_table(folder / "sensor_combined_0.parquet")
    slow, fast = (table["timestamp"].to_numpy().astype(np.int64) * 1000 for table in (attitude, sensor))
    np.testing.assert_array_equal(batch["t_ns"], fast)
    padded = check(
        batch, "attitude", slow, rows_of(attitude, [f"q[{i}]" for i in range(4)]), offsets, "slerp", 0.05
    )
    assert padded > 0
    norms = np.linalg.norm(batch["attitude"].astype(np.float64), axis=-1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)
    check(batch, "rates", slow, rows_of(attitude, ["rollspeed", "pitchspeed", "yawspeed"]), offsets, "linear")
    check(batch, "gyro", fast, rows_of(sensor, [f"gyro_rad[{i}]" for i in range(3)]), offsets, "nearest")


@pytest.mark.parametrize("file", ["commander_state_0", "ekf2_innovations_0", "sensor_preflight_0"])
def test_a_clock_that_stands_still_is_an_error_that_names_the_cure(data: Path, sock: str, file: str) -> None:
    folder = data / "px4_auavx21" / "parquet"
    table = pq.read_table(folder / f"{file}.parquet")
    assert len(set(table["timestamp"].to_pylist())) == 1
    column = next(field.name for field in table.schema if field.name != "timestamp")
    stream = {"file": f"{file}.parquet", "time": {"column": "timestamp", "unit": "us"}, "columns": [column]}

    def first_batch(**windows: rc.Window) -> rc.Batch:
        loader = rc.DataLoader(
            folder,
            manifest=px4_manifest(dead=stream),
            windows=windows,
            anchor_stream="rates",
            framework="numpy",
        )
        return next(iter(loader))

    with pytest.raises(rc.DatasetError, match=rf"(?s){file}\.parquet.*rate"):
        first_batch(dead=rc.Window(at=[0.0]), rates=rc.Window(at=[0.0]))
