# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Image files in folders of classes."""

import os
from collections.abc import Iterator
from functools import cache

import PIL.Image


def class_folders(folder: str) -> dict[str, list[str]]:
    """Image files below each subfolder of a folder, both in order of their names.

    A subfolder is a class, whatever its name, and has the images at any depth below it. Links to files and folders are
    followed. Hidden files and folders and files that are no images by their ending are passed over.

    Raises:
        ValueError: if there is no such folder, it has no subfolder, or images lie beside the subfolders and so are of
            no class.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"Expected a folder of images, got {folder!r}")
    entries = sorted(
        (entry for entry in os.scandir(folder) if not _is_hidden(entry.name)), key=lambda entry: entry.name
    )
    classes = [entry for entry in entries if entry.is_dir()]
    beside = [entry.name for entry in entries if not entry.is_dir() and is_image(entry.name)]
    if not classes:
        got = "images of a single folder" if beside else "no folder"
        raise ValueError(f"Expected one subfolder per class below {folder!r}, got {got}")
    if beside:
        raise ValueError(
            f"Expected every image below {folder!r} in the folder of its class, "
            f"got {len(beside)} beside them: {', '.join(beside[:10])}"
        )
    return {entry.name: images_below(entry.path) for entry in classes}


def images_below(folder: str) -> list[str]:
    """Image files at any depth below a folder, in order of their names; what is passed over: as above."""
    return sorted(_images(folder, ()))


def is_image(name: str) -> bool:
    """Whether the ending of a file's name is that of a format which Pillow reads."""
    return os.path.splitext(name)[1].lower() in _endings()


@cache
def _endings() -> frozenset[str]:
    PIL.Image.init()
    return frozenset(ending for ending, kind in PIL.Image.EXTENSION.items() if kind in PIL.Image.OPEN)


def _images(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    for entry in os.scandir(folder):
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _images(entry.path, (*above, real))
        elif is_image(entry.name):
            yield entry.path


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))
