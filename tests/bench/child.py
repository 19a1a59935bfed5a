"""A process that runs one function after the other: ``child.py MODULE``, calls as JSON on stdin.

What is measured so has its own memory, and imports of a peer stay out of ours.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from typing import Any

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # of glibc


def main(module: str) -> None:
    """Answer calls ``[function, arguments]`` with ``{"seconds", "result"}``, in order."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # peers print
    try:
        functions = importlib.import_module(module)
        functions.start()
    except Exception as error:
        replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        raise
    replies.write("{}\n")
    for line in sys.stdin:
        replies.write(json.dumps(_answer(functions, *json.loads(line))) + "\n")


def _answer(functions: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = getattr(functions, name)(**arguments)
    seconds = time.perf_counter() - start
    # What is freed goes back to the system: the next call begins with what must be held.
    gc.collect()
    _TRIM(0)
    return {"seconds": seconds, "result": result}


if __name__ == "__main__":
    main(sys.argv[1])
