"""One ComfyUI and one Chromium for all tests of a renderer of the front end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from frontend import FLAGS, FrontEnd
from server import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each renderer's tests are one process's, with a ComfyUI and a Chromium of its own."""
    for item in items:
        renderer = getattr(item, "callspec", None) and item.callspec.params.get("open_front_end")
        item.add_marker(pytest.mark.xdist_group(renderer or "canvas"))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server(os.environ["ADAPTER_LAB_COMFYUI"]) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("ADAPTER_LAB_CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="session", params=["canvas", "vue"])
def open_front_end(
    request: pytest.FixtureRequest, server: Server, browser: Browser
) -> Iterator[FrontEnd]:
    front = FrontEnd(server, browser, request.param)
    yield front
    front.page.close()


@pytest.fixture
def front(open_front_end: FrontEnd) -> Iterator[FrontEnd]:
    """The front end; fails the test if a script of the page threw, or warned of ours."""
    open_front_end.errors.clear()
    open_front_end.console.clear()
    yield open_front_end
    assert open_front_end.errors == []
    assert [said for said in open_front_end.console if "adapter" in said.lower()] == []
    assert "deprecat" not in open_front_end.server.log.lower()
