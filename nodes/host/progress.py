"""Telling the user what is happening, and hearing that they want it to stop."""

from __future__ import annotations

import time

import comfy.model_management
import comfy.utils
from server import PromptServer

INTERVAL = 0.25  # seconds between two texts, which a browser lays out anew each time


class Bar:
    """Progress bar and text line of one node."""

    def __init__(self, total: int, node_id: str | None) -> None:
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.total, self.node_id, self.due = total, node_id, 0.0

    def update(self, value: int, text: str = "") -> None:
        """Move the bar to ``value`` and show ``text``; raises when the user cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(value, self.total)
        if time.monotonic() >= self.due or value >= self.total:
            self.say(text)
            self.due = time.monotonic() + INTERVAL

    def say(self, text: str) -> None:
        """Show ``text`` below the node."""
        # There is no server when nodes are called from a script.
        server = getattr(PromptServer, "instance", None)
        if text and server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id)
