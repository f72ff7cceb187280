"""The page's side of a chat: keeps one warm worker and streams its answers. No torch.

One `ChatClient` serves all tabs. `open` starts the worker for a target, or keeps it when it already holds that target;
`stream` waits until it is ready and yields the answer's pieces.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowvram_tuner.chat.sampling import Sampling
from lowvram_tuner.chat.target import Target
from lowvram_tuner.train.files import to_json
from lowvram_tuner.train.lock import Busy, holder
from lowvram_tuner.train.process import kill_family, spawn
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.supervisor import make_room

WORKER = (sys.executable, "-m", "lowvram_tuner.chat.worker")


class ChatError(RuntimeError):
    """An answer that could not be given: `what` happened and how to `fix` it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what} {fix}".strip())
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class ChatStatus:
    """`state`: closed, loading, ready, answering or failed; `progress`: (done, total) of loading or None."""

    state: str
    message: str = ""
    target: Target | None = None
    device: str | None = None
    progress: tuple[float, float] | None = None


class ChatClient:
    """Talks to one chat worker at a time. Safe to call from several threads; one answer is written at a time."""

    def __init__(self, root: Path | str, command: tuple[str, ...] = WORKER) -> None:
        self.root = Path(root)
        self.tokens_per_s = 0.0
        self.note = ""  # what the last answer had to leave out
        self._command = command
        self._worker: _Worker | None = None
        self._opening = threading.Lock()
        self._answering = threading.Lock()
        self._number = 0

    def open(self, target: Target, device: str | None = None) -> None:
        """Starts loading `target` unless it is loaded already. device: 'cpu' leaves the card alone.

        Busy when a training run holds the card.
        """
        with self._opening:
            if self._worker and self._worker.alive and self._worker.holds(target, device):
                return
            self._close()
            if device != "cpu":
                make_room(self.root)
            self._worker = _Worker(self.root, self._command, target, device)

    def stream(self, messages: list[dict[str, str]], *, adapter: bool = True, system: str = "", **sampling: Any) -> Iterator[str]:
        """Yields the answer piece by piece, after loading has ended. sampling: temperature, top_p, max_new_tokens.

        ChatError when the worker cannot answer, or another answer is being written. Leaving the iteration stops the answer.
        """
        options = asdict(Sampling(**sampling))
        worker = self._worker
        if worker is None or not worker.alive:
            raise ChatError(worker.status().message if worker else "No model is loaded.", "Load one first.")
        if not self._answering.acquire(blocking=False):
            raise ChatError("Another answer is being written.", "Wait for it, or stop it.")
        try:
            self._number += 1
            self.note, self.tokens_per_s = "", 0.0
            request = {"op": "chat", "id": self._number, "messages": messages, "adapter": adapter, "system": system, **options}
            for event in worker.ask(request):
                if event["event"] == "piece":
                    yield event["text"]
                elif event["event"] == "note":
                    self.note = event["text"]
                elif event["event"] == "done":
                    self.tokens_per_s = event["tokens_per_s"]
        finally:
            self._answering.release()

    def stop(self) -> None:
        """Ends the answer under way; its `stream` then ends by itself."""
        if self._worker:
            self._worker.tell({"op": "stop", "id": self._number})

    def close(self) -> None:
        """Ends the worker and frees the card."""
        with self._opening:
            self._close()

    def status(self) -> ChatStatus:
        """Where the worker is now."""
        if self._worker is None:
            return ChatStatus("closed")
        status = self._worker.status()
        answering = status.state == "ready" and self._answering.locked()
        return ChatStatus("answering", status.message, status.target, status.device) if answering else status

    def blocked_by(self) -> RunDir | None:
        """The training run that holds the card, if one does: chat then needs the CPU, or has to wait."""
        found = holder(self.root)
        return RunDir(self.root / found.run) if found and found.kind == "train" and found.run else None

    def _close(self) -> None:
        if self._worker:
            self._worker.close()
            self._worker = None


class _Worker:
    """One worker process, and the thread that always reads from it so that its pipe never fills up."""

    def __init__(self, root: Path, command: tuple[str, ...], target: Target, device: str | None) -> None:
        self.target, self.device = target, device
        self._status = ChatStatus("loading", "Starting.", target, device)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._ready = threading.Event()
        self._writing = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".chat.log").open("wb") as log:
            self._process = spawn([*command, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.tell({"op": "load", "target": asdict(target), "device": device})
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and self._status.state not in ("failed", "closed")

    def holds(self, target: Target, device: str | None) -> bool:
        return (self.target, self.device) == (target, device)

    def status(self) -> ChatStatus:
        return self._status

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a line; a worker that is gone is noticed by the reading thread."""
        try:
            with self._writing:
                self._process.stdin.write((to_json(message) + "\n").encode("utf-8"))
                self._process.stdin.flush()
        except OSError:
            return

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of one answer up to 'done'. ChatError when there is none."""
        self._ready.wait()
        self.tell(request)
        finished = False
        try:
            while not finished:
                event = self._answers.get()
                if event["event"] == "end":
                    self._answers.put(event)  # for whoever asks next
                    raise ChatError(self._status.message, "Load the model again.")
                if event.get("id") == request["id"]:
                    finished = event["event"] in ("done", "error")
                    if event["event"] == "error":
                        raise ChatError(event["what"], event["fix"])
                    yield event
        finally:
            if not finished:
                self.tell({"op": "stop", "id": request["id"]})

    def close(self) -> None:
        kill_family(self._process.pid)
        self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            event = json.loads(line)
            kind = event["event"]
            if kind == "loading":
                known = event["done"] is not None and event["total"]
                progress = (event["done"], event["total"]) if known else None
                self._set("loading", event["message"], progress)
            elif kind == "ready":
                self._set("ready", f"Ready: {self.target.label}.")
                self._ready.set()
            elif kind == "bye":
                self._set("closed", event["reason"])
            elif kind == "error" and event["id"] is None:
                self._set("failed", f"{event['what']} {event['fix']}")
            else:
                self._answers.put(event)
        code = self._process.wait()
        if self._status.state not in ("closed", "failed"):
            self._set("failed", f"The chat ended unexpectedly (exit code {code}).")
        self._answers.put({"event": "end"})
        self._ready.set()

    def _set(self, state: str, message: str, progress: tuple[float, float] | None = None) -> None:
        self._status = ChatStatus(state, message, self.target, self.device, progress)


__all__ = ["Busy", "ChatClient", "ChatError", "ChatStatus"]
