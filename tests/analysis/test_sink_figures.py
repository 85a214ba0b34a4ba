# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of attention sinks: written whole, and showing what they are given."""

import numpy as np
import PIL.Image
import pytest

from vitreg_hf.analysis import figures
from vitreg_hf.analysis.figures import canvas, sinks

NOTHING = {"mean": None, "low": None, "high": None, "n": 0}


def interval(mean, width=0.1):
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": 9}


def layers_of(first=1, **columns):
    return [
        {"layer": first + i, **{name: values[i] for name, values in columns.items()}}
        for i in range(len(next(iter(columns.values()))))
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was saved last, for a look at what is in it."""
    kept = {}

    def keep(figure, path):
        kept["figure"] = figure
        canvas.save(figure, path)

    monkeypatch.setattr(sinks, "save", keep)
    return kept


def texts_in(figure):
    parts = [figure._suptitle.get_text()] if figure._suptitle else []
    for axes in figure.axes:
        parts += [
            axes.get_title(),
            axes.get_xlabel(),
            axes.get_ylabel(),
            *(t.get_text() for t in axes.get_yticklabels()),
        ]
    return " | ".join(parts)


def check_png(path):
    with PIL.Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 20
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing unfinished beside it


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 3), (12, 6)])
def test_logit_maps_share_a_scale_and_leave_out_what_is_masked(tmp_path, drawn, count, columns):
    maps = {
        f"layer {i}": np.where(np.tri(6), np.random.default_rng(i).normal(size=(6, 6)), np.nan) for i in range(count)
    }
    path, positions = tmp_path / "logits.png", ["[CLS]", "1", "2", "3", "4", "[SEP]"]
    figures.logit_maps(maps, path, columns=columns, positions=positions, title="a model, 9 texts")
    check_png(path)
    images = [axes.images[0] for axes in drawn["figure"].axes if axes.images]
    assert len(images) == count
    assert len({image.get_clim() for image in images}) == 1
    assert all(np.isnan(image.get_array().filled(np.nan)[0, 1:]).all() for image in images)
    assert "a model, 9 texts" in texts_in(drawn["figure"])
    assert "[CLS]" in texts_in(drawn["figure"])


def test_kind_curves_leave_out_what_no_text_has(tmp_path, drawn):
    some = layers_of(share=[interval(0.5), interval(0.6)], times_even=[interval(4.0), interval(8.0)])
    none = layers_of(share=[interval(0.0), interval(0.0)], times_even=[NOTHING, NOTHING])
    kinds = {
        "[CLS]": {"layers": some, "even_share": interval(0.1)},
        "newline": {"layers": none, "even_share": interval(0.0)},
    }
    figures.kind_curves(kinds, tmp_path / "kinds.png", title="a model, 9 texts")
    check_png(tmp_path / "kinds.png")
    share, times = drawn["figure"].axes
    assert share.lines[0].get_ydata() == pytest.approx([50, 60])
    assert times.lines[0].get_ydata() == pytest.approx([4, 8])
    assert len(times.lines[1].get_ydata()) == 0
    assert len(share.collections) == 2  # bands
    assert len(times.collections) == 1


@pytest.mark.parametrize(("kinds", "layers", "heads"), [(1, 1, 1), (4, 6, 12), (5, 32, 32)])
def test_kind_heads_have_a_map_per_kind_in_percent(tmp_path, drawn, kinds, layers, heads):
    shares = {f"kind {i}": np.random.default_rng(i).random((layers, heads)) for i in range(kinds)}
    figures.kind_heads(shares, tmp_path / "heads.png", title="a model, 9 texts")
    check_png(tmp_path / "heads.png")
    images = [axes.images[0] for axes in drawn["figure"].axes if axes.images]
    assert len(images) == kinds
    assert images[0].get_array().filled() == pytest.approx(100 * shares["kind 0"])
    assert {image.get_clim() for image in images} == {(0, 100)}


def test_sink_curves(tmp_path, drawn):
    tokens = {"[CLS]": layers_of(score=[interval(0.9), interval(1.0)], times_even=[interval(9.0), interval(10.0)])}
    figures.text_sink_curves(tokens, 0.3, tmp_path / "sinks.png", title="a model, 9 texts")
    check_png(tmp_path / "sinks.png")
    score, times = drawn["figure"].axes
    assert score.lines[0].get_ydata() == pytest.approx([90, 100])
    assert times.lines[0].get_ydata() == pytest.approx([9, 10])
    assert "more than 0.3 of all attention" in texts_in(drawn["figure"])


def test_channel_curves_keep_the_layers_of_each_place(tmp_path, drawn):
    names = ("sigma_outliers", "kurtosis", "infinity_norm")
    places = {
        "FFN output": layers_of(1, **{name: [interval(5.0), interval(7.0)] for name in names}),
        "residual stream": layers_of(0, **{name: [interval(1.0), interval(2.0), interval(3.0)] for name in names}),
    }
    figures.text_channel_curves(places, tmp_path / "channels.png", title="a model, 9 texts")
    check_png(tmp_path / "channels.png")
    ffn, residual = drawn["figure"].axes[1].lines
    assert list(ffn.get_xdata()) == [1, 2]
    assert list(residual.get_xdata()) == [0, 1, 2]
    assert residual.get_ydata() == pytest.approx([1, 2, 3])


def test_one_text_has_no_band(tmp_path, drawn):
    alone = {"mean": 2.0, "low": None, "high": None, "n": 1}
    figures.text_sink_curves(
        {"[CLS]": layers_of(score=[alone], times_even=[alone])}, 0.3, tmp_path / "a.png", title="a"
    )
    assert not drawn["figure"].axes[0].collections


def test_outliers_are_drawn_at_their_token_and_channel(tmp_path, drawn):
    sigmas = np.random.default_rng(0).normal(size=(4, 50))
    sigmas[2, 30], sigmas[1, 7], sigmas[0, 5] = 40, -8, 5.9
    tokens = ["[CLS]", "a", "$x_y$", "[SEP]"]  # a dollar is no formula
    figures.outlier_tokens(sigmas, tokens, 30, tmp_path / "outliers.png", title="a model: layer 1, text 1 of 9")
    check_png(tmp_path / "outliers.png")
    (points,) = drawn["figure"].axes[0].collections
    assert {tuple(place) for place in points.get_offsets().tolist()} == {(30, 2), (7, 1)}
    assert "2 of 200 values are beyond 6 standard deviations" in texts_in(drawn["figure"])


def test_head_at_rest_shows_attention_values_and_what_is_taken(tmp_path, drawn):
    attention, values = np.full((3, 3), 1 / 3), np.array([0.1, 2.0, 3.0])
    tokens, path = ["[CLS]", "$1$", "Ġcat"], tmp_path / "head.png"
    figures.head_at_rest(attention, values, values / 2, tokens, path, title="a model: layer 2, head 3")
    check_png(path)
    maps, offered, taken = drawn["figure"].axes[:3]
    assert maps.images[0].get_array().filled() == pytest.approx(attention)
    assert [bar.get_width() for bar in offered.patches] == pytest.approx(values)
    assert [bar.get_width() for bar in taken.patches] == pytest.approx(values / 2)
    assert [label.get_text() for label in maps.get_xticklabels()] == [r"[CLS]", r"\$1\$", "Ġcat"]
    assert offered.get_xlim() == taken.get_xlim()
