"""A real ComfyUI as a subprocess, with this pack linked in, driven over HTTP and its socket.

Runs in the Python that `comfyui.py` prepares:

    with Server(comfyui) as server:
        result = server.run(prompt)   # API format
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import websocket

CHECKOUT = Path(os.path.abspath(__file__)).parents[1]
FOLDERS = ("custom_nodes", "models", "input", "output", "user", "temp")
TEXT_EVENT = 3
IMPORT_TROUBLE = ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint")


class ServerError(Exception):
    """ComfyUI did not start, died, or did not answer in time."""


@dataclass
class Result:
    """What one prompt gave. `outputs`: node id -> what it showed; `errors`: one dict a node."""

    outputs: dict[str, dict] = field(default_factory=dict)
    errors: list[dict] = field(default_factory=list)
    messages: list[tuple[str, dict]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return not self.errors and not self.interrupted

    @property
    def texts(self) -> dict[str, str]:
        """The text that nodes left on themselves, by node id; what a report became later wins."""
        reports = {node: out.get("adapter_lab", [{}])[0] for node, out in self.outputs.items()}
        shown = {n: reports[n].get("text") or out.get("text") for n, out in self.outputs.items()}
        return {n: "\n".join([t] if isinstance(t, str) else t) for n, t in shown.items() if t}

    def files(self, base: Path) -> list[Path]:
        """The pictures that nodes saved."""
        found = [one for out in self.outputs.values() for one in out.get("images", ())]
        return [base / one["type"] / one["subfolder"] / one["filename"] for one in found]


class Server:
    """ComfyUI with `pack` linked into its `custom_nodes` as `folder`, on a free port."""

    def __init__(self, comfyui: str | os.PathLike, *, base: Path | None = None, port: int = 0,
                 pack: Path | None = CHECKOUT, folder: str = "adapter-lab",
                 options: tuple[str, ...] = ()) -> None:
        self.comfyui, self.pack, self.folder, self.options = Path(comfyui), pack, folder, options
        self.port = free_port(port)
        self._temporary = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="adapter-lab-")).absolute()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 240) -> None:
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack:
            link(self.pack, self.base / "custom_nodes" / self.folder)
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port),
                   "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
                   "--disable-api-nodes", "--disable-auto-launch", *self.options]
        with open(self.base / "comfyui.log", "wb") as log:
            self.process = subprocess.Popen(command, cwd=self.comfyui, stdout=log, stderr=log,
                                            env={**os.environ, "PYTHONUNBUFFERED": "1"})
        self._wait(time.monotonic() + timeout)

    def _wait(self, end: float) -> None:
        while True:
            if self.process and self.process.poll() is not None:
                code = self.process.returncode
                raise ServerError(f"ComfyUI ended with exit code {code} before it was ready; its "
                                  f"log ends:\n{self.tail()}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                break
            if time.monotonic() > end:
                raise ServerError(f"ComfyUI is not ready in time; its log ends:\n{self.tail()}")
            time.sleep(0.2)
        trouble = [line for line in self.log.splitlines() if any(t in line for t in IMPORT_TROUBLE)]
        if self.pack and any(self.folder in line for line in trouble):
            raise ServerError(f"ComfyUI runs, but could not load the pack:\n{self.tail()}")

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    @property
    def log(self) -> str:
        return (self.base / "comfyui.log").read_text("utf-8", errors="replace")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def request(self, path: str, body: object = None) -> object:
        """GET, or POST with a JSON body; the JSON of the answer, or None if it has none."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def get(self, path: str):
        return self.request(path)

    def post(self, path: str, body: object):
        return self.request(path, body)

    def object_info(self, node: str = "") -> dict:
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def run(self, prompt: dict, timeout: float = 600,
            on_message: Callable[[str, dict], None] | None = None) -> Result:
        """Run an API-format prompt to its end; errors of nodes are in the result, not raised."""
        result, start, client = Result(), time.monotonic(), uuid.uuid4().hex
        listener = websocket.create_connection(f"{self.address.replace('http', 'ws')}/ws?clientId="
                                               f"{client}", timeout=5)
        with contextlib.closing(listener):
            try:
                asked = self.post("/prompt", {"prompt": prompt, "client_id": client})
            except urllib.error.HTTPError as refusal:
                result.errors = refusals(json.loads(refusal.read()))
                return result
            # What depends on a bad input is left out, and the rest of the prompt still runs.
            result.errors = refusals(asked) if asked["node_errors"] else []
            for kind, data in self._messages(listener, start + timeout):
                result.messages.append((kind, data))
                if on_message:
                    on_message(kind, data)
                if kind == "execution_error":
                    result.errors.append(data)
                result.interrupted |= kind == "execution_interrupted"
                # Sent after the history entry is written, unlike execution_success.
                if kind == "executing" and data.get("node") is None:
                    break
        history = self.get(f"/history/{asked['prompt_id']}")[asked["prompt_id"]]
        result.outputs, result.seconds = history["outputs"], time.monotonic() - start
        return result

    def _messages(self, listener: websocket.WebSocket, end: float) -> Iterator[tuple[str, dict]]:
        while True:
            try:
                message = listener.recv()
            except websocket.WebSocketTimeoutException:
                message = ""
            except (websocket.WebSocketException, OSError) as error:
                raise ServerError(f"ComfyUI died ({error}); it said:\n{self.tail()}") from error
            if isinstance(message, bytes):
                if struct.unpack_from(">I", message)[0] == TEXT_EVENT:
                    (size,) = struct.unpack_from(">I", message, 4)
                    node, text = message[8 : 8 + size].decode(), message[8 + size :].decode()
                    yield "progress_text", {"node": node, "text": text}
            elif message:
                yield (decoded := json.loads(message))["type"], decoded["data"]
            if self.process and self.process.poll() is not None:
                raise ServerError(f"ComfyUI died; its log ends:\n{self.tail()}")
            if time.monotonic() > end:
                self.interrupt()
                raise ServerError(f"The prompt did not end in time; the log ends:\n{self.tail()}")


def refusals(answer: dict) -> list[dict]:
    """A refused prompt in the form of execution errors: what is wrong, and at which node."""
    refused = (answer.get("node_errors") or {}).items()
    found = [(node, entry.get("class_type"), one) for node, entry in refused
             for one in entry["errors"]] or [(None, None, answer["error"])]
    return [{"node_id": node, "node_type": kind, "exception_type": one["type"], "traceback": [],
             "exception_message": f"{one['message']}: {one.get('details', '')}"}
            for node, kind, one in found]


def link(source: Path, target: Path) -> None:
    """A folder link; a junction on Windows, where symbolic links need rights."""
    if target.is_symlink() or target.exists():
        return
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(source), str(target))
    else:
        target.symlink_to(source, target_is_directory=True)


def free_port(wanted: int = 0) -> int:
    """`wanted`, or any free port if that is 0."""
    with socket.socket() as probe:
        # As ComfyUI's own server does: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ServerError(f"Port {wanted} can't be used ({error.strerror}); ComfyUI needs a "
                              "free one. Choose another, or none to have one found.") from error
        return probe.getsockname()[1]
