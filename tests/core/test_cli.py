"""The command line: every tool writes what the same call from Python writes, bit by bit."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import adapter_samples
import bench_files
import pytest
import torch
from adapter_lab.core import cli, lazy
from adapter_lab.core.cli.progress import Progress
from adapter_lab.core.files import read_adapter
from adapter_lab.core.keys import describe
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge.bake import bake
from adapter_lab.core.merge.combine import Merge
from adapter_lab.core.merge.convert import Convert
from adapter_lab.core.merge.ema import Average, Settings, plan
from adapter_lab.core.merge.extract import Extract
from adapter_lab.core.merge.ranks import RankRule
from adapter_lab.core.merge.resize import Resize
from adapter_lab.core.quant import quantize_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

COMMAND = [sys.executable, "-m", "adapter_lab.core"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a fine-tune of it and LoRAs."""
    folder = tmp_path_factory.mktemp("files")
    base = bench_files.model(folder / "base.safetensors")
    bench_files.model(folder / "tuned.safetensors", 1, like=base)
    for step in (100, 200, 300):
        bench_files.lora(folder / f"run-{step:06d}.safetensors", step, step=step)
    bench_files.lora(folder / "a.safetensors", 1)
    bench_files.lora(folder / "b.safetensors", 2, rank=8)
    return folder


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False
    )


