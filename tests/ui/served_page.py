"""The page in a process of its own, as the tests of the page start, kill and restart it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from lowvram_tuner.train.lock import holder

FAKE_PAGE = Path(__file__).with_name("fake_page.py")


class Served:
    """The page in a process of its own, over a folder of runs that outlives it."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root = root
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.environment = {**os.environ, **environment}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command(), env=self.environment, stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(self.address, timeout=10):
                    return
            except OSError:
                assert self.process.poll() is None, "the page ended before it answered"
                assert time.monotonic() < give_up, "the page did not answer"
                time.sleep(0.1)

    def command(self) -> list[str]:
        return [sys.executable, str(FAKE_PAGE), "serve", str(self.root), str(self.port)]

    def hold(self) -> None:
        """Runs wait at step 40 from now on, however slow this machine is, until `go`."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / ".hold").touch()

    def go(self) -> None:
        (self.root / ".hold").unlink(missing_ok=True)

    def kill(self) -> None:
        """kill -9, so that nothing is said goodbye to."""
        self.process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self.process.wait()

    def close(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for child in family:
            if child.is_running():
                child.kill()
        owner = holder(self.root)
        if owner and psutil.pid_exists(owner.pid):
            psutil.Process(owner.pid).kill()
