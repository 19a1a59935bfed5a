"""What the command line refuses: one sentence on stderr, exit code 1, nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import bench_files
import pytest
import torch
from adapter_lab.core import cli
from safetensors.torch import load_file, save_file

OUT = "o.safetensors"
# The least that each tool takes.
WORDS = {
    "ema": ["run-1.safetensors", "run-2.safetensors", "--profile", "power"],
    "merge": ["a.safetensors", "b.safetensors"],
    "bake": ["base.safetensors", "a.safetensors"],
    "extract": ["base.safetensors", "tuned.safetensors"],
    "resize": ["b.safetensors", "--rank", "2"],
    "convert": ["a.safetensors", "--to", "kohya", "--architecture", "flux"],
    "quantize": ["base.safetensors"],
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = bench_files.model(tmp_path / "base.safetensors")
    bench_files.model(tmp_path / "tuned.safetensors", 1, like=base)
    for step in (1, 2):
        bench_files.lora(tmp_path / f"run-{step}.safetensors", step, step=step)
    bench_files.lora(tmp_path / "a.safetensors", 1)
    bench_files.lora(tmp_path / "b.safetensors", 2, rank=8)
    other = {
        "patch_embedding.weight": torch.ones(8, 4, 1, 2, 2),
        "head.head.weight": torch.ones(8, 8),
    }
    other |= {f"blocks.0.{n}.weight": torch.ones(8, 8) for n in ("self_attn.q", "ffn.0")}
    save_file(other, tmp_path / "wan.safetensors")
    wan = {f"diffusion_model.blocks.0.ffn.0.{n}": torch.ones(8, 8) for n in
           ("lora_up.weight", "lora_down.weight")}  # fmt: skip
    save_file(wan, tmp_path / "wan-lora.safetensors", {"ss_base_model_version": "wan2.1"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], tool: str, *words: object, out: str = OUT) -> str:
    """The sentence with which a command is refused, the same with and without --json."""
    before = sorted(os.listdir())
    command = [tool, *map(str, words), *([] if tool == "inspect" else ["-o", out])]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith("\n") and said.err.count("\n") == 1, said
    assert cli.main([*command, "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out) == {"error": said.err.strip()} and told.err == said.err
    assert sorted(os.listdir()) == before
    return said.err


@pytest.mark.parametrize("tool", WORDS)
def test_output_that_is_an_input(files, capsys, tool):
    os.symlink(WORDS[tool][0], "link.safetensors")
    before = Path(WORDS[tool][0]).read_bytes()
    for out in (WORDS[tool][0], "./" + WORDS[tool][0], "link.safetensors"):
        said = refused(capsys, tool, *WORDS[tool], "--overwrite", out=out)
        assert f"Cannot write '{out}': it is an input" in said
    assert Path(WORDS[tool][0]).read_bytes() == before


@pytest.mark.parametrize("tool", WORDS)
def test_output_that_exists_or_can_not_be_a_file(files, capsys, tool):
    Path(OUT).write_bytes(b"precious")
    assert "it exists already. Use --overwrite" in refused(capsys, tool, *WORDS[tool])
    assert Path(OUT).read_bytes() == b"precious"
    assert "it is a folder" in refused(capsys, tool, *WORDS[tool], out=".")
    assert "not a safetensors file" in refused(capsys, tool, *WORDS[tool], out="o.ckpt")
    assert f"{OUT}' is no folder" in refused(capsys, tool, *WORDS[tool], out=f"{OUT}/p.safetensors")
    assert cli.main([tool, *WORDS[tool], "-o", OUT, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == OUT and load_file(OUT)


@pytest.mark.parametrize("tool", ["inspect", *WORDS])
def test_inputs_that_are_none(files, capsys, tool):
    rest = WORDS.get(tool, [""])[1:]
    for name, why in (("none.safetensors", "none.safetensors' does not exist"),
                      ("none-*.safetensors", "matches no")):  # fmt: skip
        said = refused(capsys, tool, name, *rest)
        assert why in said or (tool == "ema" and "none" in said), said


@pytest.mark.parametrize("tool", ["inspect", *WORDS])
def test_a_file_that_is_still_being_written(files, capsys, tool):
    """As a training leaves it for a moment where it does not write in one go."""
    name = WORDS.get(tool, ["a.safetensors"])[0]
    Path(name).write_bytes(Path(name).read_bytes()[:-100])
    said = refused(capsys, tool, name, *WORDS.get(tool, [""])[1:])
    assert name in said and "bytes" in said


@pytest.mark.parametrize("tool", ["inspect", *WORDS])
def test_nan_in_a_weight(files, capsys, tool):
    name = WORDS.get(tool, ["a.safetensors"])[0]
    tensors = load_file(name)
    key = next(k for k in tensors if "img_mlp.0" in k and k.endswith("weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, name, bench_files.METADATA | {"ss_steps": "1"})
    said = refused(capsys, tool, name, *WORDS.get(tool, [""])[1:])
    assert "NaN" in said and "img_mlp.0" in said


@pytest.mark.parametrize("tool", WORDS)
def test_a_disk_that_is_full(files, capsys, tool):
    """To a program a limit on the size of its files is the same."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        said = refused(capsys, tool, *WORDS[tool])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert said.startswith(f"Cannot write '{OUT}': ") and "File too large" in said


