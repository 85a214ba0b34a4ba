# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders of classes as people have them."""

from pathlib import Path

import pytest

from vitreg_hf.training.class_folders import class_folders, is_image


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def relative(found: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    return {name: [str(Path(file).relative_to(folder)) for file in files] for name, files in found.items()}


def test_images_are_found_at_any_depth_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "dog/b.png", "dog/a.JPEG", "dog/deep/er/c.webp", "cat/1.jpg", "train/t.png", "bird/readme.md")
    assert relative(class_folders(str(tmp_path)), tmp_path) == {
        "bird": [],
        "cat": ["cat/1.jpg"],
        "dog": ["dog/a.JPEG", "dog/b.png", "dog/deep/er/c.webp"],
        "train": ["train/t.png"],
    }


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.png", "cat/.b.png", "cat/._a.png", "cat/Thumbs.db", "cat/.cache/c.png", "cat/labels.csv")
    touch(tmp_path, ".git/d.png", "__MACOSX/cat/a.png", "notes.txt", ".DS_Store")
    assert relative(class_folders(str(tmp_path)), tmp_path) == {"cat": ["cat/a.png"]}


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.png", "elsewhere/more/b.png", "photos/cat/c.png")
    photos = tmp_path / "photos"
    (photos / "dog").symlink_to(tmp_path / "elsewhere")
    (photos / "cat" / "d.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (photos / "cat" / "gone.png").symlink_to("/no/such.png")
    (photos / "cat" / "back").symlink_to(photos / "cat")
    assert relative(class_folders(str(photos)), photos) == {
        "cat": ["cat/c.png", "cat/d.png", "cat/gone.png"],
        "dog": ["dog/a.png", "dog/more/b.png"],
    }


def test_folders_without_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a folder of images, got '/no/such"):
        class_folders("/no/such")
    with pytest.raises(ValueError, match=r"one subfolder per class below .*, got no folder"):
        class_folders(str(tmp_path))
    touch(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"one subfolder per class below .*, got images of a single folder"):
        class_folders(str(tmp_path))
    touch(tmp_path, "cat/b.png")
    with pytest.raises(ValueError, match=r"in the folder of its class, got 1 beside them: a.png"):
        class_folders(str(tmp_path))


def test_endings_are_those_that_pillow_reads() -> None:
    assert all(is_image(name) for name in ("a.png", "a.JPG", "a.b.tiff", "a.webp", "a.bmp"))
    assert not any(is_image(name) for name in ("a", "png", "a.txt", "a.json", "a.png.txt"))
