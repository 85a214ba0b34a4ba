"""Maps over images: every picture is written whole, also with nothing to see in it."""

import numpy as np
import pytest
import torch

from vitreg_hf.analysis.figures import maps

LONG = "facebook/dinov2-with-registers-giant-imagenet1k-1-layer, a name that is far longer than a picture is wide"


def photos(count, height=32, width=48):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def captions(count):
    return [f"folder/photo number {n}.png" for n in range(count)]


def shown_maps(figure):
    return [axes.images[-1].get_array() for axes in figure.axes if axes.images]


# Attention


@pytest.mark.parametrize(
    ("count", "names", "planted"),
    [
        (1, ["CLS"], "zero"),
        (1, ["CLS", "register 1", "register 2"], "even"),
        (4, ["CLS"], "random"),
        (3, ["CLS", "register 1", "register 2", "register 3", "register 4"], "random"),
    ],
)
def test_attention_figure(drawn, count, names, planted):
    path, figures = drawn
    shape = (count, len(names), 4, 6)
    values = {"random": torch.rand(shape) / 24, "even": torch.full(shape, 0.02), "zero": torch.zeros(shape)}[planted]
    maps.attention_figure(
        photos(count), values, path, token_names=names, captions=captions(count), title=LONG, equal_share=1 / 27
    )
    assert "0.037 each" in figures[-1]._suptitle.get_text().replace("\n", " ")
    np.testing.assert_allclose(figures[-1].axes[1].images[0].get_array(), values[0, 0])
    headings = [axes.get_title() for axes in figures[-1].axes[: 1 + len(names)]]
    share = f"{100 * float(values[0, 0].sum()):.0f} % on patches"
    assert headings[:2] == ["input", f"CLS\n{share}"]


def test_maps_that_do_not_fit_are_refused(tmp_path):
    given = {"token_names": ["CLS"], "title": "t", "equal_share": 0.1}
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"maps for 2 images and 1 tokens, got \(2, 3\), and 2 captions"):
        maps.attention_figure(photos(2), torch.rand(2, 3, 4, 6), path, captions=captions(2), **given)
    with pytest.raises(ValueError, match="and 1 captions"):
        maps.attention_figure(photos(2), torch.rand(2, 1, 4, 6), path, captions=captions(1), **given)
    assert list(tmp_path.iterdir()) == []


# Norms


@pytest.mark.parametrize(
    ("count", "planted"), [(1, "outliers"), (1, "zero"), (2, "all equal"), (8, "outliers"), (1, "all equal")]
)
def test_norm_maps(drawn, count, planted):
    path, figures = drawn
    norms = np.full((count, 4, 6), 0.0 if planted == "zero" else 20.0)
    if planted == "outliers":
        norms[0, 1, 2:4] = 100
    maps.norm_maps(photos(count), norms, 40.0, path, captions=captions(count), title=LONG)
    marked = figures[-1].axes[2]
    assert marked.get_title().endswith("2 of 24 patches" if planted == "outliers" else "0 of 24 patches")
    where = ~np.ma.getmaskarray(marked.images[-1].get_array())
    np.testing.assert_array_equal(where, norms[0] > 40)


def test_norm_maps_share_one_scale(drawn):
    path, figures = drawn
    norms = np.stack([np.full((4, 6), 10.0), np.full((4, 6), 30.0)])
    maps.norm_maps(photos(2), norms, 40.0, path, captions=captions(2), title="title")
    assert {axes.images[0].get_clim() for axes in (figures[-1].axes[1], figures[-1].axes[4])} == {(0.0, 30.0)}


# Sheets


@pytest.mark.parametrize(
    ("count", "limits", "level"), [(1, None, 0.0), (1, None, None), (3, None, 0.5), (3, (-3.0, 3.0), None)]
)
def test_map_sheet(drawn, count, limits, level):
    path, figures = drawn
    generator = np.random.default_rng(0)
    values = generator.random((count, 4, 6)) if level is None else np.full((count, 4, 6), level)
    columns = [("first component", values, "RdBu_r"), ("RGB", generator.random((count, 4, 6, 3)), "")]
    maps.map_sheet(
        columns, photos(count), path, captions=captions(count), title=LONG, label="some unit", limits=limits
    )
    assert figures[-1].axes[-1].get_ylabel() == "some unit"
    expected = limits or (0.0, float(values.max()) or 1.0)
    assert figures[-1].axes[1].images[0].get_clim() == pytest.approx(expected)


def test_colour_pictures_alone_have_no_colour_bar(drawn):
    path, figures = drawn
    pictures = np.random.default_rng(0).random((2, 4, 6, 3))
    maps.map_sheet([("RGB", pictures, "")], photos(2), path, captions=captions(2), title="title", label="none")
    assert len(figures[-1].axes) == 4


def test_many_columns_and_fine_maps(drawn):
    path, figures = drawn
    columns = [(f"head {n}", np.random.default_rng(n).random((2, 32, 48)), "viridis") for n in range(9)]
    maps.map_sheet(columns, photos(2), path, captions=captions(2), title=LONG, label="attention to a patch")
    assert [axes.get_title() for axes in figures[-1].axes[:10]] == ["input", *(f"head {n}" for n in range(9))]


def test_long_names_of_columns_are_broken(drawn):
    path, figures = drawn
    columns = [(f"{n} {LONG}", np.random.default_rng(n).random((1, 4, 4)), "viridis") for n in range(3)]
    maps.map_sheet(columns, photos(1), path, captions=captions(1), title="title", label="label")
    headings = [axes.get_title() for axes in figures[-1].axes[1:4]]
    assert all(max(len(line) for line in heading.split("\n")) <= 27 for heading in headings)
    assert len(headings[0].split("\n")) > 3


# Tokens


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("level", [0.0, 0.01, None])
def test_token_maps(drawn, count, level):
    path, figures = drawn
    values = np.random.default_rng(0).random((count, 4, 6)) if level is None else np.full((count, 4, 6), level)
    names = [f"register {n}" for n in range(count)]
    maps.token_maps(values, names, path, title=LONG, label="attention to a patch")
    assert [axes.get_title() for axes in figures[-1].axes[:count]] == names
    assert figures[-1].axes[0].images[0].get_clim() == pytest.approx((0.0, float(values.max()) or 1.0))
