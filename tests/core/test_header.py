"""Malformed files: each gives one clear error that names the file."""

from __future__ import annotations

import io
import json
import pickle
import random

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter, read_header, stream
from adapter_lab.core.header import DTYPES, encode, layout
from safetensors.torch import save


def header(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (1,), span: object = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": span})


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    return buffer.getvalue()


GOOD = save({"a": torch.arange(8.0), "b": torch.zeros(3, dtype=torch.bfloat16)}, {"k": "v"})
A = '{"a":' + entry() + "}"

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "one byte": (b"\0", "damaged or missing"),
    "seven bytes": (GOOD[:7], "damaged or missing"),
    "text": (b"hello, this is no model at all\n", "a text file"),
    "short text": (b"hi\n", "a text file"),
    "text, not ASCII": ("日本語のテキストファイル、長い長い説明".encode() * 3, "a text file"),
    "JSON": (b'{"lora": 1}', "a text file"),
    "web page": (b"<!DOCTYPE html><html><title>Log in", "a web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "GGUF": (b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0", "GGUF"),
    "torch zip": (torch_zip(), "zip archive or PyTorch"),
    "pickle 2": (pickle.dumps({"a": 1}, 2), "pickle"),
    "pickle 4": (pickle.dumps({"a": list(range(99))}, 4), "pickle"),
    "noise": (random.Random(0).randbytes(500), "damaged or missing"),
    "zeros": (bytes(100), "damaged or missing"),
    "cut in the header": (GOOD[:60], "longer than the file"),
    "cut in the data": (GOOD[:-1], "cut off"),
    "without data": (GOOD[:-38], "cut off"),
    "trailing bytes": (GOOD + b"\0", "too long for its header"),
    "absurd length": ((10**9).to_bytes(8, "little") + b"{}" + bytes(99), "1000000000 bytes"),
    "claims more": (header('{"a":' + entry("F32", [9], [0, 36]) + "}", b"1234"), "cut off"),
    "claims petabytes": (header('{"a":' + entry("U8", [10**15], [0, 10**15]) + "}"), "cut off"),
    "no JSON": (header("{nonsense"), "not valid JSON"),
    "JSON with a tail": (header(A + "]", bytes(4)), "not valid JSON"),
    "no UTF-8": (header(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (header('{"a":' + "[" * 200_000), "not valid JSON"),
    "huge number": (header('{"a":' + "9" * 9999 + "}"), "not valid JSON"),
    "lone surrogate": (header('{"\\ud800":' + entry() + "}", bytes(4)), "not valid JSON"),
    "key twice": (header('{"a":' + entry() + ',"a":' + entry() + "}", bytes(4)), "'a' twice"),
    "inner key twice": (header('{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' twice"),
    "entry a list": (header('{"a": []}'), "expected an object"),
    "entry null": (header('{"a": null}'), "expected an object"),
    "no dtype": (header('{"a":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)), "dtype None"),
    "unknown dtype": (header('{"a":' + entry("F12") + "}", bytes(4)), "dtype 'F12'"),
    "dtype a list": (header('{"a":' + entry([]) + "}", bytes(4)), "dtype []"),
    "shape a number": (header('{"a":' + entry("F32", 1) + "}", bytes(4)), "shape 1"),
    "shape negative": (header('{"a":' + entry("F32", [-1]) + "}", bytes(4)), "shape [-1]"),
    "negative twice": (header('{"a":' + entry("F32", [-1, -1]) + "}", bytes(4)), "shape [-1, -1]"),
    "shape of floats": (header('{"a":' + entry("F32", [1.0]) + "}", bytes(4)), "shape [1.0]"),
    "shape of bools": (header('{"a":' + entry("F32", [True]) + "}", bytes(4)), "shape [True]"),
    "shape overflows": (header('{"a":' + entry("F32", [0, 2**62], [0, 0]) + "}"), "shape"),
    "offsets of strings": (header('{"a":' + entry(span="04") + "}", bytes(4)), "data_offsets '04'"),
    "three offsets": (header('{"a":' + entry(span=[0, 4, 4]) + "}", bytes(4)), "data_offsets"),
    "offsets reversed": (header('{"a":' + entry(span=[4, 0]) + "}", bytes(4)), "data_offsets"),
    "too few bytes": (header('{"a":' + entry("F32", [2]) + "}", bytes(4)), "8 bytes for F32"),
    "too many bytes": (header('{"a":' + entry("F16", [1]) + "}", bytes(4)), "2 bytes for F16"),
    "overlap": (
        header('{"a":' + entry(span=[0, 4]) + ',"b":' + entry(span=[2, 6]) + "}", bytes(6)),
        "'b' overlaps",
    ),
    "same bytes": (
        header('{"a":' + entry() + ',"b":' + entry() + "}", bytes(4)),
        "overlaps",
    ),
    "hole": (
        header('{"a":' + entry(span=[0, 4]) + ',"b":' + entry(span=[5, 9]) + "}", bytes(9)),
        "'b' follows a hole",
    ),
    "hole in front": (header('{"a":' + entry(span=[4, 8]) + "}", bytes(8)), "'a' follows a hole"),
    "metadata a list": (header('{"__metadata__": []}'), "metadata is not text"),
    "metadata null": (header('{"__metadata__": null}'), "metadata is not text"),
    "metadata number": (header('{"__metadata__": {"k": 1}}'), "'k' is not text"),
    "metadata nested": (header('{"__metadata__": {"k": {"a": "b"}}}'), "'k' is not text"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files(case, tmp_path):
    content, says = BAD[case]
    path = tmp_path / "bad one.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_adapter, lambda p: next(stream(p))):
        with pytest.raises(AdapterLabError) as caught:
            read(path)
        text = str(caught.value)
        assert str(path) in text and says in text
        assert len(text) < 700 and "\n" not in text and text.endswith(".")


def test_not_a_file(tmp_path):
    with pytest.raises(AdapterLabError, match=r"missing\.safetensors.*No such file"):
        read_adapter(tmp_path / "missing.safetensors")
    with pytest.raises(AdapterLabError, match="it is a folder"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterLabError, match="not a regular file"):
        read_adapter("/dev/zero")


@pytest.mark.parametrize("cut", range(0, len(GOOD), 7))
def test_every_truncation_is_refused(cut, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(GOOD[:cut])
    with pytest.raises(AdapterLabError):
        read_adapter(tmp_path / "cut.safetensors")


def test_a_damaged_header_never_escapes(tmp_path):
    rng, path = random.Random(1), tmp_path / "f.safetensors"
    end = 8 + int.from_bytes(GOOD[:8], "little")
    refused = 0
    for _ in range(600):
        content = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(end)] = rng.choice(b'{}[]",:0123456789-eE\\ux\0\xff ')
        path.write_bytes(content)
        try:
            read_adapter(path)
        except AdapterLabError:
            refused += 1
    assert 200 < refused < 600


def test_header_of_a_good_file(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(GOOD)
    found = read_header(tmp_path / "good.safetensors")
    assert found.metadata == {"k": "v"} and found.size == len(GOOD)
    assert [(n, i.dtype, i.shape) for n, i in found.tensors.items()] == [
        ("a", "F32", (8,)), ("b", "BF16", (3,)),
    ]  # fmt: skip
    info = found.tensors["a"]
    start = found.data_offset + info.start
    assert GOOD[start : start + 4 * 8] == torch.arange(8.0).numpy().tobytes()


def test_the_header_need_not_be_in_the_order_of_the_data(tmp_path):
    text = '{"b":' + entry("U8", [2], [4, 6]) + ',"a":' + entry() + "}"
    (tmp_path / "a.safetensors").write_bytes(header(text, bytes(4) + b"\1\2"))
    assert list(read_header(tmp_path / "a.safetensors").tensors) == ["a", "b"]
    assert read_adapter(tmp_path / "a.safetensors")["b"].tolist() == [1, 2]


def test_the_order_and_spelling_are_those_of_the_reference():
    tensors = {f"{n}.{d}": torch.zeros(2, dtype=d) for d in DTYPES.values() for n in ('b"', "aé\t")}
    infos = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    metadata = {"ss_é": 'quote " backslash \\ tab \t bell \x07 \x7f 🎈'}
    expected = save(tensors, metadata)
    found = encode(layout(infos), metadata)
    assert expected.startswith(found)
    assert len(found) % 8 == 0


@pytest.mark.parametrize(
    ("infos", "says"),
    [
        ({"a": (torch.complex128, (1,))}, "complex128"),
        ({"a": ("F12", (1,))}, "F12"),
        ({"__metadata__": (torch.float32, (1,))}, "not a name"),
        ({7: (torch.float32, (1,))}, "found 7"),
    ],
)
def test_layouts_that_no_file_can_have(infos, says):
    with pytest.raises(AdapterLabError, match=says):
        layout(infos)


def test_names_that_no_file_can_have():
    with pytest.raises(AdapterLabError, match="not valid Unicode"):
        encode({}, {"k": "\ud800"})
    with pytest.raises(AdapterLabError, match="too long"):
        encode({}, {"k": "x" * 100_000_001})
