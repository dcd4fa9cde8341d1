"""Arguments that cannot be are refused early: with what was wanted, what was found, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robocache as rc
from robocache._spec import distributed, loader_spec

ARGUMENTS: dict[str, Any] = {
    "batch_size": 64,
    "windows": None,
    "delta_timestamps": None,
    "features": None,
    "manifest": None,
    "anchors": "frames",
    "anchor_stream": None,
    "device": "cpu",
    "dtype": "float32",
    "shuffle": True,
    "seed": 0,
    "drop_last": False,
    "episodes": None,
    "rank": 0,
    "world_size": 1,
    "slots": 4,
}


def spec(path: Any = "/data", **changed: Any) -> tuple[dict[str, Any], str | None]:
    return loader_spec(path, **(ARGUMENTS | changed))


def test_the_arguments_become_the_wires_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    made, manifest = spec(
        "here",
        windows={
            "state": rc.Window(hz=30, steps=2, start=-1 / 30),
            "grip": rc.Window(at=[0], interp="previous"),
        },
        anchors=rc.Every(hz=10),
        dtype={"default": "float16", "action": "bfloat16"},
        episodes=range(3),
        features=("task",),
        seed=np.int64(7),
    )
    assert manifest is None
    assert made["dataset"] == {"path": str(tmp_path / "here")}
    assert made["windows"] == [
        (
            "state",
            {
                "offsets": {"grid": {"hz": 30.0, "steps": 2, "start": -1 / 30}},
                "interp": None,
                "max_gap": None,
            },
        ),
        ("grip", {"offsets": {"at": [0.0]}, "interp": "previous", "max_gap": None}),
    ]
    assert made["anchors"] == {"every": {"hz": 10.0}}
    assert (made["dtype"], made["dtypes"]) == ("float16", [("action", "bfloat16")])
    assert (made["episodes"], made["features"], made["seed"]) == ([0, 1, 2], ["task"], 7)
    assert spec("served-name")[0]["dataset"] == {"name": "served-name"}
    assert spec("sub/dir")[0]["dataset"] == {"path": str(tmp_path / "sub/dir")}
    assert spec(Path("p"))[0]["dataset"] == {"path": str(tmp_path / "p")}


def test_a_manifest_is_a_file_or_a_dict(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('layout = "streams"\n')
    made, as_json = spec(manifest=file)
    assert (made["manifest"], as_json) == ('layout = "streams"\n', None)
    made, as_json = spec(manifest={"layout": "frames", "frames": {"files": "*.parquet"}})
    assert made["manifest"] is None
    assert as_json == '{"layout": "frames", "frames": {"files": "*.parquet"}}'
    with pytest.raises(rc.RequestError, match=r"cannot read the manifest .*nothing\.toml.*takes the path"):
        spec(manifest=tmp_path / "nothing.toml")
    with pytest.raises(rc.RequestError, match="tables, lists"):
        spec(manifest={"layout": object()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1 .* found 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, found 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, found True"),
        ({"windows": {"a": 3}}, r"windows\['a'\] must be a robocache.Window, found 3"),
        ({"windows": [1]}, "windows must be a dict"),
        ({"windows": {}, "delta_timestamps": {}}, "give one of them"),
        ({"delta_timestamps": {"a": []}}, r"delta_timestamps\['a'\] is empty"),
        ({"delta_timestamps": {"a": [float("nan")]}}, "finite number of seconds, found nan"),
        ({"delta_timestamps": {"a": "0.1"}}, "must be a list of seconds, found '0.1'"),
        ({"features": "task"}, "features must be a list of stream names, found 'task'"),
        ({"anchors": "frame"}, '"frames", "episodes" or robocache.Every.*found \'frame\''),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, float64 .* found 'float8'"),
        ({"dtype": {"a": "int32"}}, r"dtype\['a'\] must be one of .* found 'int32'"),
        ({"shuffle": 1}, "shuffle must be True or False, found 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
        ({"episodes": []}, "episodes is empty.*leave it out"),
        ({"episodes": [1.5]}, "episode_index values.* found 1.5"),
        ({"episodes": "all"}, "list of episode_index values, found 'all'"),
        ({"slots": 1}, "slots must be at least 2"),
        ({"manifest": 7}, "manifest must be a path or a dict, found 7"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(rc.RequestError, match=message) as caught:
        spec(**changed)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, rc.RoboCacheError)


@pytest.mark.parametrize("path", [None, 7, "", b"bytes"])
def test_a_dataset_is_a_path_or_a_name(path: Any) -> None:
    with pytest.raises(rc.RequestError, match="must be a path or a name"):
        spec(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs hz= and steps=, or at="),
        ({"hz": 30}, "needs hz= and steps="),
        ({"hz": 0, "steps": 1}, "hz must be positive, found 0"),
        ({"hz": float("inf"), "steps": 1}, "finite number of steps a second, found inf"),
        ({"hz": "30", "steps": 1}, "hz must be a number of steps a second, found '30'"),
        ({"hz": 30, "steps": 0}, "steps must be at least 1, found 0"),
        ({"hz": 30, "steps": 1.5}, "whole number, found 1.5"),
        ({"hz": 30, "steps": 1, "start": float("nan")}, "start must be a finite"),
        ({"hz": 30, "steps": 1, "at": [0.0]}, "either at= or hz=.*found both"),
        ({"at": []}, "at least one offset"),
        ({"at": 0.5}, "sequence of seconds, found 0.5"),
        ({"at": [None]}, "at must be a number of seconds, found None"),
        ({"at": [0.0], "interp": "cubic"}, "linear, nearest, previous, slerp, found 'cubic'"),
        ({"at": [0.0], "max_gap": 0}, "max_gap must be positive"),
    ],
)
def test_a_window_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(rc.RequestError, match=message):
        rc.Window(**arguments)


def test_windows_and_grids_are_values() -> None:
    assert rc.Window(30, 2) == rc.Window(hz=30.0, steps=2, start=0)
    assert rc.Window(at=(0, 1)) == rc.Window(at=np.array([0.0, 1.0]))
    assert len({rc.Window(30, 2), rc.Window(30, 2), rc.Window(30, 3)}) == 2
    assert (
        repr(rc.Window(50, 3, -0.5, interp="nearest"))
        == "Window(hz=50, steps=3, start=-0.5, interp='nearest')"
    )
    assert repr(rc.Window(at=[0, 0.25], max_gap=1)) == "Window(at=[0.0, 0.25], max_gap=1)"
    with pytest.raises(AttributeError):
        rc.Window(30, 2).hz = 4  # type: ignore[misc]
    with pytest.raises(rc.RequestError, match="positive"):
        rc.Every(hz=-1)


def test_the_rank_is_as_given_else_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed(None, None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(rc.RequestError, match="both or neither; found RANK='3', WORLD_SIZE=None"):
        distributed(None, None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed(None, None) == (3, 8)
    assert distributed(1, 2) == (1, 2)
    with pytest.raises(rc.RequestError, match="go together"):
        distributed(1, None)
    with pytest.raises(rc.RequestError, match="rank must be below world_size=2, found 2"):
        distributed(2, 2)


def test_a_framework_is_one_that_can_be_imported() -> None:
    with pytest.raises(rc.RequestError, match="torch, jax, numpy, found 'tensorflow'"):
        rc.DataLoader("x", framework="tensorflow")


def test_the_dataset_is_the_only_positional_argument() -> None:
    with pytest.raises(TypeError, match="positional"):
        rc.DataLoader("x", 64)  # type: ignore[misc]
