"""A daemon of the benchmark's own, and the processor time of any process."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, all its threads, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Daemon:
    """`robocached serve ARGS` on a socket in `folder`; stops with the `with`."""

    def __init__(self, program: str, folder: Path, *args: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket = str(folder / "socket")
        self.log: list[str] = []
        self._program = program
        command = [program, "serve", "--socket", self.socket, *args]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        # It says so once it listens.
        if not any("serving" in line for line in self._lines()):
            raise RuntimeError(f"robocached ended with {self._process.wait()}:\n{''.join(self.log)}")
        self._reader = threading.Thread(target=lambda: sum(1 for _ in self._lines()), daemon=True)
        self._reader.start()

    def _lines(self):
        for line in self._process.stderr:
            self.log.append(line)
            yield line

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._reader.join()

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def gpu(self) -> dict[str, Any]:
        """What `status` says of the first GPU."""
        asked = [self._program, "status", "--json", "--socket", self.socket]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return json.loads(said)["gpus"][0]

    def warnings(self) -> list[str]:
        return [line.strip() for line in self.log if "WARN" in line or "ERROR" in line]
