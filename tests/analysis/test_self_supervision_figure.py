# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The curve of a self-supervised training is a picture of what the results say."""

from pathlib import Path

import PIL.Image
import pytest
from matplotlib.axes import Axes

from vitreg_hf.analysis.figures.self_supervision import knn_curve


@pytest.fixture
def results() -> dict:
    losses = {"dino_loss": 4.0, "ibot_loss": 2.0, "koleo_loss": -0.5, "gram_loss": 0.0}
    return {
        "curve": [{"step": 0, "knn_accuracy": 0.5}, *({"step": s, "knn_accuracy": 0.8, **losses} for s in (10, 20))],
        "metrics": {"untrained_knn_accuracy": 0.5, "knn_accuracy": 0.8, "n": 360, "neighbours": 20},
        "model": {"name": "vitreg-digits-dino"},
        "data": {"train_images": 1437},
    }


def test_accuracy_and_the_losses_that_are_on_are_drawn(
    results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    plot = Axes.plot

    def recorded(axes: Axes, steps: list, values: list, *arguments: object, **options: object) -> object:
        drawn.append((list(steps), list(values)))
        return plot(axes, steps, values, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", recorded)
    knn_curve(results, tmp_path / "knn.png")
    assert drawn == [
        ([0, 10, 20], [50.0, 80.0, 80.0]),
        *(([10, 20], [value, value]) for value in (4.0, 2.0, -0.5)),
    ]
    with PIL.Image.open(tmp_path / "knn.png") as picture:
        assert picture.width > 1000


def test_an_untrained_network_alone_is_no_curve(results: dict, tmp_path: Path) -> None:
    results["curve"] = results["curve"][:1]
    with pytest.raises(ValueError, match="Expected a curve of at least two evaluations, got 1"):
        knn_curve(results, tmp_path / "knn.png")
    assert not list(tmp_path.iterdir())
