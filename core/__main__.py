"""``python -m adapter_lab.core TOOL ...``: the file tools without ComfyUI."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m adapter_lab.core"))