def test_averages_of_what_is_no_series(files, capsys):
    power = ["--profile", "power"]
    assert "run-1.safetensors" in refused(capsys, "ema", "run-1.safetensors", *power)  # one file
    assert "twice" in refused(capsys, "ema", "run-1.safetensors", "run-1.safetensors", *power)
    bench_files.lora(files / "run-3.safetensors", 3, rank=8, step=3)
    said = refused(capsys, "ema", "run-*.safetensors", *power)
    assert "lora_up.weight" in said and "run-3.safetensors" in said
    for width in (0, 0.3, "nan"):
        said = refused(capsys, "ema", *WORDS["ema"], "--sigma-rel", width)
        assert "0.2886" in said
    assert "tracked" in refused(capsys, "ema", "run-1.safetensors", "run-2.safetensors")


def test_ratios_and_strengths(files, capsys):
    assert "nan" in refused(capsys, "merge", *WORDS["merge"], "--ratios", "nan", "1")
    assert "0" in refused(capsys, "merge", *WORDS["merge"], "--ratios", "0", "0")
    assert "2" in refused(capsys, "merge", *WORDS["merge"], "--ratios", "1", "1", "1")
    assert "nan" in refused(capsys, "bake", *WORDS["bake"], "--strengths", "nan")
    assert "strength of 0" in refused(capsys, "bake", *WORDS["bake"], "--strengths", "0")
    said = refused(capsys, "bake", *WORDS["bake"], "--strengths", "1", "2")
    assert "2 strengths for 1 adapters, expected one for each" in said


def test_negative_numbers_however_they_are_written(files, capsys):
    """argparse alone takes -1e-3 for an option."""
    words = ["merge", *WORDS["merge"], "-o", OUT, "--overwrite", "--ratios", "1"]
    made = []
    for ratio in ("-0.001", "-1e-3", "-.1E-2"):
        assert cli.main([*words, ratio]) == 0
        made.append(load_file(OUT))
    for other in made[1:]:
        assert all(torch.equal(other[key], tensor) for key, tensor in made[0].items())
    with pytest.raises(SystemExit):
        cli.main([*words, "-1.2.3e4"])


