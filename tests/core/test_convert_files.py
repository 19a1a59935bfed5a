"""Conversion of files: one weight's modules in memory, what is inexact said, musubi's figures."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.keys import convert
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge.convert import Convert
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "musubi_convert.json"
MUSUBI = json.loads(DATA.read_text("utf-8"))
# Modules of musubi's files and their shapes.
NAMES = {
    "wan": {"blocks_0_self_attn_q": (16, 24), "blocks_3_cross_attn_k_img": (16, 24),
            "blocks_0_ffn_0": (32, 24)},
    "qwen_image": {"transformer_blocks_0_attn_add_q_proj": (16, 24),
                   "transformer_blocks_2_img_mlp_net_0_proj": (32, 24),
                   "transformer_blocks_0_img_mod_1": (16, 24)},
}  # fmt: skip
H = 24
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"


def musubi_file(arch: str, kind: str) -> Adapter:
    """As the figures were made: torch's generator of seed 0, module by module, alpha 3."""
    generator, file = torch.Generator().manual_seed(0), Adapter()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for name, (rows, width) in NAMES[arch].items():
        if kind == "lora":
            made = {"lora_down.weight": draw(4, width), "lora_up.weight": draw(rows, 4)}
        elif kind == "loha":
            made = {f"hada_w{n}_{x}": draw(*((rows, 4) if x == "a" else (4, width)))
                    for n in "12" for x in "ab"}  # fmt: skip
        else:
            made = {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(rows // 4, 4)}
            made["lokr_w2_b"] = draw(4, width // 4)
        made["alpha"] = torch.tensor(3.0)
        file.update({f"lora_unet_{name}.{suffix}": t for suffix, t in made.items()})
    return file


@pytest.mark.parametrize("case", MUSUBI)
def test_musubi_convert_lora(case: str) -> None:
    """Keys and values of kohya-ss/musubi-tuner 30c658c, convert_lora.py, --target other and back.

    Of a LoRA it puts the root of the scale into either factor, so there the products are compared.
    """
    arch, kind = case.split()
    figures, source = MUSUBI[case], musubi_file(arch, kind)
    other = convert(source, "aitoolkit", arch)
    assert sorted(other) == figures["keys"]
    for stem, (norm, first, last) in figures["products"].items():
        product = other[f"{stem}.lora_B.weight"] @ other[f"{stem}.lora_A.weight"]
        found = [float(product.norm()), float(product[0, 0]), float(product[-1, -1])]
        assert found == pytest.approx([norm, first, last], abs=2e-4)
    if figures["sha256"]:
        back = convert(other, "musubi", arch)
        digest = hashlib.sha256()
        for key in sorted(back):
            digest.update(key.encode() + back[key].contiguous().numpy().tobytes())
    else:
        back = convert(other, "musubi", arch)
    assert sorted(back) == figures["back"]


@pytest.mark.parametrize("case", [case for case in MUSUBI if MUSUBI[case]["sha256"]])
def test_musubi_loha_and_lokr_to_the_bit(case: str) -> None:
    other = convert(musubi_file(*case.split()), "aitoolkit", case.split()[0])
    digest = hashlib.sha256()
    for key in sorted(other):
        digest.update(key.encode() + other[key].contiguous().numpy().tobytes())
    assert digest.hexdigest() == MUSUBI[case]["sha256"]


def flux(algorithm: str = "lora", blocks: int = 1, width: int = H, rank: int = 4) -> Adapter:
    """q, k and v fused, in ComfyUI's names."""
    generator, file = torch.Generator().manual_seed(0), Adapter(name="x.safetensors")
    for n in range(blocks):
        config = AdapterConfig(algorithm, rank, 3, factor=5)
        made = ALGORITHMS[algorithm].init((3 * width, width), config, generator).state()
        stem = QKV.replace("0", str(n))
        file.update({f"{stem}.{s}": t if s == "alpha" else torch.randn(t.shape, generator=generator)
                     for s, t in made.items()})  # fmt: skip
    return file


@pytest.mark.parametrize("form", ["diffusers", "kohya", "lycoris", "peft"])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "full", "oft", "glora", "tlora"])
def test_by_file_as_in_memory(algorithm: str, form: str, tmp_path: Path) -> None:
    file = flux(algorithm, 2, 320)
    write_adapter(tmp_path / "a.safetensors", file)
    with AdapterFile(tmp_path / "a.safetensors") as opened:
        assert any(t.is_meta for t in opened.shell().values())
        job = Convert(opened, form, architecture="flux")
        job.write(tmp_path / "b" / "adapter_model.safetensors")
    written, expected = read_adapter(tmp_path / "b" / "adapter_model.safetensors"), convert(
        file, form, "flux")  # fmt: skip
    assert set(written) == set(expected)
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())
    configured = form == "peft" and algorithm in ("lora", "loha")
    assert written.config == expected.config and bool(written.config) == configured


