"""Processor time of importing the pack where ComfyUI imports it, beside its own nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

PAIRS = 5
TIMED = """
import asyncio, importlib, sys, time
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {comfyui!r})
import comfy.options
comfy.options.enable_args_parsing()
import comfy_api.latest, execution, nodes, server
start = time.process_time()
{work}
sys.stdout.write("\\nseconds %f" % (time.process_time() - start))
"""
OURS = """
import adapter_lab
asyncio.run(adapter_lab.comfy_entrypoint())
"""
PEER = "asyncio.run(nodes.init_builtin_extra_nodes())"


def _run(work: str) -> Callable[[], float]:
    code = TIMED.format(comfyui=os.environ["ADAPTER_LAB_COMFYUI"], work=work)

    def run() -> float:
        text = subprocess.check_output([sys.executable, "-I", "-c", code], text=True)
        return float(text.rpartition("seconds ")[2])

    return run


def _bench(measure: Callable[..., None]) -> None:
    measure(_run(OURS), _run(PEER), "ComfyUI's extra nodes", "s", PAIRS)


BENCHES = {"import": _bench}
