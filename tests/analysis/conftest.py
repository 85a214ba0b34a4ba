"""A network with planted artifacts: which patches become outliers, where, by which neuron, and who attends to them.

Blue patches are the redundant ones. The FFN of block 2 (of 4) has one neuron that fires for them alone and writes a
huge value into channel 31; from block 3 on every token attends to whatever has a large channel 31. Nothing else
happens: other weights of attention and FFN are zero, so every number of a report follows from a few.
"""

from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure

from vitreg_hf import ViTRegConfig, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis.extract import subject_of
from vitreg_hf.analysis.figures import canvas

WIDTH, LAYERS, HEADS, PATCH, GRID = 32, 4, 2, 8, 4
WRITING_BLOCK, CHANNEL, HEIGHT = 2, 31, 60.0  # the block counts from 1
_BLUE, _FIRED = 30, 0


def planted_model(registers: int = 2, planted: bool = True) -> ViTRegModel:
    """The network; with `planted=False` its neuron is silent and there is no outlier at all."""
    torch.manual_seed(1)
    config = ViTRegConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=8,
        image_size=PATCH * GRID,
        patch_size=PATCH,
        num_register_tokens=registers,
        hidden_act="relu",
        initializer_range=0.1,
        token_initializer_range=0.2,
    )
    model = ViTRegModel(config).eval()
    with torch.no_grad():
        for block in model.layers:
            for part in (block.attention, block.mlp):
                for parameter in part.parameters():
                    parameter.zero_()
        _see_blue(model)
        if planted:
            _write_for_blue(model.layers[WRITING_BLOCK - 1].mlp)
            for block in model.layers[WRITING_BLOCK:]:
                _attend_to_channel(block.attention)
    return model


def _see_blue(model):
    """Channel 30 measures how much bluer than red a patch is; channel 31 is free."""
    projection = model.embeddings.patch_embeddings.projection
    projection.weight[[_BLUE, CHANNEL]] = 0
    projection.weight[_BLUE, 2], projection.weight[_BLUE, 0] = 1 / PATCH**2, -1 / PATCH**2
    projection.bias[[_BLUE, CHANNEL]] = 0
    for tokens in (model.embeddings.position_embeddings, model.embeddings.cls_token, model.embeddings.register_tokens):
        if tokens is not None:
            tokens[..., [_BLUE, CHANNEL]] = 0


def _write_for_blue(mlp):
    """The neuron saturates for no input: its bias is high, so that all blue patches get about the same height."""
    mlp.up_proj.weight[_FIRED, _BLUE] = 1
    mlp.up_proj.bias[_FIRED] = -1  # after LayerNorm only blue patches exceed 1
    mlp.down_proj.weight[CHANNEL, _FIRED] = HEIGHT


def _attend_to_channel(attention):
    """Every query asks for a large channel 31, in both heads; values stay zero, so attending changes nothing."""
    for head in range(HEADS):
        row = head * (WIDTH // HEADS)
        attention.q_proj.bias[row] = 4.0
        attention.k_proj.weight[row, CHANNEL] = 1.0


@pytest.fixture(scope="session")
def planted():
    """Planted network as a subject of analysis, with its image processor."""

    def make(registers=2, planted=True):
        processor = ViTRegImageProcessor(size=PATCH * GRID, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return subject_of(planted_model(registers, planted), processor, "planted", device="cpu")

    return make


def write_images(folder: Path, blue: np.ndarray, seed: int = 0) -> None:
    """One image per mask `(images, GRID, GRID)` of blue patches; the others have colours of their own, none bluish."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(blue):
        colours = generator.integers((60, 0, 0), (256, 256, 40), (GRID, GRID, 3))
        colours[mask] = (0, 0, 255)
        image = colours.repeat(PATCH, axis=0).repeat(PATCH, axis=1).astype(np.uint8)
        PIL.Image.fromarray(image).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="session")
def blue_patches():
    """Which patches are blue, in 12 images: a square of four in each, none in the last two."""
    generator, masks = np.random.default_rng(3), np.zeros((12, GRID, GRID), dtype=bool)
    for mask in masks[:-2]:
        row, column = generator.integers(0, GRID - 1, 2)
        mask[row : row + 2, column : column + 2] = True
    return masks


@pytest.fixture(scope="session")
def planted_images(tmp_path_factory, blue_patches):
    """Folder of these images."""
    folder = tmp_path_factory.mktemp("planted") / "images"
    write_images(folder, blue_patches)
    return folder


# Pictures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Path of a picture, and what is true of all pictures: nothing else is written, no global state changes."""
    before, figures = dict(matplotlib.rcParams), []
    created = Figure.__init__

    def keep(self, *arguments, **options):
        created(self, *arguments, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "__init__", keep)
    monkeypatch.setattr(canvas, "_DOTS_PER_INCH", 60)  # fast
    path = tmp_path / "a picture.png"
    yield path, figures
    assert [file.name for file in tmp_path.iterdir()] == ["a picture.png"]
    assert dict(matplotlib.rcParams) == before
    with PIL.Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert all(100 < side < 1_600 for side in picture.size)
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 20
    assert_nothing_is_cut_off(figures[-1])


def assert_nothing_is_cut_off(figure):
    figure.draw_without_rendering()  # it was saved at another resolution
    renderer = figure.canvas.get_renderer()
    inside = figure.bbox
    texts = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        assert not any("$" in label for label in labels_of(axes.yaxis))  # no powers of ten
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for text in texts:
        if text.get_text():
            box = text.get_window_extent(renderer)
            assert box.x0 >= inside.x0 - 1, text.get_text()
            assert box.x1 <= inside.x1 + 1, text.get_text()
            assert box.y0 >= inside.y0 - 1, text.get_text()
            assert box.y1 <= inside.y1 + 1, text.get_text()


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
