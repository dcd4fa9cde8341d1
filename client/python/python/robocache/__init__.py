"""RoboCache: ready batches of robot episodes, in shared memory, from the `robocached` daemon.

```python
import robocache as rc

loader = rc.DataLoader("path/to/dataset", batch_size=64, windows={"action": rc.Window(hz=50, steps=50)})
for batch in loader:  # one epoch; the next `for` is the next one
    batch["action"]  # [B, T, D], read in place
    batch["action_is_pad"]  # [B, T] bool
```
"""

from ._batch import Batch
from ._errors import (
    AllSlotsHeld,
    DaemonGone,
    DaemonNotFound,
    DatasetError,
    DeviceError,
    LoaderClosed,
    ProtocolError,
    RequestError,
    RoboCacheError,
    StateError,
)
from ._loader import DataLoader, RoboCacheWarning
from ._resample import fuse, resample
from ._robocache import __version__
from ._window import Every, Window

__all__ = [
    "AllSlotsHeld",
    "Batch",
    "DaemonGone",
    "DaemonNotFound",
    "DataLoader",
    "DatasetError",
    "DeviceError",
    "Every",
    "LoaderClosed",
    "ProtocolError",
    "RequestError",
    "RoboCacheError",
    "RoboCacheWarning",
    "StateError",
    "Window",
    "__version__",
    "fuse",
    "resample",
]
