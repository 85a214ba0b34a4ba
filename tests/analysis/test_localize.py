# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""LOST on models: planted objects are found in three families, features are those of the modules, mistakes refused."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from vitreg_hf import ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis.annotations import AnnotatedImage
from vitreg_hf.analysis.extract import subject_of
from vitreg_hf.analysis.figures.objects import boxes_figure
from vitreg_hf.analysis.images import as_seen, open_upright, preprocess
from vitreg_hf.analysis.localize import discover_objects, lost_features, lost_on_batch, lost_on_file, sections
from vitreg_hf.analysis.object_discovery import PAPER_DEFAULT, LostSettings, discover
from vitreg_hf.analysis.report import write_report

PATCH, WIDTH, LAYERS = 8, 32, 2
FAMILIES = ("vitreg", "dinov2_with_registers", "timm")
KEY, VALUE = LostSettings("key"), LostSettings("value")
COLOURS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}


def timm_model(**options):
    transformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    shape = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": 4}
    return transformer(**shape, num_classes=0, reg_tokens=4, no_embed_class=True, **options)


def make_model(family, make_config):
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "patch_size": PATCH}
    if family == "vitreg":
        return ViTRegModel(make_config(num_hidden_layers=LAYERS))
    if family == "dinov2_with_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, image_size=32))
    return timm_model(dynamic_img_size=True)


