"""Attention over its image: every panel shows its own token, says its numbers, and nothing is cut off."""

import matplotlib
import numpy as np
import PIL.Image
import pytest

from vitreg_hf.analysis.figures import overlay

TITLE = "facebook/dinov2-with-registers-giant-imagenet1k-1-layer, a long name: attention in layer 40 of 40"


def photo(height=32, width=48, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def some_maps(count, rows=4, columns=6):
    values = np.random.default_rng(1).random((count, rows, columns), dtype=np.float32)
    return values / values.sum(axis=(1, 2), keepdims=True) * 0.9


def names(count):
    return ["CLS", *(f"register {n}" for n in range(1, count))]


@pytest.fixture
def draw(monkeypatch):
    """Draws an overlay and returns the picture and its figure; global state of matplotlib stays."""
    figures, created, before = [], overlay.new_figure, dict(matplotlib.rcParams)

    def keep(*size):
        figures.append(created(*size))
        return figures[-1]

    monkeypatch.setattr(overlay, "new_figure", keep)

    def draw(image, maps, title=TITLE):
        picture = overlay.attention_overlay(image, maps, token_names=names(len(maps)), title=title)
        return picture, figures[-1]

    yield draw
    assert dict(matplotlib.rcParams) == before


def texts_of(figure):
    texts = [figure._suptitle, figure._supxlabel]
    for axes in figure.axes:
        texts += [axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()] if axes.axison else []
    return [text for text in texts if text.get_text()]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("size", [(32, 48), (224, 224), (40, 160), (160, 40)])
def test_nothing_is_cut_off_and_no_texts_overlap(draw, count, size):
    picture, figure = draw(photo(*size), some_maps(count))
    assert picture.mode == "RGB"
    assert all(100 < side < 1_700 for side in picture.size)
    boxes = [text.get_window_extent() for text in texts_of(figure)]
    for text, box in zip(texts_of(figure), boxes):
        assert box.x0 >= -1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.x1 <= picture.width + 1, text.get_text()
        assert box.y1 <= picture.height + 1, text.get_text()
    named = list(zip([text.get_text() for text in texts_of(figure)], boxes))
    assert [
        (a, b) for index, (a, box) in enumerate(named) for b, other in named[index + 1 :] if box.overlaps(other)
    ] == []


def test_each_panel_shows_its_token_on_a_scale_of_its_own(draw):
    maps = some_maps(3)
    maps[1] *= 0.1
    _, figure = draw(photo(), maps)
    for axes, values, name in zip(figure.axes[1:], maps, names(3)):
        image, shown = axes.images
        np.testing.assert_allclose(shown.get_array(), values)
        assert shown.get_clim() == pytest.approx((0, values.max()))
        assert image.get_extent() == shown.get_extent()
        shares = f"{100 * values.sum():.0f} % on patches\nbrightest patch {100 * values.max():.2g} %"
        assert axes.get_title() == f"{name}\n{shares}"


def test_bright_patches_stand_where_the_map_is_high(draw):
    maps = np.zeros((1, 2, 2))
    maps[0, 1, 0] = 0.5
    picture, figure = draw(np.full((32, 32, 3), 128, np.uint8), maps)
    box = figure.axes[1].get_window_extent()
    left, right = box.x0 + box.width / 4, box.x0 + 3 * box.width / 4
    upper, lower = picture.height - box.y0 - 3 * box.height / 4, picture.height - box.y0 - box.height / 4
    points = {
        name: sum(picture.getpixel((int(x), int(y))))
        for name, x, y in [("ul", left, upper), ("ur", right, upper), ("ll", left, lower), ("lr", right, lower)]
    }
    assert points["ll"] > 2 * max(points["ul"], points["ur"], points["lr"])


def test_the_colour_bar_has_the_colours_of_the_panels(draw):
    grey = np.full((32, 32, 3), 128, np.uint8)
    maps = np.full((1, 2, 2), 0.2)
    picture, figure = draw(grey, maps)
    panel, bar = figure.axes[1].get_window_extent(), figure.axes[-1].get_window_extent()
    middle = picture.getpixel((int(panel.x0 + panel.width / 4), int(picture.height - panel.y0 - panel.height / 4)))
    end = picture.getpixel((int(bar.x1 - 3), int(picture.height - bar.y0 - bar.height / 2)))
    assert np.abs(np.subtract(middle, end)).max() <= 6


def test_the_picture_explains_itself(draw):
    _, figure = draw(photo(), some_maps(5))
    text = " ".join(text.get_text() for text in texts_of(figure)).replace("\n", " ")
    for part in (
        "attention in layer 40 of 40",
        "as the model sees it",
        "brightest patch",
        "CLS and registers are tokens",
    ):
        assert part in text


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_shown_in_grey(draw, channels):
    image = photo(channels=channels)
    _, figure = draw(image, some_maps(2))
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, image.mean(axis=2, keepdims=True).repeat(3, axis=2), atol=1)


def test_a_token_that_attends_to_no_patch(draw):
    picture, figure = draw(photo(), np.zeros((1, 4, 6)))
    assert isinstance(picture, PIL.Image.Image)
    assert "0 % on patches" in figure.axes[1].get_title()


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6), (1, 3, 4, 6)])
def test_maps_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="Expected one map"):
        overlay.attention_overlay(photo(), np.ones(shape), token_names=["CLS"], title="t")
    with pytest.raises(ValueError, match="of 0 tokens"):
        overlay.attention_overlay(photo(), np.ones((0, 4, 6)), token_names=[], title="t")
