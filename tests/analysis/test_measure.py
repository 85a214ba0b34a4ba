"""The pass over images: it goes on where it stopped, refuses what does not fit, and names what cannot be read."""

import numpy as np
import pytest
import torch

from vitreg_hf import ViTRegConfig, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis import measure as measure_module
from vitreg_hf.analysis.extract import subject_of
from vitreg_hf.analysis.images import find_images
from vitreg_hf.analysis.measure import Pass, measure, measure_batch

from .conftest import GRID, write_images

HOW = Pass(batch_size=5)


def columns(records):
    return {name: np.concatenate([batch[name] for batch in records]) for name in next(iter(records))}


def test_an_interrupted_pass_ends_with_the_same_records(planted, planted_images, tmp_path, monkeypatch):
    subject, files = planted(), find_images(planted_images)
    whole = columns(measure(subject, files, HOW, tmp_path / "whole"))
    seen = []

    monkeypatch.setattr(measure_module, "_IMAGES_PER_FILE", 5)

    def stop_at_the_second(subject, pixel_values):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(len(pixel_values))
        return measure_batch(subject, pixel_values)

    monkeypatch.setattr(measure_module, "measure_batch", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure(subject, files, HOW, tmp_path / "stopped")
    counted = []
    monkeypatch.setattr(measure_module, "measure_batch", lambda s, x: counted.append(len(x)) or measure_batch(s, x))
    resumed = columns(measure(subject, files, HOW, tmp_path / "stopped"))
    assert counted == [5, 2]  # the first batch is not run again
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)


def test_batches_do_not_change_what_is_measured(planted, planted_images, tmp_path):
    subject, files = planted(), find_images(planted_images)
    one, many = (columns(measure(subject, files, Pass(batch_size=n), tmp_path / str(n))) for n in (1, 12))
    for name, values in one.items():
        np.testing.assert_allclose(many[name], values, rtol=2e-4, atol=1e-5)


def test_records_of_something_else_are_refused(planted, planted_images, tmp_path):
    files = find_images(planted_images)
    measure(planted(), files, HOW, tmp_path)
    with pytest.raises(ValueError, match="the same weights"):
        measure(planted(planted=False), files, HOW, tmp_path)
    with pytest.raises(ValueError, match="the same images"):
        measure(planted(), files.first(4), HOW, tmp_path)
    with pytest.raises(ValueError, match="the same image processor"):
        measure(planted(), files, Pass(image_size=64), tmp_path)
    others = tmp_path / "others"  # of the same names
    write_images(others, np.zeros((12, GRID, GRID), dtype=bool))
    with pytest.raises(ValueError, match="the same images"):
        measure(planted(), find_images(others), HOW, tmp_path)


def test_records_of_something_else_are_replaced_when_asked(planted, planted_images, tmp_path):
    files = find_images(planted_images)
    measure(planted(planted=False), files, HOW, tmp_path)
    records = measure(planted(), files, Pass(overwrite=True), tmp_path)
    assert records.norms(4).max() > 20  # the planted ones
    assert len(records.measured_images()) == 12


def test_batch_size_and_policy_may_change_between_two_runs(planted, planted_images, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_module, "_IMAGES_PER_FILE", 4)
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted(planted_images.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "007.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"007\.png"):
        measure(planted(), find_images(folder), Pass(batch_size=2), tmp_path / "records")
    records = measure(planted(), find_images(folder), Pass(3, on_corrupt_image="skip"), tmp_path / "records")
    assert records.measured_images().tolist() == [i for i in range(12) if i != 7]


def test_a_corrupt_image_names_itself_or_is_left_out(planted, planted_images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted(planted_images.iterdir())[:4]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "001.png").write_bytes(b"not an image")
    files = find_images(folder)
    with pytest.raises(ValueError, match=r"001\.png.*--on-corrupt-image skip"):
        measure(planted(), files, Pass(), tmp_path / "a")
    records = measure(planted(), files, Pass(batch_size=2, on_corrupt_image="skip"), tmp_path / "b")
    assert records.measured_images().tolist() == [0, 2, 3]
    assert len(records.column("neighbours")) == 3


def test_nothing_readable_is_an_error(planted, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="readable images"):
        measure(planted(), find_images(tmp_path / "images"), Pass(on_corrupt_image="skip"), tmp_path / "records")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch size of 1 or more, got 0"),
        ({"image_size": 0}, "image size of 1 pixel or more, got 0"),
        ({"on_corrupt_image": "ignore"}, "'raise' or 'skip', got 'ignore'"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Pass(**wrong)


def test_memory_does_not_grow_with_images(planted, planted_images, tmp_path):
    """What is read back per image is small or is averaged while reading; norms are thinned out."""
    records = measure(planted(), find_images(planted_images), HOW, tmp_path)
    assert records.norms(4).size == 12 * 16
    assert 20 < records.norms(4, at_most=50).size < 90  # about so many, by chance
    mean = records.mean(lambda batch: batch["received"])
    np.testing.assert_allclose(mean, records.column("received").mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("layout", [{}, {"num_register_tokens": 0}, {"use_cls_token": False, "pooling": "mean"}])
def test_any_layout_of_prefix_tokens_is_measured(make_config, layout):
    model = ViTRegModel(make_config(**layout))
    subject = subject_of(model, ViTRegImageProcessor(size=32), device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    measured = measure_batch(subject, pixels)
    prefix = subject.layout.num_prefix
    assert measured["received"].shape == (2, 3, prefix + 16)
    assert measured["maps"].shape == (2, 4, prefix, 16)
    assert ("cls_update" in measured) == bool(subject.layout.num_cls)
    if subject.layout.num_cls:  # what CLS takes, projected, is what its attention adds
        attention = model.layers[-1].attention
        with torch.no_grad():
            state = model(pixels, output_hidden_states=True).hidden_states[-2]
            added = attention(model.layers[-1].norm1(state))[0][:, 0]
            torch.testing.assert_close(attention.o_proj(measured["cls_update"]), added, rtol=1e-4, atol=1e-5)


def test_a_model_with_neither_cls_nor_registers_is_measured():
    config = ViTRegConfig(
        hidden_size=32, num_hidden_layers=2, image_size=32, patch_size=8, num_register_tokens=0, use_cls_token=False,
        pooling="mean",
    )  # fmt: skip
    measured = measure_batch(subject_of(ViTRegModel(config), device="cpu"), torch.randn(1, 3, 32, 32))
    assert measured["mass"].shape == (1, 2, 0, 3)
