"""What a run that goes on finds changed, and why it may not go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...core.errors import AdapterLabError
from ...core.files import read_header
from ...core.train.targets import pattern_name
from .job import Job, changes, told

Changes = Mapping[str, tuple[Any, Any]]
# Settings of the adapter that leave its factors as they are.
_FREE = {"adapter.dropout", "adapter.rank_dropout", "adapter.module_dropout"}


def changed(job: Job) -> Changes:
    """What of the job is not as the state of its run has it."""
    stored = _stored(job, "circumstances")
    # A damaged state is refused when it is read.
    return changes(stored, job.circumstances()) if stored else {}


def explained(
    job: Job, error: AdapterLabError, different: Changes, modules: Mapping[str, Any]
) -> AdapterLabError:
    """``error``, a refusal to go on, by the settings that are behind it; itself where none is.

    Args:
        different: what :func:`changed` found. modules: full path -> what is to be trained.
    """
    stored = _stored(job, "identity").get("module", {})
    other = stored.keys() != modules.keys()
    behind = {
        key: change
        for key, change in different.items()
        if (key.startswith("adapter.") and key not in _FREE)
        or (other and key.startswith("targets."))
    }
    sides = ((modules.keys() - stored.keys(), "more"), (stored.keys() - modules.keys(), "fewer"))
    counts = [_counted(sorted(paths), what) for paths, what in sides if paths and stored]
    found = ", ".join(filter(None, (told(behind), *counts)))
    if not found:
        return error
    return AdapterLabError(
        error.failed, found=found,
        fix="Set this as it was, choose another run name, or set 'on_existing' to restart",
    )  # fmt: skip


def _counted(paths: list[str], what: str) -> str:
    noun = "module" if len(paths) == 1 else "modules"
    return f"{len(paths)} {noun} {what} such as '{pattern_name(paths[0])}'"


def _stored(job: Job, part: str) -> dict[str, Any]:
    """A part of the state's metadata; empty where it cannot be read."""
    try:
        value = json.loads(read_header(job.run.state).metadata[part])
    except (AdapterLabError, KeyError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
