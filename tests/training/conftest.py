# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Fixtures of the training tests: no shared cache of datasets, and image files of every mode."""

from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

MODES = ("L", "RGB", "RGBA", "P", "I;16", "CMYK", "1", "LA")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def image_of_mode(mode: str, seed: int = 0, height: int = 20, width: int = 30) -> PIL.Image.Image:
    """Noise in one of Pillow's modes."""
    noise = np.random.default_rng(seed)
    if mode == "I;16":
        return PIL.Image.fromarray(noise.integers(0, 65536, (height, width), dtype=np.uint16))
    return PIL.Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes, `cat` and `dog`, with one image of each mode and a few more of RGB."""
    folder = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index, mode in enumerate((*MODES, *("RGB",) * 4)):
            suffix = "tif" if mode == "CMYK" else "png"
            file = folder / name / f"{index:02d}_{mode.replace(';', '')}.{suffix}"
            image_of_mode(mode, seed=100 * label + index).save(file)
    return folder
