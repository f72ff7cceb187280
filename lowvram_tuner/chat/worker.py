"""The chat worker: `python -m lowvram_tuner.chat.worker ROOT [--idle-seconds N]`, JSON lines over stdin and stdout.

    in   {"op": "load", "target": {...}, "device": null}                    first, once
         {"op": "chat", "id": 1, "messages": [...], "adapter": true, "system": "", "temperature": 0.7, ...}
         {"op": "stop", "id": 1}
    out  {"event": "loading", "message": "...", "done": 3, "total": 30}    {"event": "ready"}
         {"event": "piece", "id": 1, "text": "..."}                        {"event": "note", "id": 1, "text": "..."}
         {"event": "done", "id": 1, "tokens": 40, "tokens_per_s": 12.5, "stopped": false}
         {"event": "error", "id": 1, "what": "...", "fix": "..."}          {"event": "bye", "reason": "..."}

It holds the worker lock like a training run, unless it runs on the CPU by request, and stays warm until it was idle for
long, is asked to leave for a training run, or its stdin closes because the page is gone. It has nothing to save, so it
leaves at once, in the middle of a word if need be.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lowvram_tuner.chat.target import Target
from lowvram_tuner.train.failures import explain
from lowvram_tuner.train.files import to_json
from lowvram_tuner.train.lock import Busy, WorkerLock, take
from lowvram_tuner.train.worker import BUSY_EXIT

IDLE_SECONDS = 900.0
LOOK_SECONDS = 0.2  # how soon a request to leave is heard
Request = tuple[dict[str, Any], threading.Event]  # a chat and what stops it


def main(argv: list[str] | None = None, load: Callable[..., Any] | None = None) -> int:
    """Serves one model until there is a reason to leave. `load(target, device, progress)` makes the session."""
    parser = argparse.ArgumentParser(prog="lowvram_tuner.chat.worker")
    parser.add_argument("root")
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS)
    args = parser.parse_args(argv)
    wire = _Wire()
    first = json.loads(sys.stdin.readline() or "{}")
    if first.get("op") != "load":
        return 0  # the page went away before it said what to load
    try:
        lock = nullcontext() if first["device"] == "cpu" else take(args.root, "chat")
    except Busy as busy:
        wire.fail(None, busy)
        return BUSY_EXIT
    with lock as held:
        requests: queue.Queue[Request] = queue.Queue()
        threading.Thread(target=_read, args=(wire, requests), daemon=True).start()
        if held:
            threading.Thread(target=_watch, args=(wire, held), daemon=True).start()
        return _serve(wire, requests, first, args.idle_seconds, load)


def _serve(wire: _Wire, requests: queue.Queue[Request], first: dict[str, Any], idle: float, load: Any) -> int:
    """Loads the model, then answers one request after another."""
    try:
        if load is None:
            from lowvram_tuner.chat.session import ChatSession

            load = ChatSession.load

        session = load(Target(**first["target"]), first["device"], wire.progress)
    except Exception as error:
        traceback.print_exc()
        wire.fail(None, error)
        return 1
    wire.send("ready")
    while True:
        try:
            request, stop = requests.get(timeout=idle)
        except queue.Empty:
            wire.send("bye", reason="The chat was idle and made room on the card.")
            return 0
        _answer(wire, session, request, stop)


def _answer(wire: _Wire, session: Any, request: dict[str, Any], stop: threading.Event) -> None:
    """Streams one answer; what goes wrong is told and the worker stays."""
    number = request.pop("id")
    request.pop("op")
    try:
        noted = False
        for piece in session.stream(request.pop("messages"), stop=stop, **request):
            if session.dropped and not noted:
                noted = True
                wire.send("note", id=number, text=f"The {session.dropped} oldest messages no longer fit and were left out.")
            wire.send("piece", id=number, text=piece)
        stopped = session.stopped_early
        wire.send("done", id=number, tokens=session.tokens, tokens_per_s=session.tokens_per_s, stopped=stopped)
    except Exception as error:
        traceback.print_exc()
        wire.fail(number, error)


def _read(wire: _Wire, requests: queue.Queue[Request]) -> None:
    """Hands requests on; a stop is heard while an answer is being written. The end of stdin ends the process."""
    running: dict[int, threading.Event] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "stop" and message["id"] in running:
            running[message["id"]].set()
        elif message["op"] == "chat":
            stop = threading.Event()
            running = {message["id"]: stop}
            requests.put((message, stop))
    wire.leave("The page is gone.")


def _watch(wire: _Wire, lock: WorkerLock) -> None:
    wait = threading.Event()
    while not lock.asked_to_leave():
        wait.wait(LOOK_SECONDS)
    wire.leave("The chat was closed because training needs the card.")


class _Wire:
    """The way to the page. Whatever else is printed in this process goes to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        sys.stdin.reconfigure(encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        """One line; when nobody listens any more, the process ends."""
        try:
            with self._lock:
                self._out.write(to_json({"event": event, **values}) + "\n")
                self._out.flush()
        except OSError:
            os._exit(0)

    def progress(self, message: str, done: float | None = None, total: float | None = None) -> None:
        self.send("loading", message=message, done=done, total=total)

    def fail(self, number: int | None, error: Exception) -> None:
        failure = explain(error)
        self.send("error", id=number, what=failure.what, fix=failure.fix)

    def leave(self, reason: str) -> None:
        """Ends the process now: the operating system frees the card and the lock."""
        self.send("bye", reason=reason)
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