# tool -> (words of the command, the same from Python; both are for a folder of files and an output)
TOOLS = {
    "ema": (
        ["run-*.safetensors", "--profile", "power", "--sigma-rel", "0.2"],
        lambda f, out: Average(
            plan(sorted(f.glob("run-*")), "power", Settings(sigma_rel=0.2))).write(out),
    ),
    "merge": (
        ["a.safetensors", "b.safetensors", "--ratios", "0.7", "-0.5", "--dtype", "bf16"],
        lambda f, out: Merge(
            [AdapterFile(f / "a.safetensors"), AdapterFile(f / "b.safetensors")], [0.7, -0.5],
            dtype=torch.bfloat16).write(out),
    ),
    "bake": (
        ["base.safetensors", "a.safetensors", "b.safetensors", "--strengths", "0.5", "-0.25",
         "--dtype", "bf16"],
        lambda f, out: bake(
            f / "base.safetensors", out, [(f / "a.safetensors", 0.5), (f / "b.safetensors", -0.25)],
            dtype="bf16"),
    ),
    "extract": (
        ["base.safetensors", "tuned.safetensors", "--rule", "error", "--parameter", "0.01",
         "--exact", "--dtype", "fp16"],
        lambda f, out: Extract(
            f / "base.safetensors", f / "tuned.safetensors",
            rule=RankRule("error", 0.01, 16), exact=True, dtype=torch.float16).write(out),
    ),
    "resize": (
        ["b.safetensors", "--rule", "sv_fro", "--parameter", "0.9", "--rank", "5"],
        lambda f, out: Resize(
            AdapterFile(f / "b.safetensors"), RankRule("sv_fro", 0.9, 5)).write(out),
    ),
    "convert": (
        ["a.safetensors", "--to", "kohya", "--architecture", "flux", "--dtype", "fp16"],
        lambda f, out: Convert(
            AdapterFile(f / "a.safetensors"), "kohya", architecture="flux",
            dtype=torch.float16).write(out),
    ),
    "quantize": (
        ["base.safetensors", "--format", "int8_row", "--keep", r".*img_mlp\.0", "--keep-worst", "1",
         "--max-error", "50", "--full-precision", "--adapter", "a.safetensors", "--adapter",
         "b.safetensors", "--strengths", "0.5", "-0.25"],
        lambda f, out: quantize_file(
            f / "base.safetensors", out, format="int8_row", keep=[r".*img_mlp\.0"], worst=1,
            most=0.5, full_precision=True,
            adapters=[(f / "a.safetensors", 0.5), (f / "b.safetensors", -0.25)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_writes_what_the_call_writes(files, tmp_path, tool):
    words, call = TOOLS[tool]
    ours, other = tmp_path / "ours" / "out.safetensors", tmp_path / "other" / "out.safetensors"
    done = run(tool, *words, "-o", ours, "--json", cwd=files)
    assert (done.returncode, done.stderr) == (0, "")
    other.parent.mkdir()
    call(files, other)
    expected = load_file(other)
    found = load_file(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name
    said = json.loads(done.stdout)
    with safe_open(ours, "pt") as file:
        assert said["metadata"] == (file.metadata() or {})
    assert (said["tool"], said["out"]) == (tool, str(ours))
    assert said["verdict"] or tool == "convert"
    assert all((files / path).is_file() for path in said["inputs"])
    assert os.listdir(ours.parent) == ["out.safetensors"]


def test_averages_products_on_request(files, tmp_path, monkeypatch, capsys):
    """The sum of three products of rank 4 has more ranks than the result, so an error is told."""
    monkeypatch.chdir(files)
    words = ["ema", *TOOLS["ema"][0], "--products", "-o", str(tmp_path / "o.safetensors")]
    assert cli.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(row["error"] for row in rows.values())  # which no average of factors has


def test_text_says_the_outcome_and_the_path(files, tmp_path, capsys):
    out = str(tmp_path / "o.safetensors")
    words = ["resize", str(files / "b.safetensors"), "-o", out, "--rank", "2", "--quiet"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("resized 5 modules") and said.out.endswith(f"saved: {out}\n")
    assert said.err == ""


def test_inspect_tells_every_file_of_a_glob_and_what_fits(files):
    done = run("inspect", "[ab].safetensors", "--model", "base.safetensors", "--json", cwd=files)
    assert (done.returncode, done.stderr) == (0, "")
    one, two = json.loads(done.stdout)["files"]
    assert (one["path"], two["path"]) == ("a.safetensors", "b.safetensors")
    assert (one["ranks"], two["ranks"]) == ([[4, 2.0, 5]], [[8, 2.0, 5]])
    assert one["architecture"] == "flux" and one["metadata"]["ss_output_name"] == "toy"
    assert len(one["report"]["matched"]) == 5 and not one["report"]["unmatched"]
    # Of a whole file, not of a shell without values.
    assert one["parameters"] == sum(t.numel() for t in load_file(files / "a.safetensors").values())


@pytest.mark.parametrize("shape", [(16, 12), (16, 12, 3, 3)], ids=["linear", "convolution"])
def test_inspect_tells_of_any_algorithm_what_the_whole_file_tells(tmp_path, monkeypatch, shape):
    """It reads the numbers of small tensors only; here these are those of one or two numbers."""
    monkeypatch.setattr(lazy, "_SMALL", 16)
    for i, (name, tensors) in enumerate(adapter_samples.samples(shape).items()):
        path = tmp_path / f"{i}.safetensors"
        save_file({f"lora_unet_x.{suffix}": t.contiguous() for suffix, t in tensors.items()}, path)
        with AdapterFile(path) as file:
            told, whole = describe(file.shell()), describe(read_adapter(path))
        assert told.to_dict() == whole.to_dict(), name
        assert whole.algorithms and not whole.broken, name


def test_text_for_a_console_without_the_letters(tmp_path, monkeypatch):
    bench_files.lora(tmp_path / "a.safetensors", 1, ss_training_comment="naïve 猫")
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert rb"ss_training_comment: na\xefve \u732b" in console.buffer.getvalue()


def test_a_pipe_that_nobody_reads_any_more(files):
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, "inspect", "a.safetensors"]
    done = subprocess.run(command, cwd=files, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_needs_no_torch_and_names_every_tool():
    code = (
        "import sys; from adapter_lab.core.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), 'slow start'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {tool} " in done.stdout for tool in ("inspect", *TOOLS))


@pytest.mark.parametrize("tool", cli.TOOLS)
def test_help_of_a_tool_explains_every_argument(tool, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([tool, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"examples: adapter-lab {tool} " in said
    module = __import__(f"adapter_lab.core.cli.{tool}", fromlist=["arguments"])
    for argument in module.arguments():
        assert len(argument.options["help"]) > 5, argument.names
        assert argument.options.get("metavar", argument.names[-1]) in said


def test_version_is_that_of_the_project(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert end.value.code == 0
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in project.read_text("utf-8")


class Terminal(io.StringIO):
    """A stream that says it is a terminal; Ctrl-C comes with the first line written to it."""

    def __init__(self, *, cancels: bool = False) -> None:
        super().__init__()
        self.cancels = cancels

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.cancels:
            self.cancels = False
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def interruptible() -> None:
    """Hear Ctrl-C even where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_leaves_no_file_and_what_was_there(files, tmp_path, monkeypatch, tool):
    interruptible()
    words, _ = TOOLS[tool]
    out = tmp_path / "o.safetensors"
    out.write_bytes(b"as it was")
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal(cancels=True))
    assert cli.main([tool, *words, "-o", str(out), "--overwrite"]) == 130
    assert "Cancelled" in terminal.getvalue()
    assert os.listdir(tmp_path) == ["o.safetensors"] and out.read_bytes() == b"as it was"


@pytest.mark.skipif(os.name == "nt", reason="signals to another process")
def test_ctrl_c_at_a_running_command(tmp_path):
    rng = torch.Generator().manual_seed(0)
    wide = {f"blocks.{i}.ffn.0.diff": torch.randn(768, 768, generator=rng) for i in range(60)}
    save_file(wide, tmp_path / "a.safetensors")
    words = ["resize", "a.safetensors", "-o", "o.safetensors", "--rank", "4", "--exact"]
    command = subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=interruptible,
    )  # fmt: skip
    held = Path(f"/proc/{command.pid}/fd")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and command.poll() is None:
        links = [os.readlink(fd) for fd in held.iterdir() if fd.is_symlink()]
        if any(link.startswith(str(tmp_path)) and "deleted" in link for link in links):
            break  # the spool is open: the work has begun
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out, err) == (130, b"", b"Cancelled; no file was written.\n")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_progress_is_a_line_that_changes_on_a_terminal_and_rare_lines_in_a_log():
    terminal, log, none = Terminal(), io.StringIO(), Terminal()
    for stream, quiet in ((terminal, False), (log, False), (none, True)):
        with Progress(stream, quiet=quiet) as tick:
            for i in range(50):
                tick(i, 50, "resizing x" * 100)
    line, end, rest = terminal.getvalue().split("\r\x1b[K")[1:] + [""]
    assert line.startswith("0/50 resizing x") and len(line) < 1000 and end == rest == ""
    assert log.getvalue() == none.getvalue() == ""
