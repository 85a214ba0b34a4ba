# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoded images, tars and parquet files for tests."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import PIL.Image


def png(image: PIL.Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    """A tar of these files, in order; names that end in a slash are folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            member.size, member.type = len(content), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_table(path: Path, images: list[bytes], labels: list[Any], label_feature: Any) -> str:
    """A parquet file with columns `image` and `label`."""
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": label_feature})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)
