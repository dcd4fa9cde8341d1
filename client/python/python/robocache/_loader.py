"""The dataloader: one per rank, a thin client of the daemon.

State has one owner here: `_position`, where the next batch not yet handed out begins. The native loader
follows it (a batch carries the position after it), and everything that moves it on purpose (`set_epoch`,
`load_state_dict`, a `for` after a `break`) goes through `_move`, which also ends the iterators that are out.

A process that did not attach itself (a forked child, an unpickled copy) attaches when it is first used.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from . import _device, _frameworks, _robocache
from ._batch import Batch
from ._daemon import for_embedded
from ._errors import DeviceRefused, LoaderClosed, RequestError, RoboCacheError, StateError
from ._spec import AnchorsArg, DTypeArg, PathArg, StreamOffsets, Windows, distributed, loader_spec

#: Version of what `state_dict` returns.
STATE_VERSION = 1


class RoboCacheWarning(UserWarning):
    """Something about the dataset that is worth knowing and stops nothing."""


class DataLoader:
    """Batches of a dataset, shuffled, resampled and collated by the daemon, read in place.

    Each `for` over the loader is one epoch and the next `for` the next epoch; a `for` left by `break` counts
    as that epoch. `len(loader)` is the number of batches in this rank's whole epoch.

    With `framework="torch"` the loader is an `IterableDataset` as well, for
    `torch.utils.data.DataLoader(loader, batch_size=None, num_workers=N)`: worker `w` of `n` then takes the
    share of rank `rank * n + w` of `world_size * n`, so that every sample comes exactly once. Workers that
    are started anew for each epoch begin where this process's loader stands, so call `set_epoch` before each
    `for`, as with torch's `DistributedSampler` (or say `persistent_workers=True`).

    On a GPU there is little for workers to do, since the daemon reads ahead by itself; where they are wanted
    they must be spawned (`multiprocessing_context="spawn"`), and copy their batches to hand them over. Leave
    `pin_memory` out: what is on a GPU cannot be pinned.

    Args:
        path_or_name: a dataset's directory or file, or the name of one the daemon serves. A string is a path
            if it exists or has a `/` in it.
        batch_size: samples in a batch, `B`.
        windows: stream name to `Window`; absent: every numeric stream at the anchor itself.
        delta_timestamps: LeRobot's own form, stream name to seconds, each taken as `round(dt * fps)` frames.
            Not together with `windows`.
        features: further streams to deliver at the anchor; absent: all with `delta_timestamps`, none with
            `windows`.
        manifest: path of a `robocache.toml`, or its content as a dict, for a dataset that carries none.
        anchors: `"frames"`, `"episodes"` or `Every(hz=)`: what the samples are built around.
        anchor_stream: the stream whose frames are the anchors, where the dataset has no frames of its own.
        device: `"cuda"`, the framework's current GPU; `"cuda:N"`, as this process counts; or `"cpu"`. Absent:
            `"cuda"` where torch (or JAX) has a GPU and the daemon too, else `"cpu"`; a daemon that lacks what
            the framework has is a `RoboCacheWarning`. Not with numpy.
        dtype: what floating streams are cast to, `"float32"`, `"bfloat16"`, `"float16"` or `"float64"`; or a
            dict of stream name to dtype, in which `"default"` stands for all others. Integers and booleans
            keep theirs. A name that no column of the batch has is an error.
        framework: `"torch"`, `"jax"` or `"numpy"`; absent: torch if it can be imported, else numpy. With JAX,
            64-bit columns are numpy arrays unless `jax_enable_x64` is set: JAX would cut them to 32 bits.
        shuffle: a new order each epoch, the same for the same `seed` and epoch.
        seed: of the order.
        drop_last: leave out what does not fill a batch on every rank.
        episodes: `episode_index` values to draw from; absent: all.
        rank, world_size: this process's share; both or neither. Absent: torch.distributed where it is
            initialised, else the environment's RANK and WORLD_SIZE, else one rank. Processes that must see
            the same batches (tensor or pipeline parallelism) say the same share and the same seed.
        slots: batches the ring holds; at least 2.
        socket: the daemon's; absent: $ROBOCACHE_SOCKET, the default path, else a daemon of this process's
            own.

    Raises:
        RequestError: an argument that cannot be (also a `ValueError`).
        DeviceError: a `RequestError`: the device cannot be had; says what is missing.
        DatasetError: the dataset is not there, broken, or lacks what was asked for.
        DaemonNotFound: no daemon answers and none could be started.
        ProtocolError: the daemon is of another version.
    """

    def __new__(cls, *_args: object, **kwargs: Any) -> DataLoader:
        if cls is DataLoader and _frameworks.choose(kwargs.get("framework")) == "torch":
            from .torch import TorchDataLoader

            cls = TorchDataLoader
        return object.__new__(cls)

    def __init__(
        self,
        path_or_name: PathArg,
        *,
        batch_size: int = 64,
        windows: Windows | None = None,
        delta_timestamps: StreamOffsets | None = None,
        features: list[str] | tuple[str, ...] | None = None,
        manifest: PathArg | Mapping[str, Any] | None = None,
        anchors: AnchorsArg = "frames",
        anchor_stream: str | None = None,
        device: Any = None,
        dtype: DTypeArg = "float32",
        framework: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        episodes: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        slots: int = 4,
        socket: PathArg | None = None,
    ) -> None:
        rank, world_size = distributed(rank, world_size)
        framework = _frameworks.choose(framework)
        device, assumed = _device.choose(device, framework)
        spec, manifest_text = loader_spec(
            path_or_name,
            batch_size=batch_size,
            windows=windows,
            delta_timestamps=delta_timestamps,
            features=features,
            manifest=manifest,
            anchors=anchors,
            anchor_stream=anchor_stream,
            device=device,
            dtype=dtype,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            episodes=episodes,
            rank=rank,
            world_size=world_size,
            slots=slots,
        )
        self._init(
            {
                "spec": spec,
                "manifest": manifest_text,
                "framework": framework,
                "assumed": assumed,
                "socket": None if socket is None else os.path.abspath(os.fspath(socket)),
            }
        )
        self._attach()

    def _init(self, made_of: dict[str, Any]) -> None:
        self._made_of = made_of
        self._position: tuple[int, int] = (0, 0)
        # Whether batches of the current epoch went to a `for` that has not come to its end.
        self._begun = False
        # Counts what ends the iterators that are out.
        self._run = 0
        self._closed = False
        self._told = False
        self._near: str | None = None
        self._finalizer: weakref.finalize[Any, DataLoader] | None = None
        self._forget()

    def _forget(self) -> None:
        """Not attached, in this process. A forked child lets go what it inherited, unfelt by its parent."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = None
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._native: _robocache.Loader | None = None
        self._info: dict[str, Any] = {}
        self._view: Any = None
        self._note: Any = None

    # Attaching

    def _shard(self) -> tuple[int, int]:
        """Rank and world size, of this process as it is now."""
        spec = self._made_of["spec"]
        return spec["rank"], spec["world_size"]

    def _attach(self) -> _robocache.Loader:
        """The native loader of this process, made if there is none."""
        if self._pid != os.getpid():
            # A forked child: what it inherited is the parent's, down to the state of the locks.
            self._forget()
        native = self._native
        if native is not None:
            return native
        with self._lock:
            if self._closed:
                raise LoaderClosed("this loader was closed; make a new one")
            if self._native is not None:
                return self._native
            native, refused = self._open()
            info = json.loads(native.info())
            gpu = info.get("gpu")
            cuda = gpu["ordinal"] if gpu and gpu["kind"] == "cuda" else None
            framework = self._made_of["framework"]
            dtypes = {column["name"]: column["dtype"] for column in info["columns"]}
            try:
                for key, _ in self._made_of["spec"]["dtypes"]:
                    if key not in dtypes:
                        raise RequestError(
                            f"dtype names {key!r}, which is no column of a batch: {', '.join(dtypes)}"
                        )
                self._view = _frameworks.view_for(framework, set(dtypes.values()), cuda is not None)
            except BaseException:
                native.close()
                raise
            self._note = _device.note_for(framework, cuda)
            self._info = info
            self._near = native.socket()
            self._native = native
            # Also at exit, so that an embedded daemon is stopped and its socket removed.
            self._finalizer = weakref.finalize(self, _close, native, os.getpid())
            told, self._told = self._told, True
        if not told:
            for text in info["warnings"]:
                warnings.warn(text, RoboCacheWarning, stacklevel=3)
        if refused is not None:
            warnings.warn(
                f"batches come in host memory, though {self._made_of['framework']} has a GPU: {refused}. Say "
                'device="cpu" if that is meant',
                RoboCacheWarning,
                stacklevel=3,
            )
        return native

    def _open(self) -> tuple[_robocache.Loader, DeviceRefused | None]:
        """A native loader; with it why it is not on the device that was assumed."""
        rank, world_size = self._shard()
        epoch, consumed = self._position
        spec = self._made_of["spec"] | {
            "rank": rank,
            "world_size": world_size,
            "start": {"epoch": epoch, "consumed": consumed},
        }

        def opened() -> _robocache.Loader:
            return _robocache.Loader(
                json.dumps(spec),
                manifest=self._made_of["manifest"],
                socket=self._made_of["socket"],
                near=self._near,
                program=for_embedded(),
            )

        try:
            return opened(), None
        except DeviceRefused as error:
            if not self._made_of["assumed"]:
                raise
            refused = error
        spec["device"] = "cpu"
        native = opened()
        # Also for those that are made of the same: copies in other processes warn no more.
        self._made_of = self._made_of | {"spec": self._made_of["spec"] | {"device": "cpu"}, "assumed": False}
        return native, refused

    def close(self) -> None:
        """Detaches. Batches already handed out stay readable; everything else raises `LoaderClosed`."""
        self._closed = True
        if self._pid != os.getpid():
            self._forget()
        self._native = None
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Iterating

    def __iter__(self) -> Iterator[Batch]:
        """One epoch: what is left of it after `load_state_dict`, else the whole."""
        self._attach()
        with self._lock:
            if self._begun:
                self._move((self._position[0] + 1, 0))
            return _Epoch(self)

    def _next(self, run: int, epoch: int) -> Batch | None:
        """The next batch of that epoch, None at its end."""
        native = self._native
        if native is None or self._pid != os.getpid():
            native = self._attach()
        if run != self._run:
            raise RoboCacheError(
                "this iterator is over: a newer `for`, set_epoch or load_state_dict moved its loader "
                "elsewhere; take batches from the newest iterator only"
            )
        raw = native.next(epoch)
        if raw is None:
            if run == self._run and self._position[0] == epoch:
                self._position = (epoch + 1, 0)
                self._begun = False
            return None
        # Another thread may have been given a later batch meanwhile: never step back.
        if run == self._run and raw.position > self._position:
            self._position = raw.position
            self._begun = True
        return Batch._leased(raw, self._view, self._note)

    def __len__(self) -> int:
        """Batches in this rank's whole epoch."""
        self._attach()
        info = self._info
        anchors, batch_size, world_size = info["anchors"], info["batch_size"], info["world_size"]
        if info["drop_last"]:
            return int(anchors // (batch_size * world_size))
        samples = -(-max(anchors - info["rank"], 0) // world_size)
        return int(-(-samples // batch_size))

    def _move(self, position: tuple[int, int]) -> None:
        """Goes elsewhere; iterators that are out end."""
        with self._lock:
            native = self._attach()
            if position != self._position:
                native.seek(*position)
            self._position = position
            self._begun = False
            self._run += 1

    # Position

    @property
    def epoch(self) -> int:
        """The epoch of the `for` in progress, else of the next one."""
        return self._position[0]

    def set_epoch(self, epoch: int) -> None:
        """The next `for` is this epoch, from its start. No work where it would have been anyway."""
        epoch = _whole("epoch", epoch)
        if self._position != (epoch, 0):
            self._move((epoch, 0))

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: batches handed out so far are done. Plain values, less than 1 KiB."""
        self._attach()
        spec, info = self._made_of["spec"], self._info
        epoch, consumed = self._position
        left = info["anchors"] - consumed
        least = info["batch_size"] * info["world_size"] if info["drop_last"] else 1
        if consumed and left < least:
            # Nothing is left of the epoch, for any rank: the next batch is the next epoch's first.
            epoch, consumed = epoch + 1, 0
        return {
            "version": STATE_VERSION,
            "seed": spec["seed"],
            "shuffle": spec["shuffle"],
            "epoch": epoch,
            "consumed": consumed,
            "fingerprint": info["fingerprint"],
            "batch_size": info["batch_size"],
            "world_size": info["world_size"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes where `state` says: the next `for` delivers exactly what was left of that epoch.

        The state must come from a loader of the same dataset, anchors, episodes, seed and shuffling. World
        size and
        batch size may differ: ranks go on together from the sample where the others stopped.

        Raises:
            StateError: (a `ValueError`) the state is another loader's; says which part differs.
        """
        if not isinstance(state, Mapping):
            raise StateError(f"a state is the dict that state_dict() returned, found {type(state).__name__}")
        missing = [key for key in ("version", "seed", "epoch", "consumed", "fingerprint") if key not in state]
        if missing:
            raise StateError(
                f"the state lacks {', '.join(missing)}; it has {', '.join(map(str, state)) or 'nothing'}"
            )
        if state["version"] != STATE_VERSION:
            raise StateError(
                f"the state has version {state['version']!r}, this robocache reads version {STATE_VERSION}: "
                "use the release that wrote it"
            )
        self._attach()
        spec, info = self._made_of["spec"], self._info
        for key, mine in (
            ("fingerprint", info["fingerprint"]),
            ("seed", spec["seed"]),
            ("shuffle", spec["shuffle"]),
        ):
            if state.get(key, mine) != mine:
                what = "dataset, anchors or episodes" if key == "fingerprint" else key
                raise StateError(
                    f"the state is another loader's: its {key} is {state[key]!r}, this loader's {mine!r}; "
                    f"make the loader with the same {what}"
                )
        self._move((_whole("epoch", state["epoch"]), _whole("consumed", state["consumed"])))

    # What there is to know

    @property
    def device(self) -> str:
        """Where batches are: `"cpu"`, or `"cuda:N"` as this process counts."""
        self._attach()
        gpu = self._info.get("gpu")
        if gpu is None:
            return "cpu"
        return f"{gpu['kind']}:{gpu['ordinal']}"

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Batch keys in order: `dtype`, `shape` of one sample (without `B`) and `role` of each."""
        self._attach()
        return {
            column["name"]: {
                "dtype": column["dtype"],
                "shape": tuple(column["shape"]),
                "role": _role(column["role"]),
            }
            for column in self._info["columns"]
        }

    @property
    def info(self) -> dict[str, Any]:
        """What the daemon said on attaching: anchors, fingerprint, ranks, slots and their bytes, warnings."""
        self._attach()
        return {key: value for key, value in self._info.items() if key not in ("columns", "text_tables")}

    def stats(self) -> dict[str, Any]:
        """The daemon's status now: datasets, loaders, memory and counters. Not for every step: it asks."""
        answer: dict[str, Any] = json.loads(self._attach().status())
        return answer

    def __repr__(self) -> str:
        dataset = next(iter(self._made_of["spec"]["dataset"].values()))
        rank, world_size = self._shard()
        of = f", rank {rank} of {world_size}" if world_size > 1 else ""
        return f"<robocache.DataLoader {dataset!r}, batch_size={self._made_of['spec']['batch_size']}{of}>"

    # Carrying over to another process

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._made_of, self._position, self._begun, self._near, self._told)

    def __copy__(self) -> DataLoader:
        raise TypeError("a DataLoader is attached to a ring of its own and is not copied; make another one")

    def __deepcopy__(self, _memo: dict[int, Any]) -> DataLoader:
        return self.__copy__()


class _Epoch(Iterator[Batch]):
    """The iterator of one epoch. Threads may share it: each batch goes to one of them."""

    __slots__ = ("_done", "_epoch", "_loader", "_run")

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._run = loader._run
        self._epoch = loader._position[0]
        self._done = False

    def __next__(self) -> Batch:
        if self._done:
            raise StopIteration
        batch = self._loader._next(self._run, self._epoch)
        if batch is None:
            self._done = True
            raise StopIteration
        return batch


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value.__index__() < 2**63:
        raise RequestError(f"{name} must be a whole number from 0, found {value!r}")
    return int(value.__index__())


def _role(role: str | dict[str, Any]) -> str:
    return role if isinstance(role, str) else next(iter(role))


def _close(native: _robocache.Loader, pid: int) -> None:
    # A forked child that exits the ordinary way must not detach its parent.
    if os.getpid() == pid:
        native.close()


def _unpickle(
    made_of: dict[str, Any], position: tuple[int, int], begun: bool, near: str | None, told: bool
) -> DataLoader:
    loader = DataLoader.__new__(DataLoader, framework=made_of["framework"])
    loader._init(made_of)
    loader._position, loader._begun, loader._near, loader._told = position, begun, near, told
    return loader
