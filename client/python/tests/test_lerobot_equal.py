"""Against LeRobot itself: `g1_v21` and `g1_v30_conv` deliver what `LeRobotDataset` 0.4.4 does, bit for bit.

All 35,965 frames are compared with what the package's own `_get_query_indices` selects from its own
`hf_dataset` columns, fetched in bulk (`dataset[i]` takes 12 ms, so all of them 7 minutes); 2,000 random ones
with `dataset[i]` itself. ROBOCACHE_TEST_EVERY_ITEM=1 takes `dataset[i]` for all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import robocache as rc

FRAMES = 35_965
DELTAS = {"observation.state": [-1 / 30, 0.0], "action": [step / 30 for step in range(50)]}
INDICES = ["index", "episode_index", "frame_index", "task_index", "timestamp"]

Arrays = dict[str, npt.NDArray[Any]]


def epoch_of(path: Path, **arguments: Any) -> Arrays:
    """A whole epoch in memory, rows in the order of `index`."""
    columns: Arrays = {}
    row = 0
    with rc.DataLoader(
        path, batch_size=512, delta_timestamps=DELTAS, framework="numpy", slots=4, **arguments
    ) as loader:
        for batch in loader:
            for key, value in batch.items():
                array = np.array(value, dtype=object) if isinstance(value, list) else value
                if key not in columns:
                    columns[key] = np.empty((FRAMES, *array.shape[1:]), array.dtype)
                columns[key][row : row + len(array)] = array
            row += len(batch["index"])
    assert row == FRAMES
    order = np.argsort(columns["index"], kind="stable")
    for key in columns:
        columns[key] = columns[key][order]
    np.testing.assert_array_equal(columns["index"], np.arange(FRAMES))
    return columns


@pytest.fixture(scope="module")
def v30(data: Path, daemon: Any) -> Arrays:
    return epoch_of(data / "g1_v30_conv", socket=daemon.socket, shuffle=True, seed=3)


@pytest.fixture(scope="module")
def lerobot(data: Path) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/g1", root=data / "g1_v30_conv", delta_timestamps=DELTAS)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*video:robocache.RoboCacheWarning")
def test_version_21_and_version_30_give_the_same_batches_bit_for_bit(
    data: Path, daemon: Any, v30: Arrays
) -> None:
    # The declared video of v2.1 has no files, which is a warning; a key of its own it must not be.
    v21 = epoch_of(data / "g1_v21", socket=daemon.socket, shuffle=True, seed=4)
    assert v21.keys() == v30.keys()
    for key, found in v21.items():
        assert found.dtype == v30[key].dtype, key
        if found.dtype == object:
            assert (found == v30[key]).all(), key
        else:
            np.testing.assert_array_equal(found.view(np.uint8), v30[key].view(np.uint8), err_msg=key)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_every_frame_equals_what_lerobot_selects(lerobot: Any, v30: Arrays) -> None:
    table = lerobot.hf_dataset.with_format("numpy")
    columns = {key: np.asarray(table[:][key]) for key in [*DELTAS, *INDICES]}
    for key in INDICES:
        np.testing.assert_array_equal(v30[key], columns[key], err_msg=key)
    query: dict[str, npt.NDArray[np.int64]] = {
        key: np.empty((FRAMES, len(deltas)), np.int64) for key, deltas in DELTAS.items()
    }
    pad = {key: np.empty((FRAMES, len(deltas)), bool) for key, deltas in DELTAS.items()}
    for i, episode in enumerate(columns["episode_index"]):
        indices, padding = lerobot._get_query_indices(i, int(episode))
        for key in DELTAS:
            query[key][i] = indices[key]
            pad[key][i] = padding[f"{key}_is_pad"].numpy()
    for key in DELTAS:
        assert v30[key].dtype == np.float32
        np.testing.assert_array_equal(v30[f"{key}_is_pad"], pad[key], err_msg=key)
        for start in range(0, FRAMES, 4096):
            rows = slice(start, start + 4096)
            wanted = columns[key][query[key][rows]]
            np.testing.assert_array_equal(v30[key][rows].view(np.uint32), wanted.view(np.uint32), err_msg=key)
        assert 0 < pad[key].sum() < pad[key].size


@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_lerobots_own_items_equal_ours(lerobot: Any, v30: Arrays) -> None:
    everything = os.environ.get("ROBOCACHE_TEST_EVERY_ITEM") == "1"
    rng = np.random.default_rng(0)
    chosen = np.arange(FRAMES) if everything else rng.choice(FRAMES, 2000, replace=False)
    for i in chosen:
        item = lerobot[int(i)]
        for key, wanted in item.items():
            found = v30[key][i]
            if isinstance(wanted, str):
                assert found == wanted
            else:
                # LeRobot's own dtypes: float32, int64, bool.
                assert str(wanted.dtype).removeprefix("torch.") == v30[key].dtype.name, key
                np.testing.assert_array_equal(found, wanted.numpy(), err_msg=f"{key} of {i}")
