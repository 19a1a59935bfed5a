"""Telling the user what is happening, and hearing that they want it to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer

INTERVAL = 0.25  # seconds between two texts, which a browser lays out anew each time
EVENTS = 0.1  # seconds between two events


class Bar:
    """Progress bar, text line and events of one node."""

    def __init__(self, total: int, node_id: str | None) -> None:
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.total, self.node_id = total, node_id
        self.due = self.event_due = 0.0

    def update(self, value: int, text: str = "") -> None:
        """Move the bar to ``value`` and show ``text``; raises when the user cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(value, self.total)
        if time.monotonic() >= self.due or value >= self.total:
            self.say(text)
            self.due = time.monotonic() + INTERVAL

    def say(self, text: str) -> None:
        """Show ``text`` below the node."""
        server = self._server
        if text and server is not None:
            server.send_progress_text(text, self.node_id)

    def may_send(self) -> bool:
        """Whether the next event of many may be sent, ten a second of them."""
        if time.monotonic() < self.event_due:
            return False
        self.event_due = time.monotonic() + EVENTS
        return True

    def send(self, event: str, data: dict[str, Any]) -> None:
        """Send an event with the node's id to the client that queued the graph."""
        server = self._server
        if server is not None and server.client_id is not None:  # else to every client
            server.send_sync(f"adapter_lab.{event}", {"node": self.node_id, **data},
                             server.client_id)  # fmt: skip

    @property
    def _server(self) -> Any:
        """None when nodes are called from a script."""
        server = getattr(PromptServer, "instance", None)
        return None if self.node_id is None else server


def ticker(node_id: str | None) -> Callable[[int, int, str], None]:
    """What the tools of the core call before each module: (done, total, what is being done)."""
    bars: list[Bar] = []

    def tick(done: int, total: int, what: str) -> None:
        if not bars or bars[0].total != total:
            bars[:] = [Bar(total, node_id)]
        bars[0].update(done, f"{what} ({done + 1} of {total})")

    return tick
