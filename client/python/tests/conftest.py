"""What the tests share: where the real data lies, and a daemon of the session's own."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

# JAX arrays of these tests live on the host, also where there is a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

WORKSPACE = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def on_the_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, an absent `device=` would mean it also in tests that are not about it."""
    if "cuda" not in request.module.__name__:
        from robocache import _device

        monkeypatch.setattr(_device, "assumed", lambda _framework: ("cpu", False))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real datasets. Missing data fails the test: it would prove nothing otherwise."""
    folder = Path(os.environ.get("ROBOCACHE_TEST_DATA", WORKSPACE.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.fail(f"the real test data is not at {folder}: set ROBOCACHE_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def daemon_program() -> str:
    """The daemon under test: $ROBOCACHE_DAEMON, else the one the installed package carries."""
    from robocache._daemon import carried

    program = os.environ.get("ROBOCACHE_DAEMON") or carried()
    if not program or not os.access(program, os.X_OK):
        pytest.fail(
            f"no robocached to test with (found {program!r}): install the wheel, or set ROBOCACHE_DAEMON"
        )
    return program


class Daemon:
    """A running `robocached serve` on a socket of its own."""

    def __init__(self, program: str, folder: Path, *args: str) -> None:
        self.socket = str(folder / "robocached.sock")
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [program, "serve", "--socket", self.socket, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # It says so once it listens.
        if not any("serving" in line for line in self._lines()):
            raise RuntimeError(f"robocached ended with {self.process.wait()}: {''.join(self.log)}")
        self._reader = threading.Thread(target=lambda: sum(1 for _ in self._lines()))
        self._reader.start()

    def _lines(self) -> Iterator[str]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            yield line

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self._ended()

    def stop(self) -> None:
        self.process.terminate()
        self._ended()

    def _ended(self) -> None:
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="session")
def daemon(daemon_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("daemon")
    folder.chmod(0o700)
    running = Daemon(daemon_program, folder)
    yield running
    running.stop()
    assert running.process.returncode == 0, "".join(running.log)


@pytest.fixture
def own_daemon(daemon_program: str, tmp_path: Path) -> Iterator[Daemon]:
    """One for a test that kills it."""
    tmp_path.chmod(0o700)
    running = Daemon(daemon_program, tmp_path)
    yield running
    running.kill()


@pytest.fixture
def sock(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> str:
    """The session daemon's socket, also as $ROBOCACHE_SOCKET."""
    monkeypatch.setenv("ROBOCACHE_SOCKET", daemon.socket)
    return daemon.socket


@pytest.fixture
def g1(data: Path) -> str:
    """100 episodes, 35,965 frames at 30 fps; state and action `[26]`."""
    return str(data / "g1_v30_conv")