@torch.no_grad()
def plant(model, kernel, key):
    """A model whose tokens stay as embedded: patches by this kernel; keys are this map of the normed tokens."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.fill_(1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("patch_embeddings.projection.weight", "patch_embed.proj.weight")):
            parameter.copy_(kernel)
        elif name.endswith(("k_proj.weight", "attention.key.weight")):
            parameter.copy_(key)
        elif name.endswith("qkv.weight"):
            parameter[WIDTH : 2 * WIDTH].copy_(key)
    return model


@torch.no_grad()
def by_brightness(model):
    """Keys of bright and of dark patches point in opposite directions."""
    kernel, key = torch.zeros(WIDTH, 3, PATCH, PATCH), torch.zeros(WIDTH, WIDTH)
    kernel[0], kernel[1] = 1.0, -1.0
    key[0, 0] = 1.0
    return plant(model, kernel, key)


def subject(model):
    processor = ViTRegImageProcessor(size={"height": 32, "width": 32}, **COLOURS)
    return subject_of(model, processor, "tiny", "cpu")


def draw(path, size, box=None):
    """A dark image of this (height, width), with a bright square."""
    pixels = np.full((*size, 3), 40, np.uint8)
    if box is not None:
        pixels[box[1] : box[3], box[0] : box[2]] = 220
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def annotated(tmp_path):
    """Images of several sizes, none of whole patches, an object in each but the third."""
    rows = [((45, 37), (8, 16, 24, 32)), ((30, 61), (32, 0, 48, 16)), ((40, 40), None), ((53, 50), (16, 24, 40, 48))]
    return [
        AnnotatedImage(draw(tmp_path / f"{i}.png", size, box), () if box is None else (box,), ("thing",) * bool(box))
        for i, (size, box) in enumerate(rows)
    ]


# Objects


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_object_is_found_in_every_image(make_config, annotated, family):
    model = subject(by_brightness(make_model(family, make_config)))
    results = discover_objects(model, annotated, settings=[VALUE, KEY], default=KEY)
    assert results["default"] == {
        "setting": dataclasses.asdict(KEY),
        "corloc": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 3},
    }
    assert results["images"] == 3
    assert results["images_without_boxes"] == [2]
    for image in (annotated[0], annotated[1], annotated[3]):
        shown, found = lost_on_file(model, image.path, KEY)
        assert found.box == image.boxes[0]
        np.testing.assert_array_equal(shown, np.asarray(open_upright(image.path)))


def test_nothing_is_claimed_where_there_is_no_object(make_config, tmp_path):
    model = subject(by_brightness(make_model("vitreg", make_config)))
    truth = ((8, 8, 24, 24),)
    flat = [AnnotatedImage(draw(tmp_path / f"{i}.png", (45 + i, 61)), truth, ("thing",)) for i in range(3)]
    assert discover_objects(model, flat, settings=[KEY], default=KEY)["default"]["corloc"]["mean"] == 0.0
    assert lost_on_file(model, flat[0].path, KEY)[1].box == (0, 0, 61, 45)  # all of it, so no object
    elsewhere = [AnnotatedImage(draw(tmp_path / "a.png", (48, 64), (40, 24, 56, 40)), truth, ("thing",))]
    assert discover_objects(model, elsewhere, settings=[KEY], default=KEY)["default"]["corloc"]["mean"] == 0.0


def test_the_best_of_the_sweep_stands_beside_the_default(make_config, annotated):
    model = subject(by_brightness(make_model("vitreg", make_config)))
    sweep = [VALUE, KEY, dataclasses.replace(KEY, normalize=True, bias=-0.5)]
    results = discover_objects(model, annotated, settings=sweep, default=VALUE)
    assert results["default"]["corloc"]["mean"] == 0.0
    assert results["best_on_the_same_images"] == results["settings"][1]  # the first of two that find all
    assert [score["corloc"]["mean"] for score in results["settings"]] == [0.0, 1.0, 1.0]
    alone = discover_objects(model, annotated, settings=[VALUE], default=KEY)  # the default is no part of this sweep
    assert len(alone["settings"]) == 1
    assert alone["default"]["corloc"]["mean"] == 1.0
    assert alone["best_on_the_same_images"]["corloc"]["mean"] == 0.0


def test_one_pass_per_image_serves_all_settings(make_config, annotated):
    model = subject(make_model("vitreg", make_config))
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    sweep = [LostSettings(feature, layer) for feature in ("key", "query", "value") for layer in (-1, -2, 0)]
    discover_objects(model, annotated, settings=sweep, default=PAPER_DEFAULT)
    assert len(passes) == 3 + 1  # images with a box, and a trial of the size


# Features


def modules_of(model, hook_names):
    return {name: module for name, module in model.named_modules() if name.endswith(hook_names)}


def test_features_are_what_the_projections_give(make_config):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(1, 3, 24, 40)
    outputs = {}
    for name, module in modules_of(model, ("q_proj", "k_proj", "v_proj")).items():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    features = lost_features(subject(model), pixels, (0, -1), ("key", "query", "value"))
    assert set(features) == {(feature, layer) for feature in ("key", "query", "value") for layer in (0, -1)}
    for (feature, layer), found in features.items():
        output = outputs[f"layers.{layer % 3}.attention.{feature[0]}_proj"]
        assert found.shape == (3, 5, 32)
        for patch in range(15):  # behind CLS and four registers, row by row
            torch.testing.assert_close(found[patch // 5, patch % 5], output[0, 5 + patch])


def test_families_with_the_same_features_give_the_same_boxes(make_config):
    kernel, key = torch.randn(WIDTH, 3, PATCH, PATCH), torch.randn(WIDTH, WIDTH)
    models = [subject(plant(make_model(family, make_config), kernel, key)) for family in FAMILIES]
    pixels = torch.randn(4, 3, 40, 56)
    first, *others = [lost_on_batch(model, pixels, KEY) for model in models]
    keys = [lost_features(model, pixels[:1], [-1], ["key"])["key", -1] for model in models]
    assert len({found.box for found in first}) > 1
    for same, same_keys in zip(others, keys[1:]):
        assert [found.box for found in same] == [found.box for found in first]
        torch.testing.assert_close(same_keys, keys[0])


def test_the_protocol_pads_after_normalisation_and_never_resizes(make_config, tmp_path):
    model, path = subject(ViTRegModel(make_config())), tmp_path / "noise.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 37, 3), np.uint8)).save(path)
    plain = model.preprocess(PIL.Image.open(path), return_tensors="pt", do_resize=False)["pixel_values"]
    assert plain.shape == (1, 3, 45, 37)
    keys = lost_features(model, F.pad(plain, (0, 3, 0, 3)), [-1], ["key"])["key", -1]
    expected = discover(keys, PATCH, (45, 37), normalize=False, bias=0.0, num_expansion=100)
    found = lost_on_file(model, path, PAPER_DEFAULT)[1]
    assert (found.box, found.seed) == (expected.box, expected.seed)
    np.testing.assert_array_equal(found.degree, expected.degree)


def test_statistics_of_a_timm_processor_are_read(make_config, annotated):
    model = by_brightness(make_model("timm", make_config))
    rest = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0}
    processor = TimmWrapperImageProcessor({**rest, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    wrapped = subject_of(model, processor, "tiny", "cpu")
    assert discover_objects(wrapped, annotated, settings=[KEY], default=KEY)["default"]["corloc"]["mean"] == 1.0


# Fixed sizes


def test_a_model_of_one_size_is_refused_at_once_and_takes_the_processors_size(make_config, tmp_path):
    model = subject(by_brightness(timm_model()))
    box = (16, 24, 48, 72)  # patches of the 32 x 32 pixels that this image is shrunk to
    images = [AnnotatedImage(draw(tmp_path / "a.png", (96, 64), box), (box,), ("thing",))]
    with pytest.raises(ValueError, match=r"any size, got 'tiny', .* of 16 x 24 pixels.*dynamic_img_size.*'processor'"):
        discover_objects(model, [*images, AnnotatedImage(tmp_path / "absent.png", (box,), ("thing",))], **sweep())
    results = discover_objects(model, images, **sweep(), image_size="processor")
    assert results["default"]["corloc"]["mean"] == 1.0
    assert lost_on_file(model, images[0].path, KEY, "processor")[1].box == box
    other = subject_of(model.model, ViTRegImageProcessor(size={"height": 30, "width": 48}, **COLOURS), "tiny", "cpu")
    with pytest.raises(ValueError, match="the size of its processor, got 'tiny', which refused one of 30 x 48 pixels"):
        discover_objects(other, images, **sweep(), image_size="processor")
    shapeless = subject_of(
        model.model, ViTRegImageProcessor(do_resize=False, do_center_crop=False, **COLOURS), "tiny", "cpu"
    )
    with pytest.raises(ValueError, match="brings all images to one size"):
        discover_objects(shapeless, images, **sweep(), image_size="processor")


def sweep():
    return {"settings": [KEY], "default": KEY}


# Mistakes


def test_mistakes_are_refused_before_work_starts(make_config, annotated):
    model = subject(ViTRegModel(make_config()))
    model.anatomy.blocks[0].register_forward_hook(lambda *_: pytest.fail("work has started"))
    with pytest.raises(ValueError, match="at least one setting"):
        discover_objects(model, annotated, settings=[], default=KEY)
    with pytest.raises(ValueError, match="layers from -3 to 2, got 3"):
        discover_objects(model, annotated, settings=[LostSettings("key", 3)], default=KEY)
    with pytest.raises(ValueError, match="layers from -3 to 2, got -4"):
        discover_objects(model, annotated, settings=[KEY], default=LostSettings("key", -4))
    with pytest.raises(ValueError, match="an image with a box, got none among 1"):
        discover_objects(model, annotated[2:3], **sweep())
    with pytest.raises(ValueError, match="original, processor, got '224'"):
        discover_objects(model, annotated, **sweep(), image_size="224")
    with pytest.raises(ValueError, match="one image, got 2"):
        lost_features(model, torch.zeros(2, 3, 32, 32), [0], ["key"])
    with pytest.raises(ValueError, match="layers from -3 to 2, got 7"):
        lost_on_batch(model, torch.zeros(1, 3, 32, 32), LostSettings("key", 7))
    with pytest.raises(ValueError, match="layers from -3 to 2, got 7"):
        lost_on_file(model, annotated[0].path, LostSettings("key", 7))
    unknown = subject_of(model.model, ViTRegImageProcessor(do_normalize=False), "tiny", "cpu")
    with pytest.raises(ValueError, match="that normalises, got ViTRegImageProcessor"):
        discover_objects(unknown, annotated, **sweep())
    with pytest.raises(ValueError, match="that normalises, got NoneType"):
        discover_objects(subject_of(model.model, None, "tiny", "cpu"), annotated, **sweep())


def test_an_unreadable_image_is_named(make_config, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    broken = [AnnotatedImage(tmp_path / "broken.png", ((0, 0, 8, 8),), ("thing",))]
    with pytest.raises(ValueError, match=r"readable image, got .*broken\.png"):
        discover_objects(subject(ViTRegModel(make_config())), broken, **sweep())


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


def test_the_model_is_left_as_it_was(make_config, annotated):
    model, pixels = subject(ViTRegModel(make_config())), torch.randn(1, 3, 32, 32)
    before, hooks = model.model(pixels).last_hidden_state, count_hooks(model)  # ViTReg has hooks of its own
    discover_objects(model, annotated, **sweep())
    assert count_hooks(model) == hooks
    torch.testing.assert_close(model.model(pixels).last_hidden_state, before, rtol=0, atol=0)


# Report


@pytest.mark.parametrize("image_size", ["original", "processor"])
def test_the_report_says_what_was_chosen_on_the_same_images(make_config, annotated, tmp_path, image_size):
    model = subject(by_brightness(make_model("vitreg", make_config)))
    # Stretched, squares keep no whole patches, but objects are still found.
    results = discover_objects(model, annotated, settings=[VALUE, KEY], default=VALUE, image_size=image_size)
    json.dumps(results)
    [section] = sections(results)
    chosen, swept = section.tables
    assert chosen.rows[0] == ("fixed default", "value", "-1", "dot product", "0", "0 [0, 0] (n = 3)")
    assert chosen.rows[1][:3] == ("best of the sweep (chosen on these images)", "key", "-1")
    assert chosen.rows[1][-1] == "100 [100, 100] (n = 3)"
    assert len(swept.rows) == 2
    assert "1 images without a true box" in section.text[0]
    assert any("stretched" in text for text in section.text) == (image_size == "processor")
    write_report(tmp_path / "report.html", "a report", "a finding", [section])


@pytest.mark.parametrize("with_truth", [True, False])
def test_boxes_are_drawn_with_and_without_truth(make_config, annotated, tmp_path, with_truth):
    model, path = subject(by_brightness(make_model("vitreg", make_config))), tmp_path / "boxes.png"
    shown = [lost_on_file(model, image.path, KEY) for image in annotated]
    images, found = zip(*shown)
    truths = [image.boxes for image in annotated] if with_truth else None
    rest = {"captions": ["an image"] * 4, "title": "tiny, key, layer -1", "patch_size": (PATCH, PATCH)}
    boxes_figure(images, found, path, truths=truths, **rest)
    with PIL.Image.open(path) as picture:
        assert picture.height > 4 * 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1_000_000)}
    assert ((0, 191, 255) in colours) == with_truth
    assert (255, 0, 0) in colours


def test_plain_photos_are_drawn_at_the_processors_size(make_config, annotated, tmp_path):
    model, path = subject(by_brightness(make_model("vitreg", make_config))), tmp_path / "boxes.png"
    pixels = preprocess([open_upright(image.path) for image in annotated], model.preprocess)
    found = lost_on_batch(model, pixels, KEY)
    assert len(found) == 4
    seen = as_seen(pixels, model.preprocess)
    boxes_figure(seen, found, path, captions=[""] * 4, title="tiny", patch_size=None)
    assert path.stat().st_size > 0
    with pytest.raises(ValueError, match="got 4 images and 3, 4 and 4"):
        boxes_figure(seen, found[:3], path, captions=[""] * 4, title="tiny", patch_size=None)
    with pytest.raises(ValueError, match="got 0 images"):
        boxes_figure([], [], path, captions=[], title="tiny", patch_size=None)