@pytest.mark.parametrize("blocks", [True, False])
def test_the_scale_of_parts_trained_apart_is_told_by_the_values(
    blocks: bool, tmp_path: Path
) -> None:
    """alpha / 4 where up is block-diagonal, as sd-scripts joins them; else alpha / 12."""
    up, down = torch.randn(3 * 480, 12), torch.randn(12, 480)
    if blocks:
        up *= torch.block_diag(*[torch.ones(480, 4)] * 3)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    file = Adapter(
        {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down,
         f"{stem}.alpha": torch.tensor(2.0)},
        {"ss_network_dim": "4", "ss_network_alpha": "2",
         "ss_network_args": '{"split_qkv": "True"}'},
    )  # fmt: skip
    write_adapter(tmp_path / "a.safetensors", file)
    with AdapterFile(tmp_path / "a.safetensors") as opened:
        made = Convert(opened, "aitoolkit", architecture="flux").collect()
    product = made[f"{QKV}.lora_B.weight"] @ made[f"{QKV}.lora_A.weight"]
    expected = (2 / 4 if blocks else 2 / 12) * up @ down
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)


class Watched(AdapterFile):
    """Knows which of the tensors that it has read are still alive."""

    def __init__(self, path: Path) -> None:
        self.seen: list[weakref.ref[Tensor]] = []
        super().__init__(path)

    def __getitem__(self, key: str) -> Tensor:
        tensor = super().__getitem__(key)
        self.seen.append(weakref.ref(tensor))
        return tensor

    def living(self) -> int:
        """Number of matrices alive; those that share their memory count once."""
        tensors = [t for ref in self.seen if (t := ref()) is not None and t.numel() > 1]
        return len({tensor.data_ptr() for tensor in tensors})


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_one_weights_modules_live_at_a_time(form: str, tmp_path: Path) -> None:
    path, alive = tmp_path / "a.safetensors", []
    write_adapter(path, flux("lora", 12, 256, 8))
    with Watched(path) as opened:
        job = Convert(opened, form, architecture="flux")
        gc.disable()
        for key, tensor in job.tensors():
            opened.seen.append(weakref.ref(tensor))
            alive.append(opened.living())
            del key, tensor
        gc.enable()
    # Of one module: up and down, and of a cut one the three ranges of up.
    assert len(alive) >= 36 and max(alive) <= 5, alive


def test_what_is_inexact_is_said_kept_or_refused() -> None:
    file = flux("lokr")
    whole = _delta(file, QKV, 3 * H)
    job = Convert(file, "lycoris", architecture="flux")
    made = job.collect()
    rows = list(job.outcome.rows.values())
    assert [row.made for row in rows] == ["LoRA"] * 3 and "SVD" in job.outcome.to_text()
    for n, (row, x) in enumerate(zip(rows, "qkv", strict=True)):
        part = _delta(made, f"lycoris_transformer_blocks_0_attn_to_{x}", H)
        wanted = whole[n * H : (n + 1) * H]
        assert row.error is not None and row.error <= 0.01
        assert float((part - wanted).norm() / wanted.norm()) == pytest.approx(row.error, abs=1e-5)
    kept = Convert(file, "lycoris", architecture="flux", inexact="keep")
    assert set(kept.collect()) == {k.replace(QKV, "lycoris_double_blocks_0_img_attn_qkv")
                                   for k in file}  # fmt: skip
    assert "keep names of another family" in kept.outcome.warnings[0]
    with pytest.raises(AdapterLabError, match="no exact form with LyCORIS keys"):
        Convert(file, "lycoris", architecture="flux", inexact="error").collect()
    with pytest.raises(AdapterLabError, match="Unknown choice for inexact"):
        Convert(file, "lycoris", inexact="no")  # type: ignore[arg-type]


def test_a_given_rank_is_kept_to() -> None:
    job = Convert(flux("lokr"), "lycoris", architecture="flux", rank=3)
    job.collect()
    assert [row.rank for row in job.outcome.rows.values()] == [3, 3, 3]
    assert job.outcome.error > 0.01


