"""Folders as other trainers lay them out."""

from __future__ import annotations

import pytest
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train import folder
from adapter_lab.core.train.folder import Source, balanced, listing, scan


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_repeats_labels_and_regularisation(tmp_path):
    make(tmp_path, "a.png", "10_sks dog/b.JPG", "10_sks dog/deep/c.webp", "reg/1_dog/d.png",
         "regularization_cats/e.png", "5_reg_dog/f.png", "regal/g.mp4")  # fmt: skip
    found = {s.name: (s.label, s.repeats, s.regularisation, s.is_clip) for s in scan(tmp_path)}
    assert found == {
        "a.png": (tmp_path.name, 1, False, False),
        "10_sks dog/b.JPG": ("sks dog", 10, False, False),
        "10_sks dog/deep/c.webp": ("deep", 10, False, False),
        "reg/1_dog/d.png": ("dog", 1, True, False),
        "regularization_cats/e.png": ("regularization_cats", 1, True, False),
        "5_reg_dog/f.png": ("reg_dog", 5, True, False),
        "regal/g.mp4": ("regal", 1, False, True),
    }
    assert [s.name for s in scan(tmp_path, recursive=False)] == ["a.png"]


def test_masks(tmp_path):
    make(tmp_path, "a.png", "a.mask.png", "b.jpg", "b-mask.png", "c.png", "c-masklabel.png",
         "face-mask.png", "d.png", "masks/d.jpg", "x/e.png", "x/mask/e.png",
         "y/f.png", "y/Masks/f.png")  # fmt: skip
    found = {s.name: s.mask and s.mask.relative_to(tmp_path).as_posix() for s in scan(tmp_path)}
    assert found == {
        "a.png": "a.mask.png", "b.jpg": "b-mask.png", "c.png": "c-masklabel.png",
        "d.png": "masks/d.jpg", "face-mask.png": None, "x/e.png": "x/mask/e.png",
        "y/f.png": "y/Masks/f.png",
    }  # fmt: skip


def test_what_is_passed_over(tmp_path):
    make(tmp_path, "a.png", ".hidden.png", ".git/b.png", "__MACOSX/c.png", "Thumbs.db", "a.txt",
         "notes.pdf")  # fmt: skip
    assert [s.name for s in scan(tmp_path)] == ["a.png"]


def test_links_in_a_circle(tmp_path):
    make(tmp_path, "x/a.png")
    (tmp_path / "x" / "again").symlink_to(tmp_path)
    assert [s.name for s in scan(tmp_path)] == ["x/a.png"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "holds nothing"),
        ("gone", "no folder"),
        ("f.txt", "a file"),
        ("0_x", "0 times"),
        ("20260115_holiday", "20260115 times"),
    ],
)
def test_unusable_folders(tmp_path, name, says):
    if name == "f.txt":
        make(tmp_path, name)
    if "_" in name:
        make(tmp_path, f"{name}/a.png")
        name = ""
    with pytest.raises(AdapterLabError, match=says):
        scan(tmp_path / name)


def test_listing_changes_with_the_files(tmp_path):
    make(tmp_path, "a.png", "sub/a.txt")
    told = [listing(tmp_path)]
    (tmp_path / "sub" / "a.txt").write_text("longer")
    told.append(listing(tmp_path))
    make(tmp_path, "b.png")
    told.append(listing(tmp_path))
    make(tmp_path, ".hidden")
    assert len(set(told)) == 3 and listing(tmp_path) == told[-1]


def test_a_home_folder_is_given_up(tmp_path, monkeypatch):
    """Where files besides pictures are too many to be captions and masks of them."""
    monkeypatch.setattr(folder, "_MOST_OTHERS", 20)
    make(tmp_path, "a.png", *(f"{d}/{i}.txt" for d in "bcd" for i in range(20)))
    for look in (scan, listing):
        with pytest.raises(AdapterLabError, match="too much else.*4[45] files and.*1 of them"):
            look(tmp_path)
        look(tmp_path, recursive=False)
    make(tmp_path, "b/b.png", "b/c.png")
    assert len(scan(tmp_path)) == 3


def test_looking_can_be_cancelled(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_TOLD", 2)
    make(tmp_path, "x/a.png", "x/a.txt", "x/b.png", "x/c.png")

    def heard(seen):
        told.append(seen)
        if seen == 4:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, heard=heard)
    assert told == [0, 2, 4]


def test_listing_is_of_what_is_scanned(tmp_path):
    make(tmp_path, "a.png", "masks/a.png", ".git/x", "sub/b.png")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    before = listing(tmp_path, recursive=False)
    make(tmp_path, "sub/c.png", ".git/y")
    assert listing(tmp_path, recursive=False) == before
    (tmp_path / "masks" / "a.png").write_bytes(b"another")
    assert listing(tmp_path, recursive=False) != before


@pytest.mark.parametrize(
    ("rest", "regular", "repeats"),
    [([10], [1, 1, 1], [4, 3, 3]), ([2, 2], [1], [4]), ([1], [3, 3], [3, 3]), ([4], [], [])],
)
def test_balance(tmp_path, rest, regular, repeats):
    """sd-scripts' counts: one more repeat for each in turn, until both are visited as often."""
    sources = [Source(tmp_path, "", "", n) for n in rest]
    sources += [Source(tmp_path, "", "", n, True) for n in regular]
    assert [s.repeats for s in balanced(sources)] == rest + repeats
