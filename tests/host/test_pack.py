"""The pack as a folder of any name under `custom_nodes`, and as a package that is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_lab.tests.server import Server

COMFYUI = os.environ["ADAPTER_LAB_COMFYUI"]
TOOK = re.compile(r"([\d.]+) seconds(.*): (.+)")


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


def test_loads_fast_and_says_nothing(server: Server) -> None:
    """ComfyUI's own line with the seconds is the only one that names the pack."""
    lines = [line for line in server.log.splitlines() if server.folder in line]
    times = [found for line in lines if (found := TOOK.search(line))]
    assert len(times) == len(lines) == 1, lines
    assert float(times[0][1]) <= 0.1 and not times[0][2]


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
