"""ComfyUI in this process, quiet, with folders of its own."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.environ["ADAPTER_LAB_COMFYUI"])
_argv, sys.argv = sys.argv, ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402

sys.argv = _argv
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402

logging.disable(logging.INFO)
comfy.utils.set_progress_bar_enabled(False)
FOLDER = Path(tempfile.mkdtemp(prefix="adapter-lab-bench-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.add_model_folder_path("loras", str(FOLDER / "loras"))