def test_a_config_that_is_not_the_outputs_own_stays(files, capsys):
    """That of the input, whose scale it tells, among them; --overwrite is about the file."""
    words = ["a.safetensors", "--to", "peft", "--architecture", "flux"]
    config = Path("adapter_config.json")
    config.write_text('{"r": 4, "lora_alpha": 3}', "utf-8")
    said = refused(capsys, "convert", *words, "--overwrite")
    assert "adapter_config.json': it exists already" in said
    assert config.read_text("utf-8") == '{"r": 4, "lora_alpha": 3}'
    out = "folder/adapter_model.safetensors"
    for _ in range(2):  # with its file it is replaced
        assert cli.main(["convert", *words, "-o", out, "--overwrite"]) == 0
        made = json.loads(Path("folder/adapter_config.json").read_text("utf-8"))
        assert made["r"] == made["lora_alpha"] == 4
        Path("folder/adapter_config.json").write_text("{}", "utf-8")


def test_models_and_adapters_that_do_not_belong_together(files, capsys):
    said = refused(capsys, "extract", "base.safetensors", "wan.safetensors")
    assert "FLUX.1" in said and "Wan" in said
    assert "same file" in refused(capsys, "extract", "base.safetensors", "base.safetensors")
    said = refused(capsys, "merge", "a.safetensors", "wan-lora.safetensors")
    assert "FLUX.1" in said and "Wan" in said
    assert "wan-lora" in refused(capsys, "bake", "base.safetensors", "wan-lora.safetensors")
    said = refused(capsys, "bake", "base.safetensors", "*.safetensors")  # models among them
    assert "is an input" not in said


def test_rules_patterns_and_names(files, capsys):
    b = "b.safetensors"
    assert "parameter" in refused(capsys, "resize", b, "--rule", "sv_ratio", "--parameter", 0.5)
    assert "negative" in refused(capsys, "resize", b, "--rank", -1)
    said = refused(capsys, "quantize", "base.safetensors", "--keep", "(")
    assert "'(' is not a regular expression" in said
    said = refused(capsys, "quantize", "base.safetensors", "--keep", ".*")
    assert "no layer to quantise: found 8 linear layers, all kept" in said
    assert "is an adapter" in refused(capsys, "quantize", "a.safetensors")
    said = refused(capsys, "quantize", "base.safetensors", "--max-error", "nan")
    assert "'max_error' is out of range: found nan, expected 0 or more" in said
    words = ["base.safetensors", "--adapter", "[ab].safetensors", "--strengths", 1, 2, 3]
    assert "3 strengths for 2 adapters" in refused(capsys, "quantize", *words)
    said = refused(capsys, "quantize", "base.safetensors", "--strengths", 2)
    assert "1 strengths for 0 adapters" in said
    save_file(load_file("a.safetensors"), "untold.safetensors")
    said = refused(capsys, "convert", "untold.safetensors", "--to", "kohya")
    assert "several architectures" in said and "FLUX.1" in said
    said = refused(capsys, "resize", "*.safetensors", "--rank", 2)
    assert "matches" in said and "expected one" in said


def test_a_model_that_is_quantised_already(files, capsys):
    assert cli.main(["quantize", "base.safetensors", "-o", "small.safetensors"]) == 0
    capsys.readouterr()
    said = refused(capsys, "quantize", "small.safetensors")
    assert "'small.safetensors' is quantised already: found" in said
    said = refused(capsys, "bake", "small.safetensors", "a.safetensors")
    assert "stored quantised" in said and "float8_e4m3fn" in said
    words = ["bake", "small.safetensors", "a.safetensors", "--quantised", "dequantise", "-o", OUT]
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    "words", [[], ["train"], ["merge"], ["merge", "a.safetensors"], ["resize", "a", "-o", "b", "c"],
              ["merge", "a", "-o", "b", "--method", "sum"], ["convert", "a", "-o", "b"],
              ["resize", "a", "-o", "b", "--rank", "two"],
              ["resize", "a", "-o", "b", "--ran", "2"]],
    ids=" ".join,
)  # fmt: skip
def test_a_command_line_that_makes_no_sense(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("usage: adapter-lab")
    with pytest.raises(SystemExit):
        cli.main([*words, "--json"])
    told = capsys.readouterr()
    assert told.err.endswith(f"error: {json.loads(told.out)['error']}\n")
