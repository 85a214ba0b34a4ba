"""Curves and histograms: every picture is written whole, also of data with nothing in it."""

import numpy as np
import pytest

from vitreg_hf.analysis.figures import curves
from vitreg_hf.analysis.figures.canvas import fitted, new_figure, plain_ticks


def legend_of(figure):
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


LONG = "facebook/dinov2-with-registers-giant-imagenet1k-1-layer, a name that is far longer than a picture is wide"

# Norms


@pytest.mark.parametrize(
    "norms",
    [
        {"a": np.random.default_rng(0).lognormal(3, 0.3, 2_000)},
        {"a": np.full(50, 5.0), "b": np.full(80, 5.0)},
        {"a": np.array([3.0])},
        {"a": np.zeros(10)},
        {"a": np.concatenate([np.full(1_000, 20.0), np.full(2, 500.0)])},
    ],
    ids=["one group", "all equal", "one patch", "zero", "outliers"],
)
def test_norm_histogram(drawn, norms):
    path, figures = drawn
    curves.norm_histogram(norms, dict.fromkeys(norms, 40.0), path, title=LONG)
    assert f"{next(iter(norms))}, {len(norms['a']):,} patches" in legend_of(figures[-1])
    axes = figures[-1].axes[0]
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 40  # the cutoff is seen


def states(count, outliers=0.0, factor=1.0, **other):
    return [
        {
            "layer": layer,
            "norm_percentile_2": factor * (10 + layer),
            "norm_median": factor * (20 + layer),
            "norm_percentile_98": factor * (30 + layer),
            "norm_max": factor * (40 + layer),
            "outlier_share": outliers,
            "infinity_norm": factor * (7 + layer),
            "kurtosis": 3.1,
            "sigma_outliers": outliers,
            **other,
        }
        for layer in range(count)
    ]


@pytest.mark.parametrize(("count", "outliers"), [(1, 0.0), (2, 0.02), (41, 0.0), (41, 1.0)])
def test_layer_curves(drawn, count, outliers):
    path, figures = drawn
    curves.layer_curves({"a": states(count, outliers), LONG[:30]: states(count, outliers, 30)}, path, title=LONG)
    share = figures[-1].axes[1]
    assert share.get_ylim()[1] >= max(1.0, 100 * outliers) * (1 if outliers == 0 else 1.05)
    assert -0.1 * share.get_ylim()[1] < share.get_ylim()[0] <= 0  # no percentages below zero
    assert all(place == int(place) for place in share.get_xticks())


@pytest.mark.parametrize(
    ("low", "high", "between"),
    [(7.3, 48, {"10", "20"}), (0.95, 1.5, {"1.0", "1"}), (0.02, 600, {"0.1", "1", "10", "100"}), (5, 5, set())],
)
def test_log_axes_have_plain_numbers(drawn, low, high, between):
    path, figures = drawn
    figure = new_figure(5, 4)
    axes = figure.subplots()
    axes.plot([0, 1], [low, high])
    axes.set(yscale="log", title="title")
    plain_ticks(axes.yaxis)
    curves.save(figure, path)
    bottom, top = axes.get_ylim()
    seen = [label.get_text() for label in axes.yaxis.get_ticklabels() if bottom <= label.get_position()[1] <= top]
    assert 2 <= len(seen) <= 14
    assert all(set(label) <= set("0123456789.,") for label in seen)
    assert not between or between & set(seen)
    assert len(figures) == 1


# Other curves


@pytest.mark.parametrize(
    ("outlier", "normal"),
    [
        (np.linspace(0.8, 1, 30), np.linspace(-0.3, 1, 500)),
        (np.empty(0), np.linspace(0, 1, 50)),
        (np.linspace(0, 1, 50), np.empty(0)),
        (np.full(5, -0.9), np.full(5, 1.0)),
        (np.full(5, 0.5), np.nextafter(np.full(5, 1.0, np.float32), np.float32(2))),
    ],
    ids=["both", "no outlier", "all outliers", "far below", "rounded above 1"],
)
def test_similarity_density(drawn, outlier, normal):
    path, figures = drawn
    curves.similarity_density(outlier, normal, path, title=LONG)
    assert legend_of(figures[-1]) == [
        f"normal in the output, {len(normal):,} patches",
        f"outlier in the output, {len(outlier):,} patches",
    ]
    left = figures[-1].axes[0].get_xlim()[0]
    assert all(values.min() >= left for values in (outlier, normal) if len(values))


@pytest.mark.parametrize(("layers", "registers"), [(1, 0.0), (3, 0.3), (40, 0.3)])
def test_mass_curve(drawn, layers, registers):
    path, figures = drawn
    curves.mass_curve([[0.1, registers, 0.9 - registers]] * layers, "CLS", path, title=LONG)
    expected = ["on patches", "on registers", "on CLS"] if registers else ["on patches", "on CLS"]
    assert legend_of(figures[-1]) == expected
    tops = [bar.get_y() + bar.get_height() for bar in figures[-1].axes[0].patches]
    assert max(tops) == pytest.approx(100)


