"""Pictures of before and after, and of trials: what stands on them is what they were given."""

import numpy as np
import pytest

from vitreg_hf.analysis.figures.mended import before_after_figure, trials_figure

from .conftest import labels_of

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
NORMS = RANDOM.random((2, 4, 4)) * 30 + 170, RANDOM.random((2, 4, 4)) * 20
ATTENTION = RANDOM.random((2, 4, 4)) * 5, RANDOM.random((2, 4, 4))
CAPTIONS = ["an owl", "a newt"]


def pictured(figure):
    """The maps over images, row by row: title, values and scale of each."""
    found = []
    for axes in figure.axes:
        overlays = [image for image in axes.images if image.get_array().ndim == 2]
        found += [(axes.get_title(), np.asarray(one.get_array()), one.get_clim()) for one in overlays]
    return found


def test_before_and_after_stand_side_by_side_on_one_scale(drawn):
    path, figures = drawn
    shares = ([0.91, 0.5], [0.09, 0.1])
    before_after_figure(IMAGES, NORMS, ATTENTION, path, captions=CAPTIONS, title="a model", on_patches=shares)
    maps = pictured(figures[-1])
    assert len(maps) == 8
    expected = [NORMS[0][0], NORMS[1][0], ATTENTION[0][0], ATTENTION[1][0]]
    expected += [NORMS[0][1], NORMS[1][1], ATTENTION[0][1], ATTENTION[1][1]]
    for (_, values, _), wanted in zip(maps, expected, strict=True):
        assert np.isclose(np.unique(values), np.unique(wanted).astype(values.dtype)).all()
    scales = {name: {limits for _, _, limits in maps[start::4]} for start, name in enumerate("abcd")}
    assert scales["a"] == scales["b"] == {(0, NORMS[0].max())}
    assert scales["c"] == scales["d"] == {(0, ATTENTION[0].max())}
    titles = [title for title, *_ in maps]
    assert titles[:2] == ["norm of each patch\nbefore", "norm of each patch\nafter"]
    assert titles[2:4] == [
        "what CLS attends to\nbefore\n91 % on patches",
        "what CLS attends to\nafter\n9 % on patches",
    ]
    assert titles[6:] == ["50 % on patches", "10 % on patches"]


def test_without_a_cls_norms_stand_alone(drawn):
    path, figures = drawn
    before_after_figure(IMAGES[:1], (NORMS[0][:1], NORMS[1][:1]), None, path, captions=["x"], title="a model")
    assert len(pictured(figures[-1])) == 2


def test_maps_of_nothing_are_drawn(drawn):
    path, _ = drawn
    zeros = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    before_after_figure(IMAGES, zeros, zeros, path, captions=CAPTIONS, title="a model " * 30)
    assert path.is_file()


TRIALS = [
    {"count": count, "outlier_share": share, "largest_norm": norm, "pooled_cosine": cosine}
    for count, share, norm, cosine in [(0, 0.05, 400.0, 1.0), (1, 0.04, 380.0, 0.99), (5, 0.0, 60.0, 0.7)]
]


@pytest.mark.parametrize("chosen", [5, 7], ids=["one of those tried", "told"])
def test_trials_are_curves_over_how_many_were_moved(drawn, chosen):
    path, figures = drawn
    trials_figure(TRIALS, chosen, path, title="a model")
    panels = figures[-1].axes
    names = ("outlier_share", "largest_norm", "pooled_cosine")
    for axes, name, factor in zip(panels, names, (100, 1, 1), strict=True):
        measured = next(line for line in axes.lines if line.get_label() == "measured")
        assert measured.get_ydata().tolist() == pytest.approx([factor * trial[name] for trial in TRIALS])
        assert labels_of(axes.xaxis) == ["0", "1", "5"]
        assert axes.get_ylim()[0] <= min(measured.get_ydata())
        marked = [line for line in axes.lines if line.get_label() == f"taken: {chosen}"]
        assert len(marked) == (chosen == 5)
        assert all(list(line.get_xdata()) == [2, 2] for line in marked)
