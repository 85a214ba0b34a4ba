# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures: written whole, right in size, and without a trace in matplotlib's global state."""

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch

from vitreg_hf.analysis.figures import attention_figure, training_curve


def results_of(epochs, train_accuracy=0.5):
    curve = [
        {"epoch": e, "train_loss": 1 / e, "train_accuracy": train_accuracy, "eval_loss": 2 / e, "eval_accuracy": 0.7}
        for e in range(1, epochs + 1)
    ]
    return {
        "model": {"name": "a-model"},
        "data": {"source": "digits", "train_images": 10},
        "metrics": {"accuracy": 0.7, "n": 5},
        "hyperparameters": {"label_smoothing_factor": 0.1},
        "curve": curve,
    }


@pytest.mark.parametrize("train_accuracy", [0.5, None])
def test_training_curve(tmp_path, train_accuracy):
    path = tmp_path / "curve.png"
    training_curve(results_of(3, train_accuracy), path)
    with PIL.Image.open(path) as picture:
        assert picture.size == (1500, 630)
        assert len(picture.convert("RGB").getcolors(100_000)) > 50
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


def test_no_epoch_no_picture(tmp_path):
    with pytest.raises(ValueError, match="at least one epoch"):
        training_curve(results_of(0), tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "columns", "patches"), [(1, 1, 4), (3, 5, 4), (2, 2, 32)])
def test_attention_figure(tmp_path, rows, columns, patches):
    path = tmp_path / "attention.png"
    maps = torch.rand(rows, columns, patches, patches) / patches**2
    attention_figure(
        np.zeros((rows, 64, 64, 3), np.uint8),
        maps,
        path,
        token_names=["CLS", "register 1", "register 2", "register 3", "register 4"][:columns],
        captions=["an image"] * rows,
        title="a model",
        equal_share=0.05,
    )
    with PIL.Image.open(path) as picture:
        assert picture.width > 150 * columns
        assert picture.height > 150 * rows


def test_what_does_not_fit_is_refused(tmp_path):
    images, maps = np.zeros((2, 8, 8, 3), np.uint8), torch.rand(2, 1, 4, 4)
    rest = {"title": "", "equal_share": 0.05}
    with pytest.raises(ValueError, match=r"2 images and 2 tokens, got \(2, 1\), and 2 captions"):
        attention_figure(images, maps, tmp_path / "a.png", token_names=["CLS", "x"], captions=["", ""], **rest)
    with pytest.raises(ValueError, match="and 1 captions"):
        attention_figure(images, maps, tmp_path / "a.png", token_names=["CLS"], captions=[""], **rest)


def test_global_state_is_left_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    training_curve(results_of(2), tmp_path / "curve.png")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
