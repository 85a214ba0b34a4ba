"""Requests to the loopback Hub since the last reset, and what is to go wrong with them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loopback_store import Refused

KINDS = ("stall_before", "stall_after", "close_before", "close_after", "status")
_ENDED = 499  # in the log: no answer was sent
_POLL_SECONDS = 0.02


class Dropped(Exception):
    """The connection is to end without an answer."""


@dataclass
class Fault:
    """What is to go wrong with some requests."""

    at: int
    kind: str
    times: int = 1
    status: int = 500
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    reached: bool = False


class Journal:
    """Requests since the last reset, and the faults that wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: list[dict[str, Any]] = []
        self._faults: list[Fault] = []
        self._stalled: dict[int, bool | None] = {}  # by identity of the log's entry; True: released, False: dropped
        self._open = 0

    def begin(self, method: str, path: str) -> tuple[dict[str, Any], Fault | None]:
        with self._changed:
            self._open += 1
            number = len(self._entries) + 1
            entry = {"number": number, "method": method, "path": path, "status": None}
            self._entries.append(entry)
            fitting = [fault for fault in self._faults if fault.at <= number < fault.at + fault.times]
            return entry, fitting[-1] if fitting else None

    def end(self, entry: dict[str, Any]) -> None:
        with self._changed:
            self._open -= 1
            entry["status"] = entry["status"] or _ENDED
            self._changed.notify_all()

    def reach(self, fault: Fault) -> None:
        with self._changed:
            fault.reached = True
            self._changed.notify_all()

    def stall(self, fault: Fault, entry: dict[str, Any], is_gone: Callable[[], bool]) -> None:
        """Return when the request is released; raise when it is dropped or its client goes away."""
        with self._changed:
            self._stalled[id(entry)] = None
            self.reach(fault)
            while self._stalled[id(entry)] is None:
                if is_gone():
                    self._stalled[id(entry)] = False
                else:
                    self._changed.wait(_POLL_SECONDS)
            if not self._stalled.pop(id(entry)) or is_gone():
                raise Dropped

    def wake(self, go_on: bool) -> None:
        """Release or drop all stalled requests."""
        with self._changed:
            for stalled in [one for one, decision in self._stalled.items() if decision is None]:
                self._stalled[stalled] = go_on
                self._changed.notify_all()

    def add_fault(self, description: dict[str, Any]) -> None:
        fault = Fault(**description)
        if fault.kind not in KINDS or fault.at < 1:
            raise Refused(400, f"Expected a kind out of {', '.join(KINDS)} and a request from 1 on, got {fault}")
        with self._changed:
            self._faults.append(fault)

    def wait_fault(self, timeout: float) -> bool:
        with self._changed:
            if not self._faults:
                raise Refused(400, "No fault was set")
            fault = self._faults[-1]
            return self._changed.wait_for(lambda: fault.reached, timeout)

    def log(self) -> list[dict[str, Any]]:
        with self._changed:
            return [dict(entry) for entry in self._entries]

    def reset(self, timeout: float = 30) -> None:
        """Start counting anew when no request is under way, so that none of before is counted after."""

        def is_quiet() -> bool:
            self.wake(go_on=False)  # again and again: a request may come to its fault only now
            return self._open == 0

        with self._changed:
            if not self._changed.wait_for(is_quiet, timeout):
                raise Refused(409, f"{self._open} requests are still open after {timeout} s")
            self._entries, self._faults = [], []
