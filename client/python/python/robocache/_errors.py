"""What can go wrong, as exceptions. `_robocache` raises these too, by name."""

from __future__ import annotations


class RoboCacheError(Exception):
    """Base of all errors of this package."""


class RequestError(RoboCacheError, ValueError):
    """An argument that cannot be: the message says what was wanted, what was found and what to do."""


class DeviceError(RequestError):
    """The device that was asked for cannot be had, or a batch on it not used: says what is missing."""


class DeviceRefused(DeviceError):
    """The daemon has no such device. Not public: a `DeviceError`, told apart for an absent `device=`."""


class DatasetError(RoboCacheError):
    """The dataset is not there, is broken, or lacks what was asked for; says where, as far as known."""


class DaemonNotFound(RoboCacheError, ConnectionError):
    """No daemon answers at the socket, and none could be started."""


class DaemonGone(RoboCacheError, ConnectionError):
    """The daemon died or stopped. `state_dict()` taken before or after still says where to go on."""


class AllSlotsHeld(RoboCacheError):
    """Every slot of the ring is held by batches that are still alive, so no further batch can come."""


class ProtocolError(RoboCacheError):
    """Client and daemon do not understand each other, mostly because their versions differ."""


class StateError(RoboCacheError, ValueError):
    """A state that belongs to another loader; the message says which part differs."""


class LoaderClosed(RoboCacheError):
    """The loader was closed."""
