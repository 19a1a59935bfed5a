"""The pack as a folder of any name under `custom_nodes`, and as a package that is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_lab.tests.server import Server

COMFYUI = os.environ["ADAPTER_LAB_COMFYUI"]
# What ComfyUI has imported by the time it comes to custom nodes, but for its own extra nodes.
IMPORTED = """
import asyncio, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {comfyui!r})
import comfy.options
comfy.options.enable_args_parsing()
import comfy_api.latest, execution, nodes, server
before = set(sys.modules)
import adapter_lab
asyncio.run(adapter_lab.comfy_entrypoint())
print("imported", *sorted(set(sys.modules) - before))
"""
# What only works on files or trains: imported by the node that runs it.
LATE = ("core.cli", "core.lowrank", "core.merge.", "core.quant", "core.train.loop")


@pytest.fixture(scope="module", params=["adapter-lab", "My pack, v1.0 (copy)"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("base")
    with Server(COMFYUI, base=base, folder=request.param) as running:
        yield running


def test_gives_its_nodes(server: Server) -> None:
    ours = {name: info for name, info in server.object_info().items()
            if info["python_module"].startswith("custom_nodes.")}
    assert "AdapterLabLoader" in ours
    assert all(name.startswith("AdapterLab") for name in ours)
    assert all(info["category"].split("/")[0] == "adapter lab" for info in ours.values())


def test_loads_without_a_word(server: Server) -> None:
    """The only line that names the pack is ComfyUI's own, with the seconds."""
    folder = str(Path("custom_nodes", server.folder))
    (line,) = [line for line in server.log.splitlines() if folder in line]
    assert "seconds: " in line


def test_imports_no_more_than_menus_need() -> None:
    """Nothing that ComfyUI has not imported by itself, and none of the tools."""
    command = [sys.executable, "-I", "-c", IMPORTED.format(comfyui=COMFYUI)]
    _, *names = subprocess.check_output(command, text=True).splitlines()[-1].split()
    assert "adapter_lab.nodes.load" in names
    assert all(name.partition(".")[0] == "adapter_lab" for name in names)
    ours = [name.partition(".")[2] for name in names]
    assert [name for name in ours if name.startswith(LATE)] == ["core.merge.menus"]


def test_templates_and_scripts_are_served(server: Server) -> None:
    templates = server.get("/api/workflow_templates")
    shipped = sorted(path.stem for path in (server.pack / "workflows").glob("*.json"))
    assert sorted(templates.get(server.folder, [])) == shipped
    listed = [path for path in server.get("/api/extensions") if "/core/" not in path]
    assert len(listed) == len(list((server.pack / "web").rglob("*.js")))


def test_importing_the_package_is_quiet() -> None:
    """`import adapter_lab` alone pulls in nothing of ComfyUI or torch."""
    code = ("import sys; import adapter_lab; "
            "sys.exit(any(name in sys.modules for name in ('torch', 'comfy', 'comfy_api')))")
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_pack_is_this_checkout() -> None:
    import adapter_lab

    assert Path(adapter_lab.__file__).parent == Path(__file__).resolve().parents[2]