def test_join_by_svd_for_kohya_and_not_where_comfyui_reads_the_parts() -> None:
    file = Adapter()
    for n, x in enumerate("qkv", 1):
        for key, tensor in flux("lokr", width=10).items():
            name = key.replace(QKV, f"transformer.transformer_blocks.0.attn.to_{x}")
            file[name] = tensor.sin() * n if "w2" in key else tensor
    # Each part is a LoKr over 30 rows of a weight of 90.
    whole = torch.cat(
        [_delta(file, f"transformer.transformer_blocks.0.attn.to_{x}", 30, 10) for x in "qkv"]
    )
    job = Convert(file, "kohya", architecture="flux", rank=10)
    joined = job.collect()
    found = _delta(joined, "lora_unet_double_blocks_0_img_attn_qkv", 90, 10)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    kept = Convert(file, "comfyui", architecture="flux")
    assert set(kept.collect()) == set(file)
    assert not kept.outcome.warnings and "reads both" in kept.outcome.to_text()


def _delta(file: Adapter, stem: str, rows: int, width: int = H) -> Tensor:
    tensors = {k.removeprefix(f"{stem}."): t for k, t in file.items() if k.startswith(f"{stem}.")}
    loaded = [a.load(tensors) for a in (ALGORITHMS["lora"], ALGORITHMS["lokr"])]
    (algorithm,) = (one for one in loaded if one is not None)
    return algorithm.delta(torch.zeros(rows, width))


@pytest.mark.parametrize("alpha", [8.0, -2.0, 3.0, 0.125])
def test_a_scale_that_is_a_power_of_two_loses_no_bit(alpha: float) -> None:
    """In bfloat16 too: (2^a up) (2^b down) is 2^(a + b) up down."""
    up, down = torch.randn(8, 4).bfloat16(), torch.randn(4, 6).bfloat16()
    file = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down,
            f"{QKV}.alpha": torch.tensor(alpha)}  # fmt: skip
    made = convert(file, "aitoolkit", "flux")
    found = made[f"{QKV}.lora_B.weight"].double() @ made[f"{QKV}.lora_A.weight"].double()
    wanted = alpha / 4 * (up.double() @ down.double())
    assert torch.equal(found, wanted) == (alpha != 3.0)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)


def test_a_scale_that_overflows_is_refused() -> None:
    file = flux("lora").cast(torch.float16)
    file[f"{QKV}.lora_up.weight"] = torch.full((3 * H, 4), 60000.0, dtype=torch.float16)
    file[f"{QKV}.alpha"] = torch.tensor(3000.0)
    with pytest.raises(AdapterLabError, match="does not fit into float16 with its scale"):
        Convert(file, "diffusers", architecture="flux").collect()
    made = Convert(file, "diffusers", architecture="flux", dtype=torch.bfloat16).collect()
    assert {t.dtype for t in made.values()} == {torch.bfloat16}


def test_network_metadata_stays_true() -> None:
    """Readers that divide ss_network_alpha by ss_network_dim must not do so again."""
    file = flux("loha")
    file.metadata = {"ss_network_dim": "4", "ss_network_alpha": "3.0", "a": "b",
                     "ss_network_args": '{"algo": "loha", "rs_lora": "True"}'}  # fmt: skip
    made = Convert(file, "bare", architecture="flux").collect()
    assert made.metadata["ss_network_alpha"] == made.metadata["ss_network_dim"] == "4"
    assert json.loads(made.metadata["ss_network_args"])["rs_lora"] == "False"
    back = Convert(made, "comfyui", architecture="flux").collect()
    assert float(back[f"{QKV}.alpha"]) == 4.0


def test_hashes_of_the_old_file_go(tmp_path: Path) -> None:
    file = flux()
    file.metadata = {"modelspec.hash_sha256": "0x1", "sshs_model_hash": "2", "modelspec.title": "t"}
    written = Convert(file, "kohya", architecture="flux").write(tmp_path / "a.safetensors")
    assert written["modelspec.title"] == "t" and "modelspec.hash_sha256" not in written
    assert len(written["sshs_model_hash"]) == 64


def test_tensors_of_no_known_algorithm_are_refused() -> None:
    """What they do to fused weights is not known, so that new names might not be true."""
    file = {f"{QKV}.fourierft_spectrum": torch.ones(100)}
    with pytest.raises(AdapterLabError, match="1 modules with diffusers keys.*no known algorithm"):
        Convert(file, "diffusers", architecture="flux")


def test_refuses_no_tensors() -> None:
    with pytest.raises(AdapterLabError, match="empty"):
        Convert({}, "kohya")
