"""The loader's arguments, checked and made into the wire's `LoaderSpec`, which travels as JSON.

Only what is wrong whatever the dataset is refused here, early and without a daemon; the daemon judges the
rest.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from ._errors import RequestError
from ._window import Every, Window, _finite

PathArg: TypeAlias = "str | os.PathLike[str]"
Windows: TypeAlias = "Mapping[str, Window]"
StreamOffsets: TypeAlias = "Mapping[str, Iterable[float]]"
AnchorsArg: TypeAlias = "str | Every"
DTypeArg: TypeAlias = "str | Mapping[str, str]"

DTYPES = ("float32", "bfloat16", "float16", "float64")


def loader_spec(
    path_or_name: PathArg,
    *,
    batch_size: int,
    windows: Windows | None,
    delta_timestamps: StreamOffsets | None,
    features: Iterable[str] | None,
    manifest: PathArg | Mapping[str, Any] | None,
    anchors: AnchorsArg,
    anchor_stream: str | None,
    device: str,
    dtype: DTypeArg,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    episodes: Iterable[int] | None,
    rank: int,
    world_size: int,
    slots: int,
) -> tuple[dict[str, Any], str | None]:
    """The spec as JSON-able values; apart from it, as JSON, a manifest that was a dict (it becomes TOML)."""
    if windows is not None and delta_timestamps is not None:
        raise RequestError("windows= and delta_timestamps= say the same thing in two ways: give one of them")
    default, dtypes = _dtype(dtype)
    text, as_json = _manifest(manifest)
    spec = {
        "dataset": _dataset(path_or_name),
        "manifest": text,
        "batch_size": _count("batch_size", batch_size, 1, 2**32),
        "windows": None if windows is None else _windows(windows),
        "delta_timestamps": None if delta_timestamps is None else _deltas(delta_timestamps),
        "features": None if features is None else _names("features", features),
        "anchors": _anchors(anchors),
        "anchor_stream": None if anchor_stream is None else _name("anchor_stream", anchor_stream),
        "dtype": default,
        "dtypes": dtypes,
        "device": device,
        "shuffle": _flag("shuffle", shuffle),
        "seed": _count("seed", seed, 0, 2**64),
        "drop_last": _flag("drop_last", drop_last),
        "episodes": None if episodes is None else _episodes(episodes),
        "rank": rank,
        "world_size": world_size,
        "slots": _count("slots", slots, 2, 2**16),
    }
    return spec, as_json


def distributed(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This rank: as given, else torch.distributed's, else the environment's (torchrun), else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise RequestError(
            f"rank= and world_size= go together, found rank={rank!r}, world_size={world_size!r}"
        )
    if rank is None or world_size is None:
        # Not imported here: where nobody imported it, nobody initialised it.
        group = sys.modules.get("torch.distributed")
        if group is not None and group.is_available() and group.is_initialized():
            return int(group.get_rank()), int(group.get_world_size())
        found = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if found == (None, None):
            return 0, 1
        try:
            rank, world_size = int(found[0] or ""), int(found[1] or "")
        except ValueError as error:
            raise RequestError(
                f"the environment's RANK and WORLD_SIZE must be whole numbers, both or neither; found "
                f"RANK={found[0]!r}, WORLD_SIZE={found[1]!r}: set both or none, or give rank= and world_size="
            ) from error
    world_size = _count("world_size", world_size, 1, 2**32)
    rank = _count("rank", rank, 0, 2**32)
    if rank >= world_size:
        raise RequestError(f"rank must be below world_size={world_size}, found {rank}; ranks count from 0")
    return rank, world_size


def _dataset(path_or_name: PathArg) -> dict[str, str]:
    if not isinstance(path_or_name, (str, os.PathLike)):
        raise RequestError(f"the dataset must be a path or a name, found {path_or_name!r}")
    text = os.fspath(path_or_name)
    if not isinstance(text, str) or not text:
        raise RequestError(f"the dataset must be a path or a name, found {path_or_name!r}")
    home = os.path.expanduser(text)
    if not isinstance(path_or_name, str) or "/" in text or home != text or os.path.exists(home):
        return {"path": os.path.abspath(home)}
    return {"name": text}


def _manifest(manifest: PathArg | Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    if manifest is None:
        return None, None
    if isinstance(manifest, Mapping):
        try:
            return None, json.dumps(manifest, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"the manifest must be of tables, lists, text, numbers and booleans: {error}"
            ) from error
    if not isinstance(manifest, (str, os.PathLike)):
        raise RequestError(f"manifest must be a path or a dict, found {manifest!r}")
    path = os.path.expanduser(os.fspath(manifest))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"cannot read the manifest {path!r}: {error}; manifest= takes the path of a TOML file, or a dict"
        ) from error


def _windows(windows: Windows) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(windows, Mapping):
        raise RequestError(f"windows must be a dict of stream name to Window, found {windows!r}")
    for key, window in windows.items():
        if not isinstance(window, Window):
            raise RequestError(f"windows[{key!r}] must be a robocache.Window, found {window!r}")
    return [(_name("windows", key), window._spec()) for key, window in windows.items()]


def _deltas(deltas: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    if not isinstance(deltas, Mapping):
        raise RequestError(f"delta_timestamps must be a dict of stream name to seconds, found {deltas!r}")
    made = []
    for key, offsets in deltas.items():
        if isinstance(offsets, str) or not hasattr(offsets, "__iter__"):
            raise RequestError(f"delta_timestamps[{key!r}] must be a list of seconds, found {offsets!r}")
        seconds = [_finite(f"delta_timestamps[{key!r}]", offset, "seconds") for offset in offsets]
        if not seconds:
            raise RequestError(f"delta_timestamps[{key!r}] is empty: give [0.0], or leave the key out")
        made.append((_name("delta_timestamps", key), seconds))
    return made


def _anchors(anchors: AnchorsArg) -> str | dict[str, dict[str, float]]:
    if isinstance(anchors, Every):
        return {"every": {"hz": anchors.hz}}
    if anchors in ("frames", "episodes"):
        return anchors
    raise RequestError(f'anchors must be "frames", "episodes" or robocache.Every(hz=), found {anchors!r}')


def _dtype(dtype: DTypeArg) -> tuple[str, list[tuple[str, str]]]:
    if isinstance(dtype, Mapping):
        named = {_name("dtype", key): _one_dtype(f"dtype[{key!r}]", value) for key, value in dtype.items()}
        return named.pop("default", "float32"), list(named.items())
    return _one_dtype("dtype", dtype), []


def _one_dtype(what: str, dtype: Any) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RequestError(f"{what} must be one of {', '.join(DTYPES)} (as text), found {dtype!r}")
    return dtype


def _episodes(episodes: Iterable[int]) -> list[int]:
    if isinstance(episodes, (str, bytes)) or not hasattr(episodes, "__iter__"):
        raise RequestError(f"episodes must be a list of episode_index values, found {episodes!r}")
    chosen = list(episodes)
    for value in chosen:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise RequestError(f"episodes must be whole numbers (episode_index values), found {value!r}")
    if not chosen:
        raise RequestError(
            "episodes is empty, so there would be nothing to load: leave it out for all episodes"
        )
    return [value.__index__() for value in chosen]


def _names(what: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not hasattr(names, "__iter__"):
        raise RequestError(f"{what} must be a list of stream names, found {names!r}")
    return [_name(what, name) for name in names]


def _name(what: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise RequestError(f"{what} must name streams, found {name!r}")
    return name


def _flag(what: str, value: Any) -> bool:
    if value is True or value is False:
        return bool(value)
    raise RequestError(f"{what} must be True or False, found {value!r}")


def _count(what: str, value: Any, least: int, limit: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{what} must be a whole number, found {value!r}")
    number = int(value.__index__())
    if not least <= number < limit:
        raise RequestError(f"{what} must be at least {least} and below {limit}, found {number}")
    return number
