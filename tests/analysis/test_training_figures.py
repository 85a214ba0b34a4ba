# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a training: its steps, and what augmentation makes of its images."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.patches import Patch

from vitreg_hf.analysis.figures import Sample, augmentation_sheet, step_curves, training_curve

PUBLISHED = Path(__file__).parents[2] / "model_cards" / "vitreg-digits" / "results.json"


def records(count, *fields):
    made = {"loss": lambda n: 2.0 / n, "learning_rate": lambda n: 0.1, "gradient_norm": lambda n: 1.0 * n}
    return [{"step": 10 * n, **{f: made.get(f, lambda n: 5.0)(n) for f in fields}} for n in range(1, count + 1)]


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes]


def texts_of(legend):
    return [text.get_text() for text in legend.get_texts()]


# Steps


def test_a_panel_for_each_thing_that_was_recorded(drawn):
    path, figures = drawn
    step_curves(records(40, "loss", "learning_rate", "gradient_norm"), path, title="a model", max_grad_norm=1.0)
    figure = figures[-1]
    assert titles_of(figure) == ["Training loss", "Learning rate", "Gradient"]
    loss, _, gradient = figure.axes
    np.testing.assert_allclose(loss.get_lines()[0].get_xydata()[:2], [[10, 2], [20, 1]])
    assert loss.get_yscale() == "log"  # it falls by a factor of 40
    assert texts_of(gradient.get_legend()) == ["all, before clipping", "clipped to 1"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            ["output_norm_cls", "output_cosine_registers"],
            ["after the final norm", "of an image, after the final norm"],
        ),
        (
            ["output_norm_cls", "residual_norm_cls", "output_cosine_registers", "residual_cosine_registers"],
            ["before the final norm", "of an image, before the final norm"],
        ),
    ],
)
def test_tokens_are_shown_before_the_norm_where_they_were_measured_there(drawn, fields, expected):
    path, figures = drawn
    step_curves(records(3, *fields), path, title="a model")
    tokens, registers = figures[-1].axes
    assert tokens.get_title() == f"Tokens {expected[0]}"
    assert [line.get_label() for line in registers.get_lines()] == [expected[1]]


def test_numbers_that_were_not_finite_are_gaps(drawn):
    path, figures = drawn
    steps = records(4, "loss", "gradient_norm")
    steps[2]["gradient_norm"] = None
    steps[1]["register_norm"] = None
    step_curves(steps, path, title="a model")
    assert titles_of(figures[-1]) == ["Training loss", "Gradient"]
    assert np.isnan(figures[-1].axes[1].get_lines()[0].get_ydata()[2])


def test_a_single_record_is_a_dot(drawn):
    path, figures = drawn
    step_curves(records(1, "loss"), path, title="a model")
    assert figures[-1].axes[0].get_lines()[0].get_marker() == "o"


def test_no_record_no_picture(tmp_path):
    with pytest.raises(ValueError, match="Expected records of steps, got none"):
        step_curves([], tmp_path / "steps.png", title="a model")


def test_the_curve_of_results_without_steps_is_as_it_was(drawn):
    path, figures = drawn
    results = {name: section for name, section in json.loads(PUBLISHED.read_text()).items() if name != "steps"}
    training_curve(results, path)
    assert len(figures[-1].axes) == 2
    assert tuple(figures[-1].get_size_inches()) == (10, 4.2)


def test_the_curve_of_results_with_steps_has_their_panels_below(drawn):
    path, figures = drawn
    results = json.loads(PUBLISHED.read_text())
    training_curve(results | {"steps": records(5, "loss", "learning_rate", "gradient_norm", "register_norm")}, path)
    below = ["Training loss", "Learning rate", "Gradient", "Learned registers"]
    assert sorted(titles_of(figures[-1])[:-2]) == sorted(below)
    assert titles_of(figures[-1])[-1] == "Accuracy"


# Augmentations


def photo(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def sheet(rows, path, **more):
    names = ["original", *(f"augmented {n}" for n in range(1, len(rows[0])))]
    captions = [f"class {n}" for n in range(len(rows))]
    augmentation_sheet(rows, path, **{"column_names": names, "captions": captions, "title": "photos", **more})


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_row_per_image_and_a_column_per_variant(drawn, channels):
    path, figures = drawn
    rows = [[Sample(photo(30, 40, channels)), *(Sample(photo(16, 16, channels)) for _ in range(3))] for _ in range(2)]
    sheet(rows, path)
    grid = figures[-1].axes
    assert [axes.get_title() for axes in grid[:4]] == ["original", "augmented 1", "augmented 2", "augmented 3"]
    assert [grid[0].get_ylabel(), grid[4].get_ylabel()] == ["class 0", "class 1"]
    shown = grid[0].get_images()[0].get_array()
    assert shown.shape == (30, 40, 3)
    if channels == 3:
        np.testing.assert_array_equal(shown, rows[0][0].image)
    with PIL.Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 100


def test_crops_are_drawn_in_one_scale_and_say_their_size(drawn):
    path, figures = drawn
    sheet([[Sample(photo(300, 400)), Sample(photo(64, 64)), Sample(photo(32, 24))]], path)
    original, large, small = figures[-1].axes
    assert original.get_xlim() == (0, 400)
    assert large.get_xlim() == (0, 64)
    assert small.get_xlim() == (-20, 44)
    assert small.get_ylim() == (48, -16)
    assert [axes.texts[0].get_text() for axes in figures[-1].axes] == ["400 by 300 px", "64 by 64 px", "24 by 32 px"]


def test_masks_are_coloured_by_class_and_what_is_left_out_is_not(drawn):
    path, figures = drawn
    mask = np.full((8, 8), 255)
    mask[:4], mask[4:6] = 7, 2
    sheet([[Sample(photo(8, 8), mask), Sample(photo(8, 8))]], path, mask_classes={2: "cat", 7: "sky"})
    masked, plain = figures[-1].axes
    colours = masked.get_images()[1].get_array()
    assert colours.mask[6:].all()
    assert not colours.mask[:6].any()
    assert (colours[:4] == 1).all()
    assert (colours[4:6] == 0).all()
    assert len(plain.get_images()) == 1
    (legend,) = figures[-1].legends
    assert texts_of(legend) == ["cat", "sky", "no colour: left out of the loss"]
    assert all(isinstance(handle, Patch) for handle in legend.legend_handles)


def test_many_classes_have_colours_but_no_legend(drawn):
    path, figures = drawn
    sheet([[Sample(photo(8, 8), np.arange(64).reshape(8, 8))]], path, mask_classes={n: str(n) for n in range(64)})
    assert figures[-1].legends == []


@pytest.mark.parametrize(
    ("lengths", "names", "captions"), [([], 0, 0), ([2, 1], 2, 2), ([1], 1, 0), ([1], 2, 1), ([0], 1, 1), ([0], 0, 1)]
)
def test_rows_that_do_not_fit_are_refused(tmp_path, lengths, names, captions):
    rows = [[Sample(photo(8, 8))] * length for length in lengths]
    labels = {"column_names": ["a"] * names, "captions": ["b"] * captions}
    with pytest.raises(ValueError, match="one for each column"):
        augmentation_sheet(rows, tmp_path / "sheet.png", title="photos", **labels)
    assert list(tmp_path.iterdir()) == []
