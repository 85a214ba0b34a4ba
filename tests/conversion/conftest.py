"""Small models of other projects, files of them, and the comparison that every converted checkpoint has to pass."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

TOLERANCE = 1e-4  # of every output in fp32, absolute: what converting promises
RELATIVE_TOLERANCE = 1e-4  # of gradients


@pytest.fixture
def filled():
    """Fill a model with weights so large that a wrong computation shows; evaluation mode."""

    def fill(model, std=0.2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_scale = parameter.ndim == 1 and name.endswith("weight")  # of a norm
                parameter.normal_(float(is_scale), std)
        return model.eval()

    return fill


@pytest.fixture
def save_source(tmp_path):
    """Save weights as another project does: a folder, or a file of `torch.save` if its name says so."""

    def save(weights, config=None, processor=None, name="source", file="model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        weights = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
        if file.endswith(".safetensors"):
            save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, folder / file)
        else:
            torch.save(weights, folder / file)
        for title, content in (("config.json", config), ("preprocessor_config.json", processor)):
            if content is not None:
                (folder / title).write_text(json.dumps(content))
        return folder if file.endswith(".safetensors") else folder / file

    return save


def outputs_here(model, pixels):
    """Everything that a model of this family says of images, by the names that `assert_same_outputs` compares."""
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True)
    tokens = {"cls": out.cls_token, "registers": out.register_tokens, "patches": out.patch_tokens}
    return {
        **tokens,
        "hidden_states": out.hidden_states,
        "blocks": out.hidden_states[1:],
        "last_hidden_state": getattr(out, "last_hidden_state", None),
        "pooled": getattr(out, "pooler_output", None),
        "logits": getattr(out, "logits", None),
    }


@pytest.fixture
def outputs_of_vitreg():
    """`outputs_here`, for tests."""
    return outputs_here


def _assert_near(name, theirs, own, tolerance):
    assert own is not None, f"the source has {name}, the converted model has not"
    if isinstance(theirs, (list, tuple)):
        assert len(theirs) == len(own), f"{len(theirs)} {name} in the source, {len(own)} here"
        for index, (one, other) in enumerate(zip(theirs, own, strict=True)):
            _assert_near(f"{name}[{index}]", one, other, tolerance)
        return
    assert theirs.shape == own.shape, f"{name}: {tuple(theirs.shape)} in the source, {tuple(own.shape)} here"
    difference = (theirs - own).abs().max().item()
    assert difference <= tolerance, f"{name} differs by {difference}"


@pytest.fixture
def assert_same_outputs():
    """Compare a source and a model of this family on images of some sizes.

    `outputs_of(pixels)` gives tensors by name, and those that it gives have to be equal here: any of hidden_states (of
    the embeddings and of every block), blocks (the same without the embeddings), cls, registers, patches,
    last_hidden_state, pooled, logits.
    """

    def check(outputs_of, model, sizes, tolerance=TOLERANCE, channels=3, images=2):
        for size in sizes:
            pixels = torch.randn(images, channels, *size)
            with torch.no_grad():
                theirs = outputs_of(pixels)
            own = outputs_here(model, pixels)
            given = {name: value for name, value in theirs.items() if value is not None}
            assert given, "the source says nothing"
            for name, value in given.items():
                _assert_near(f"at {size}, {name}", value, own[name], tolerance)

    return check


@pytest.fixture
def assert_same_gradients():
    """Compare gradients of images and of one weight, of the same scalar of two models.

    `theirs(pixels)` and `own(pixels)` give the tokens or logits that are summed with random signs.
    """

    def check(theirs, their_weight, own, own_weight, size, channels=3):
        pixels = torch.randn(2, channels, *size)
        signs, found = None, []
        for outputs_of, weight in ((theirs, their_weight), (own, own_weight)):
            images = pixels.clone().requires_grad_()
            outputs = outputs_of(images)
            signs = torch.randn_like(outputs) if signs is None else signs
            found.append(torch.autograd.grad((outputs * signs).sum(), [images, weight]))
        for what, one, other in zip(("images", "a weight"), *found, strict=True):
            largest = one.abs().max()
            assert largest > 0, f"nothing depends on {what}"
            assert (one - other).abs().max() <= RELATIVE_TOLERANCE * largest, f"gradients of {what} differ"

    return check


@pytest.fixture(scope="session")
def photo():
    """A real photo that is not square."""
    return Image.fromarray(data.chelsea())  # 451 x 300


@pytest.fixture
def assert_same_pixels(photo):
    """Compare what two processors make of a photo: at most one grey level apart, in normalised units."""

    def check(theirs, processor, grey_levels=1.0):
        own = processor(photo, return_tensors="pt")["pixel_values"]
        assert own.shape == theirs.shape
        step = 1 / 255 / min(processor.image_std) if processor.do_normalize else 1 / 255
        assert (own - theirs).abs().max() <= grey_levels * step * 1.001

    return check
