"""The README's tables say what the registries say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from adapter_lab.core.adapters import ALGORITHMS
from adapter_lab.core.adapters.training import choices
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.cli import TOOLS
from adapter_lab.core.keys import FORMATS
from adapter_lab.core.train.optimizers import OPTIMIZERS, PACKAGES
from adapter_lab.core.train.schedules import SCHEDULES

README = Path(__file__).parents[2] / "README.md"
PATHS = {"own": "double_blocks.0.img_attn.qkv", "diffusers": "transformer_blocks.0.attn.to_q"}


def table(first_heading: str) -> list[list[str]]:
    """Rows of the table whose header begins with `first_heading`, without backticks."""
    lines = README.read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |")) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[start:end]]


def test_algorithms() -> None:
    listed = [(row[0], row[1]) for row in table("name")]
    assert listed == [(one.name, one.title) for one in ALGORITHMS.values()]


def test_key_formats() -> None:
    examples = {row[0]: row[2] for row in table("format")}
    suffixes = {i: [*one.spellings][0] for i, one in FORMATS.items() if one.private}
    assert examples == {
        i: one.write(PATHS[one.family], suffixes.get(i, "lora_up.weight"))
        for i, one in FORMATS.items()
    }


def test_architectures() -> None:
    listed = {row[0]: row[1] for row in table("id")}
    assert list(listed) == list(ARCHITECTURES)
    assert [i for i, spec in ARCHITECTURES.items() if not listed[i].startswith(spec.title)] == []


def test_what_can_be_trained() -> None:
    listed = {row[0]: f"{row[1]}: {row[2]}" for row in table("algorithm")}
    assert listed == choices()


def test_optimizers() -> None:
    listed = [
        (package, *entry.rsplit(" ", 1))
        for package, names in table("package")
        for entry in names.split(", ")
    ]
    assert [(package, name, float(rate)) for package, name, rate in listed] == [
        (PACKAGES[row.package], name, row.rate) for name, row in OPTIMIZERS.items()
    ]


def test_schedules() -> None:
    assert [row[0] for row in table("schedule")] == [*SCHEDULES]


def test_tools_of_the_command_line() -> None:
    assert {row[0]: row[1] for row in table("tool")} == TOOLS


def test_every_optional_package_is_named() -> None:
    """By the text, and as an extra of the package."""
    project = README.with_name("pyproject.toml").read_text("utf-8")
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    wanted = {*PACKAGES.values(), "tensorboard", "wandb"} - {"torch"}
    assert {*re.findall(r'"([\w-]+)"', extras)} == wanted
    text = README.read_text("utf-8").partition("### Optional packages")[2].partition("\n## ")[0]
    assert [package for package in wanted if package not in text] == []


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8")))
def test_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()


def test_paths_in_the_text_exist() -> None:
    named = re.findall(r"`((?:core|nodes|web|workflows|tests)/[\w./]*)`", README.read_text("utf-8"))
    made = {"tests/artifacts"}
    missing = [path for path in named if path not in made and not (README.parent / path).exists()]
    assert len(named) > 10 and missing == []
