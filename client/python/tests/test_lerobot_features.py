"""LeRobot datasets with every kind of feature: scalars, vectors, matrices, float64, uint8, booleans, text.

The v3.0 one is written by LeRobot itself and compared with what it reads back; v2.0 and v2.1 are written
here, by the description of the format, and compared with the arrays they were written from.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from epochs import whole_epoch

import robocache as rc

FPS = 10
LENGTHS = [7, 2, 12]
TASKS = ["Pick the cube.", "Place it \u2013 gently."]
FEATURES: dict[str, dict[str, Any]] = {
    "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
    "action": {"dtype": "float64", "shape": (2,), "names": None},
    "observation.tactile": {"dtype": "float32", "shape": (2, 3), "names": None},
    "next.reward": {"dtype": "float64", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "grip": {"dtype": "uint8", "shape": (1,), "names": None},
    "note": {"dtype": "string", "shape": (1,), "names": None},
}
DELTAS = {
    "observation.state": [-0.1, 0.0],
    "action": [0.0, 0.1, 0.5],
    "observation.tactile": [-0.2, 0.0],
    "next.done": [0.0, 0.3],
    "grip": [-0.3, 0.0],
}
#: What LeRobot widens on its own account (everything becomes float32 or int64); ours keep what is stored.
KEPT = {"grip": np.uint8}


def values() -> dict[str, Any]:
    """Every feature of all frames, in order."""
    rng, n = np.random.default_rng(11), sum(LENGTHS)
    return {
        "observation.state": rng.standard_normal((n, 3)).astype(np.float32),
        "action": rng.standard_normal((n, 2)),
        "observation.tactile": rng.standard_normal((n, 2, 3)).astype(np.float32),
        "next.reward": rng.standard_normal(n),
        "next.done": rng.integers(0, 2, n).astype(bool),
        "grip": rng.integers(0, 256, n).astype(np.uint8),
        "note": [["", "slip", "contact \u00e9"][i] for i in rng.integers(0, 3, n)],
    }


def write_v2(root: Path, version: str) -> None:
    """By the description of the format, as its own writer of that time would: a file an episode."""
    made = values()
    features = {k: f | {"shape": list(f["shape"])} for k, f in FEATURES.items()}
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        dtype = "float32" if key == "timestamp" else "int64"
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    info = {
        "codebase_version": version,
        "robot_type": "made up",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "total_videos": 0,
        "total_chunks": 2,
        "chunks_size": 2,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").write_text("{}")
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    lines, start = [], 0
    for episode, length in enumerate(LENGTHS):
        task = episode % 2
        lines.append(json.dumps({"episode_index": episode, "tasks": [TASKS[task]], "length": length}) + "\n")
        rows = slice(start, start + length)
        columns: dict[str, Any] = {}
        for key, feature in FEATURES.items():
            part = made[key][rows]
            if len(feature["shape"]) == 2:
                columns[key] = pa.array(part.tolist(), pa.list_(pa.list_(pa.float32())))
            elif feature["shape"] != (1,):
                flat = pa.array(part.ravel())
                columns[key] = pa.FixedSizeListArray.from_arrays(flat, part.shape[1])
            else:
                columns[key] = pa.array(part)
        frames = np.arange(length)
        columns["timestamp"] = (frames / FPS).astype(np.float32)
        columns["frame_index"] = frames
        columns["episode_index"] = np.full(length, episode)
        columns["index"] = start + frames
        columns["task_index"] = np.full(length, task)
        file = root / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file, compression="snappy")
        start += length
    (root / "meta/episodes.jsonl").write_text("".join(lines))


def epoch_of(root: Path, **arguments: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"batch_size": 8, "framework": "numpy", "shuffle": False}
    return whole_epoch(rc.DataLoader(root, **(defaults | arguments)))


def check_values(batch: dict[str, Any]) -> None:
    made, n = values(), sum(LENGTHS)
    starts = np.repeat(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS)
    ends = np.repeat(np.cumsum(LENGTHS), LENGTHS)
    index = np.arange(n)
    np.testing.assert_array_equal(batch["index"], index)
    np.testing.assert_array_equal(batch["frame_index"], index - starts)
    np.testing.assert_array_equal(batch["episode_index"], np.repeat([0, 1, 2], LENGTHS))
    np.testing.assert_array_equal(batch["task_index"], np.repeat([0, 1, 0], LENGTHS))
    np.testing.assert_array_equal(batch["timestamp"], ((index - starts) / FPS).astype(np.float32))
    np.testing.assert_array_equal(batch["t_ns"], (index - starts) * 100_000_000)
    assert batch["task"].tolist() == [TASKS[i] for i in np.repeat([0, 1, 0], LENGTHS)]
    assert batch["note"].tolist() == made["note"]
    for key, feature in FEATURES.items():
        if key == "note":
            continue
        stored = np.asarray(made[key])
        wanted = stored.astype(np.float32) if feature["dtype"].startswith("float") else stored
        assert batch[key].dtype == wanted.dtype, key
        if key not in DELTAS:
            np.testing.assert_array_equal(batch[key], wanted, err_msg=key)
            continue
        for step, seconds in enumerate(DELTAS[key]):
            at = index + round(seconds * FPS)
            pad = (at < starts) | (at >= ends)
            np.testing.assert_array_equal(batch[f"{key}_is_pad"][:, step], pad, err_msg=key)
            held = wanted[np.clip(at, starts, ends - 1)]
            np.testing.assert_array_equal(batch[key][:, step], held, err_msg=key)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_features_of_every_kind_in_version_2(tmp_path: Path, sock: str, version: str) -> None:
    write_v2(tmp_path, version)
    batch = epoch_of(tmp_path, delta_timestamps=DELTAS)
    assert batch["observation.tactile"].shape == (21, 2, 2, 3)
    assert batch["next.reward"].shape == (21,)
    check_values(batch)
    # Doubles whole, where asked for; a mask of nothing but edges.
    made = values()
    batch = epoch_of(tmp_path, windows={"action": rc.Window(hz=FPS, steps=1)}, dtype={"action": "float64"})
    np.testing.assert_array_equal(batch["action"][:, 0], made["action"])
    # Matrices are interpolated element by element.
    batch = epoch_of(tmp_path, windows={"observation.tactile": rc.Window(at=[0.05])}, episodes=[0])
    rows = made["observation.tactile"][:7].astype(np.float64)
    halfway = (rows[:-1] + rows[1:]) / 2
    np.testing.assert_allclose(batch["observation.tactile"][:-1, 0], halfway, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(batch["observation.tactile"][-1, 0], made["observation.tactile"][6])
    np.testing.assert_array_equal(batch["observation.tactile_is_pad"][:, 0], [False] * 6 + [True])
    # Booleans and integers are held, never blended.
    windows = {"next.done": rc.Window(at=[0.05]), "grip": rc.Window(at=[0.09])}
    batch = epoch_of(tmp_path, windows=windows, episodes=[2])
    np.testing.assert_array_equal(batch["next.done"][:, 0], made["next.done"][9:])
    np.testing.assert_array_equal(batch["grip"][:, 0], made["grip"][9:])


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_dataset_that_lerobot_wrote_reads_as_lerobot_reads_it(tmp_path: Path, sock: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root, made, row = tmp_path / "made", values(), 0
    writer = LeRobotDataset.create("local/made", FPS, FEATURES, root=root, use_videos=False)
    for episode, length in enumerate(LENGTHS):
        for _ in range(length):
            frame = {key: made[key][row] for key in FEATURES if key != "note"}
            for key in ("next.reward", "next.done", "grip"):
                frame[key] = np.array([frame[key]])
            writer.add_frame(frame | {"note": made["note"][row], "task": TASKS[episode % 2]})
            row += 1
        writer.save_episode()
    writer.finalize()
    batch = epoch_of(root, delta_timestamps=DELTAS)
    check_values(batch)
    theirs = LeRobotDataset("local/made", root=root, delta_timestamps=DELTAS)
    assert len(theirs) == row
    for i in range(row):
        item = theirs[i]
        assert set(item) <= set(batch)
        for key, wanted in item.items():
            if isinstance(wanted, str):
                assert batch[key][i] == wanted, key
            else:
                dtype = str(wanted.dtype).removeprefix("torch.")
                assert batch[key].dtype == KEPT.get(key, np.dtype(dtype)), key
                np.testing.assert_array_equal(batch[key][i], wanted.numpy(), err_msg=f"{key} of {i}")
