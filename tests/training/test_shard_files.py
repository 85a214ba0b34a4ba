# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Patterns of shards, counting without reading, and files of class names."""

from pathlib import Path

import datasets
import pytest

from vitreg_hf.training.shard_files import count_rows, matching_files, read_class_names

from .encoded import write_table, write_tar

ENDINGS = (".tar", ".parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-009.tar", "a-010.tar", "a-011.tar", "b-010.tar", "x{1}.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a-*.tar", ["a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{a,b}-{009..010}.tar", ["a-009.tar", "a-010.tar", "b-010.tar"]),
        ("a-0{10..11}.tar", ["a-010.tar", "a-011.tar"]),
        ("", ["a-009.tar", "a-010.tar", "a-011.tar", "b-010.tar", "x{1}.tar"]),
        ("b-010.tar", ["b-010.tar"]),
        ("x{1}.tar", ["x{1}.tar"]),
        ("{a,a}-01?.tar", ["a-010.tar", "a-011.tar"]),
    ],
)
def test_patterns(folder: Path, pattern: str, found: list[str]) -> None:
    assert matching_files(f"{folder}/{pattern}", ENDINGS) == [f"{folder}/{name}" for name in found]


def test_of_addresses_only_braces_are_expanded() -> None:
    files = matching_files("hf://datasets/one/two/a-{08..10}.tar", ENDINGS)
    assert files == [f"hf://datasets/one/two/a-{number}.tar" for number in ("08", "09", "10")]


def test_a_pattern_without_files_is_refused(folder: Path) -> None:
    for pattern in ("c-*.tar", "{c,d}.tar"):
        with pytest.raises(ValueError, match=r"Expected .tar or .parquet files, got none for"):
            matching_files(f"{folder}/{pattern}", ENDINGS)


def test_samples_of_a_tar_are_counted_as_they_are_read(tmp_path: Path) -> None:
    files = {"photos/": b"", **{f"photos/{number}.txt": b"first ones that agree" for number in range(5)}}
    files |= {
        "photos/a.txt": b"0",
        "photos/.hidden.txt": b"no",
        "photos/a.cls": b"0",
        "photos/b.txt": b"1",
        "photos/b.seg.txt": b"one more field",
        "photos/__MACOSX.txt": b"no",
        "README": b"no ending",
        "v1.0/b.txt": b"2",
        "v1.0/c.txt": b"3",
    }
    file = write_tar(tmp_path / "a.tar", files)
    rows = datasets.load_dataset("webdataset", data_files={"train": [file]}, split="train", streaming=True)
    assert count_rows(file) == len(list(rows)) == 9


def test_rows_of_a_parquet_file_are_counted(tmp_path: Path) -> None:
    assert count_rows(write_table(tmp_path / "a.parquet", [b"x"] * 7, [0] * 7, datasets.Value("int64"))) == 7


def test_what_would_have_to_be_read_is_not_counted(tmp_path: Path) -> None:
    assert count_rows(str(tmp_path / "a.tar.gz")) is None
    assert count_rows("https://example.org/a.tar") is None


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n wild dog \n\n")
    assert read_class_names(str(tmp_path / "names.txt")) == ["cat", "wild dog"]
    (tmp_path / "twice.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match=r"two or more different class names in '.*twice.txt', got 2 different"):
        read_class_names(str(tmp_path / "twice.txt"))
    with pytest.raises(ValueError, match="a file with one class name a line, got '/no/such'"):
        read_class_names("/no/such")
