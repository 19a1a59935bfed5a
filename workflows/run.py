"""Runs a workflow of this folder in a real ComfyUI with this pack and its demo model.

    python3 workflows/run.py [NAME] [--serve]

Needs nothing but Python: ComfyUI and its environment are found or made by `tests/comfyui.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.path.abspath(__file__)).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "demo")]
# The demo: train an adapter, average its checkpoints, then load the saved file as any other.
DEMO = ("train_adapter", "post_hoc_ema", "load_adapter")
LONGEST_TEXT = 12  # lines; a list of all modules would hide the rest

import comfyui  # noqa: E402
import provision  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", help="NAME of NAME.json here (default: the demo)")
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running afterwards")
    parser.add_argument("--port", type=int, default=0, help="its port (default: a free one)")
    parser.add_argument("--comfyui", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [options.name.removesuffix(".json")] if options.name else DEMO
    paths = [HERE / f"{name}.json" for name in chosen]
    if not all(path.is_file() for path in paths):
        names = ", ".join(sorted(file.stem for file in HERE.glob("*.json"))) or "none yet"
        raise provision.Failure(f"There is no workflow {options.name!r}. There are: {names}.")
    if options.comfyui:
        return run(paths, options)
    python, home = comfyui.prepare()
    # -I keeps folders of the checkout off the path, where they could hide ComfyUI's modules.
    command = [str(python), "-I", str(HERE / "run.py"), *sys.argv[1:], "--comfyui", str(home)]
    if os.name == "nt":
        return subprocess.call(command)
    os.execv(python, command)


def run(paths: list[Path], options: argparse.Namespace) -> int:
    """The workflows in one fresh base folder, with progress; 0 if every node ran."""
    from server import Server, ServerError

    base = provision.cache() / "runs" / f"{paths[0].stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    code = 0
    try:
        with Server(options.comfyui, base=base, port=options.port) as server:
            provision.say(f"ComfyUI runs in {base}")
            for path in paths:
                code = code or run_one(server, path)
            if options.serve:
                serve(server)
    except (ServerError, ValueError) as error:
        raise provision.Failure(str(error)) from error
    return code


def run_one(server, path: Path) -> int:
    """One workflow; an adapter that an earlier one saved takes the place of the shipped one."""
    from graph import to_prompt

    prompt = to_prompt(json.loads(path.read_text("utf-8")), server.object_info())
    saved = [file.name for file in sorted((server.base / "output" / "loras").glob("*.safetensors"))]
    for node in prompt.values():
        if saved and node["class_type"] == "AdapterLabLoader":
            node["inputs"]["adapter_name"] = saved[-1]
    provision.say(f"running {path.name}")
    progress = Progress(prompt)
    result = server.run(prompt, timeout=7200, on_message=progress.show)
    progress.clear()
    return report(path, prompt, result, server.base)


def report(path: Path, prompt: dict, result, base: Path) -> int:
    """What the nodes said, and what is on disk now; or which node failed and why."""
    for error in result.errors:
        provision.say(f"{error['node_type']} (node {error['node_id']}) failed: "
                      f"{error['exception_message'].strip()} The log is {base / 'comfyui.log'}.")
    if not result.ok:
        return 1
    from summary import figures

    print(f"\n===== {path.name}")
    for node, text in result.texts.items():
        lines = text.strip().splitlines()
        rest = len(lines) - LONGEST_TEXT
        shown = lines if rest < 2 else [*lines[:LONGEST_TEXT], f"... and {rest} more lines"]
        print("\n".join((f"--- {prompt[node]['_meta']['title']}", *shown, "")))
    for line in figures(prompt, result, base, path.stem):
        print(line)
    saved = sorted((base / "output" / "loras").rglob("*.safetensors"))
    for kind, files in (("pictures", result.files(base)), ("adapters", saved)):
        for folder in sorted({file.parent for file in files}):
            names = sorted(file.name for file in files if file.parent == folder)
            more = f" ... {names[-1]} ({len(names)})" if len(names) > 1 else ""
            print(f"{kind}: {folder}{os.sep}{names[0]}{more}")
    print(f"finished in {result.seconds:.0f} s")
    return 0


def serve(server) -> None:
    print(f"ComfyUI runs at {server.address}; Ctrl-C ends it", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        provision.say("ending ComfyUI")


class Progress:
    """Which node runs, how far it is and what it says: one line that changes, or one in 10 s."""

    def __init__(self, prompt: dict) -> None:
        self.prompt, self.done, self.text, self.due = prompt, 0, "", 0.0
        self.tty = sys.stderr.isatty()

    def show(self, kind: str, data: dict) -> None:
        if kind == "executing" and data.get("node") in self.prompt:
            self.done, self.text = self.done + 1, ""
            self.write(data["node"], "", always=True)
        elif kind == "progress_text":
            self.text = data["text"].strip().replace("\n", "; ")
        elif kind == "progress_state":
            for node, state in data["nodes"].items():
                if state["state"] == "running" and state["max"] > 1:
                    self.write(node, f"{state['value'] / state['max']:4.0%} ")

    def write(self, node: str, far: str, *, always: bool = False) -> None:
        if time.monotonic() < self.due and not always:
            return
        self.due = time.monotonic() + (0.2 if self.tty else 10)
        title = self.prompt.get(node, {}).get("_meta", {}).get("title", node)
        line = f"[{self.done}/{len(self.prompt)}] {title} {far}{self.text}"[:110]
        sys.stderr.write(f"\r{line:110}" if self.tty else f"{line}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.tty:
            sys.stderr.write("\r" + " " * 110 + "\r")


if __name__ == "__main__":
    sys.exit(provision.run(main))
