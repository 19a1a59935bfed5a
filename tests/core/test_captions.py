"""Caption files as they are found, and the forms of a caption."""

from __future__ import annotations

from collections import Counter

import pytest
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.captions import (
    CaptionConfig,
    caption_file,
    read_captions,
    variants,
)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat\r\nsecond", "a cat"),
        ("Löwe".encode(), "Löwe"),
        ("Löwe".encode("latin-1"), "Löwe"),
        ("Löwe".encode("utf-16"), "Löwe"),
        (b"\n  \n a cat ", "a cat"),
        (b"", ""),
    ],
)
def test_encodings(tmp_path, data, text):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert read_captions(path, CaptionConfig()) == [text]


def test_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    found = {lines: read_captions(path, CaptionConfig(lines=lines))
             for lines in ("first", "all", "each")}  # fmt: skip
    assert found == {"first": ["one"], "all": ["one two"], "each": ["one", "two"]}


def test_files(tmp_path):
    picture = tmp_path / "a.b.png"
    assert caption_file(picture, CaptionConfig()) is None
    for name, extension in (("a.b.png.txt", ""), ("a.b.caption", ""), ("a.b.txt", ""),
                            ("a.b.tags", ".tags"), ("a.b.tags", "tags")):  # fmt: skip
        (tmp_path / name).write_text("x")
        assert caption_file(picture, CaptionConfig(extension)).name == name


def test_as_it_is():
    assert variants(["a cat, on  a mat"], CaptionConfig()) == [("a cat, on  a mat", 1.0)]


@pytest.mark.parametrize(
    ("options", "caption", "text"),
    [
        ({"prefix": "photo of", "suffix": "at night"}, "a cat", "photo of a cat at night"),
        ({"trigger": "sks"}, "a cat", "sks, a cat"),
        ({"trigger": "sks"}, "a sks cat", "a sks cat"),
        ({"trigger": "sks"}, "a [trigger] cat", "a sks cat"),
        ({"trigger": "sks"}, "", "sks"),
        ({"prefix": "photo"}, "", "photo"),
    ],
)
def test_completed(options, caption, text):
    assert variants([caption], CaptionConfig(**options)) == [(text, 1.0)]


@pytest.mark.parametrize(
    ("options", "caption", "front", "middle", "back"),
    [
        ({"keep_tokens": 2}, "a, b, c, d, e, f, g", ["a", "b"], "cdefg", []),
        ({}, "a, b ||| c, d, e, f, g", ["a", "b"], "cdefg", []),
        ({"keep_tokens": 5}, "a ||| c, d, e, f ||| g, h", ["a"], "cdef", ["g", "h"]),
        ({"separator": ";"}, "c;d; e;f ;g", [], "cdefg", []),
    ],
)
def test_tags_that_stay(options, caption, front, middle, back):
    config = CaptionConfig(shuffles=20, **options)
    forms = variants([caption], config)
    assert len(forms) > 5 and sum(share for _, share in forms) == pytest.approx(1)
    for text, _ in forms:
        tags = text.split(f"{config.separator} ")
        end = len(tags) - len(back)
        assert (tags[: len(front)], tags[end:]) == (front, back)
        assert sorted(tags[len(front) : end]) == sorted(middle)


def test_without_shuffling_the_marks_go():
    assert variants(["a ||| b, c ||| d"], CaptionConfig()) == [("a, b, c, d", 1.0)]


def test_orders_are_drawn_evenly_and_depend_on_the_seed_alone():
    config = CaptionConfig(shuffles=600, seed=3)
    assert variants(["a, b, c"], config) == variants(["a, b, c"], config)
    assert variants(["a, b, c"], config) != variants(["a, b, c"], CaptionConfig(shuffles=600))
    shares = dict(variants(["a, b, c"], config))
    assert len(shares) == 6 and all(abs(share - 1 / 6) < 0.05 for share in shares.values())


def test_dropped_tags():
    config = CaptionConfig(shuffles=400, keep_tokens=1, tag_dropout=0.25)
    counts = Counter[str]()
    for text, share in variants(["a, b, c, d"], config):
        for tag in text.split(", "):
            counts[tag] += share
    assert counts["a"] == pytest.approx(1)
    assert all(abs(counts[tag] - 0.75) < 0.07 for tag in "bcd")


def test_dropped_captions():
    assert variants(["a cat"], CaptionConfig(dropout=0.1)) == [("a cat", 0.9), ("", 0.1)]
    assert variants(["a cat"], CaptionConfig(dropout=1)) == [("", 1.0)]
    assert variants([""], CaptionConfig(dropout=0.1)) == [("", 1.0)]
    assert variants(["x", "y"], CaptionConfig(lines="each")) == [("x", 0.5), ("y", 0.5)]


@pytest.mark.parametrize(
    "options",
    [{"dropout": 1.1}, {"tag_dropout": -0.1}, {"shuffles": -1}, {"missing": "guess"},
     {"lines": "last"}, {"shuffles": 2, "separator": ""}, {"tag_dropout": 0.5}],
)  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(AdapterLabError):
        CaptionConfig(**options)
