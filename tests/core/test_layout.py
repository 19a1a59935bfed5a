"""The shape of the repository: sizes, direction of imports, and what no file may contain."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 400
LONGEST_FUNCTION = 40
# What may import what in core: a module imports its own row and those below, never one above.
ROWS = (
    "__main__ cli",
    "train merge bake quant",
    "adapters keys",
    "forms",
    "archs cache orthogonal tensors lowrank lazy power files spool atomic hashes header metadata "
    "stored "
    "streams",
    "checks errors registry schedule",
)
ROW = {name: row for row, names in enumerate(reversed(ROWS)) for name in names.split()}
HOST = {"comfy", "comfy_extras", "comfy_execution", "folder_paths", "server", "nodes", "execution"}
MACHINE = re.compile(r"(?:^|[^\w.])/(?:work|root|farm|opt|home|Users)/\w|/" + r"tmp/[a-z]", re.M)
BINARY = {".safetensors", ".jpg", ".png", ".webp", ".gz"}


def tracked() -> list[Path]:
    """Files that git has or would take; every file if this is no git checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = done.stdout.split("\0") if done.returncode == 0 else ROOT.rglob("*")
    return [file for name in names if name and (file := ROOT / name).is_file()]


FILES = tracked()
PACK = [file for file in FILES if file.suffix == ".py"
        and file.relative_to(ROOT).parts[0] in ("core", "nodes", "__init__.py")]
TREES = {file: ast.parse(file.read_text("utf-8")) for file in PACK}


def dotted(file: Path) -> str:
    """core/keys/__init__.py -> core.keys"""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix("__init__").strip(".")


MODULES = {dotted(file): file for file in PACK}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import in a file; relative ones as dotted names from the root."""
    here = file.relative_to(ROOT).parent.parts
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield 0, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            parts = here[: len(here) + 1 - node.level] + tuple((node.module or "").split("."))
            base = ".".join(filter(None, parts))
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield node.level, inner if inner in MODULES else base


def test_found_the_pack() -> None:
    assert len(PACK) > 10


def test_files_are_short() -> None:
    code = [file for file in FILES if file.suffix in (".py", ".mjs", ".js")]
    sizes = {str(file.relative_to(ROOT)): len(file.read_bytes().splitlines()) for file in code}
    assert {name: size for name, size in sizes.items() if size > LONGEST} == {}


def test_functions_are_short() -> None:
    """Without their docstrings, which may be longer than the code."""
    long = {}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.body[0].lineno - node.lineno
                length += (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if length > LONGEST_FUNCTION:
                    long[f"{dotted(file)}.{node.name}"] = length
    assert long == {}


@pytest.mark.parametrize("file", PACK, ids=dotted)
def test_imports_point_downwards(file: Path) -> None:
    """web -> nodes -> nodes/host -> core; ComfyUI's insides in nodes/host only."""
    me = dotted(file).split(".")
    in_core, in_host = me[0] == "core", me[:2] == ["nodes", "host"]
    for level, module in imports(file):
        top = module.split(".")[0]
        if not level:
            assert top not in {"core", "adapter_lab", "web"}, f"{module}: import it relatively"
            assert in_host or top not in HOST, f"{module} belongs into nodes/host"
            assert not (in_core and top == "comfy_api"), f"core imports {module}"
        elif in_core:
            assert top == "core", f"core imports {module}"
        elif in_host:
            assert top == "core" or module.startswith("nodes.host"), f"the host imports {module}"


@pytest.mark.parametrize("file", [f for f in PACK if "core." in dotted(f)], ids=dotted)
def test_core_imports_its_row_or_below(file: Path) -> None:
    part = dotted(file).split(".")[1]
    assert part in ROW, f"core/{part} has no row in this test; give it one"
    for level, module in imports(file):
        if level and "." in module:
            assert ROW[module.split(".")[1]] <= ROW[part], f"core/{part} imports {module}, above it"


def test_no_import_cycle() -> None:
    graph = {dotted(file): {module for level, module in imports(file) if level} - {dotted(file)}
             for file in PACK}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", PACK, ids=dotted)
def test_no_print_and_no_broad_except(file: Path) -> None:
    """A handler that catches everything must raise it again."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{dotted(file)}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            names = ast.unparse(node.type) if node.type else "BaseException"
            broad = re.search(r"\b(Base)?Exception\b", names)
            again = any(isinstance(one, ast.Raise) for one in ast.walk(node))
            assert again or not broad, f"{dotted(file)}:{node.lineno} swallows everything"


def test_no_machine_paths() -> None:
    text = {file: file.read_text("utf-8") for file in FILES if file.suffix not in BINARY}
    found = {str(file.relative_to(ROOT)): match[0] for file, content in text.items()
             if (match := MACHINE.search(content))}
    assert found == {}


def test_core_runs_without_comfyui() -> None:
    for name in ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported by the core tests"