@pytest.mark.parametrize(("layers", "times"), [(1, 1.0), (2, 1.1), (24, 300.0)])
def test_sink_curves(drawn, layers, times):
    path, figures = drawn
    names = ["CLS", "register 1", "register 2", "patch that gets most"]
    rows = [{"name": name, "times_uniform": [times] * layers, "score": [0.0] * layers} for name in names]
    curves.sink_curves(rows, path, title=LONG)
    assert legend_of(figures[-1]) == names
    assert "log scale" in figures[-1].axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("count", "missing"), [(1, {}), (7, {"sigma_outliers": None}), (2, {"kurtosis": None, "sigma_outliers": None})]
)
def test_channel_curves(drawn, count, missing):
    path, figures = drawn
    curves.channel_curves({"a": states(count, 0.2, **missing), "b": states(count)}, path, title=LONG)
    lines = [axes.get_lines() for axes in figures[-1].axes]
    assert [len(per_axes) for per_axes in lines] == [2, 2, 2]
    assert figures[-1].axes[2].get_ylim()[0] == 0


def test_a_state_without_a_number_is_a_gap(drawn):
    path, figures = drawn
    some = states(4)
    some[1]["kurtosis"] = None
    curves.channel_curves({"a": some}, path, title="title")
    assert np.isnan(figures[-1].axes[1].get_lines()[0].get_ydata()).tolist() == [False, True, False, False]


def difference(n, name="quantity {n} of patches"):
    planted, none = {"low": 0.5, "mean": 1.0, "high": 1.5}, {"low": 0.0, "mean": 0.0, "high": 0.0}
    told = {"difference": (planted, none)[n % 2], "differs": n % 2 == 0}
    return {"name": name.format(n=n), "unit": "%", **told}


@pytest.mark.parametrize("rows", [1, 12])
def test_differences(drawn, rows):
    path, figures = drawn
    curves.differences({LONG: [difference(n) for n in range(rows)]}, LONG, path, title="Two models, 12 images")
    assert len(figures[-1].axes) == rows
    colours = [axes.get_lines()[1].get_color() for axes in figures[-1].axes]
    assert colours == [curves.COLOURS[3] if n % 2 == 0 else curves.COLOURS[7] for n in range(rows)]
    assert all(axes.get_xlim()[0] < 0 < axes.get_xlim()[1] for axes in figures[-1].axes)
    assert figures[-1].axes[0].get_title() == "quantity 0 of patches (%)"


def test_differences_of_several_models_share_a_panel(drawn):
    """Each quantity lists the models that have it, from above, and one that lacks it is left out."""
    path, figures = drawn
    rows = {
        "with registers": [difference(0, "outliers"), difference(1, "area")],
        LONG: [difference(1, "outliers")],
        "tuned": [difference(1, "outliers"), difference(0, "area"), difference(0, "mass")],
    }
    curves.differences(rows, "original", path, title="Four models, 12 images")
    titles = [axes.get_title() for axes in figures[-1].axes]
    assert titles == ["outliers (%)", "area (%)", "mass (%)"]
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in figures[-1].axes]
    assert labels[0] == ["with registers", fitted(LONG, 2.4, 8), "tuned"]
    assert labels[1:] == [["with registers", "tuned"], ["tuned"]]
    dots = [axes.get_lines()[2::2] for axes in figures[-1].axes]
    assert [[tuple(dot.get_xydata()[0]) for dot in panel] for panel in dots] == [
        [(1.0, 0), (0.0, 1), (0.0, 2)],
        [(0.0, 0), (1.0, 1)],
        [(1.0, 0)],
    ]
    assert all(axes.yaxis_inverted() for axes in figures[-1].axes)
    assert "each minus original" in figures[-1]._suptitle.get_text()


@pytest.mark.parametrize("count", [1, 4, 6])
def test_equal_curves_of_several_models_do_not_hide_one_another(drawn, count):
    path, figures = drawn
    named = {f"{n} {LONG}": states(5, 0.1) for n in range(count)}
    curves.layer_curves(named, path, title="title")
    norm, share = figures[-1].axes
    for lines in (norm.get_lines()[::2], share.get_lines()):
        widths = [line.get_linewidth() for line in lines]
        assert len(set(widths)) == count
        assert widths == sorted(widths, reverse=True)  # drawn from wide to narrow
        assert len({line.get_color() for line in lines}) == count
    assert [name.replace("\n", " ") for name in legend_of(figures[-1])] == list(named)


def test_histograms_of_many_models_have_no_areas(drawn):
    path, figures = drawn
    norms = {f"{name} {LONG}": np.random.default_rng(0).lognormal(3, 0.3, 500) for name in "abcd"}
    curves.norm_histogram(norms, dict.fromkeys(norms, 40.0), path, title="title")
    filled = [patch for patch in figures[-1].axes[0].patches if patch.get_fill()]
    assert [patch.get_alpha() for patch in filled] == [0.0] * 4
    assert len(legend_of(figures[-1])) == 8


def test_more_models_than_colours_are_all_drawn(drawn):
    path, figures = drawn
    curves.channel_curves({f"model {n}": states(2) for n in range(8)}, path, title="eight")
    assert len(legend_of(figures[-1])) == 8


# Titles


def test_titles_are_broken_where_the_picture_ends():
    assert fitted("short", 7) == "short"
    assert fitted("first\nsecond", 7) == "first\nsecond"
    lines = fitted("word " * 60, 5).split("\n")
    assert len(lines) > 2
    assert max(len(line) for line in lines) <= 5 * 72 / 6
    assert " ".join(lines) == " ".join(["word"] * 60)
