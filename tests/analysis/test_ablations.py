# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Ablations against blocks run by hand, on models whose registers matter or do not, and of planted tokens."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vitreg_hf import ViTRegForImageClassification, ViTRegModel
from vitreg_hf.analysis.ablation_costs import training_half
from vitreg_hf.analysis.ablations import ablate, sections
from vitreg_hf.analysis.extract import subject_of
from vitreg_hf.analysis.replacements import MODES, donors, mean_and_std, moments
from vitreg_hf.analysis.report import write_json, write_report


def subject(model):
    return subject_of(model, None, "tiny", "cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spy(model):
    """Every block's input as the block sees it after edits: a list of (block, tokens) over all passes."""
    seen = []
    for index, layer in enumerate(model.base_model.layers):
        layer.norm1.register_forward_hook(lambda _, args, __, index=index: seen.append((index, args[0].clone())))
    return seen


# Against blocks that are run by hand


@torch.no_grad()
def by_hand(model, pixels, replace=lambda index, tokens: tokens):
    """Inputs of all blocks and the normed result, one block after the other, tokens replaced before each."""
    tokens, inputs = model.embeddings(pixels).tokens, []
    for index, layer in enumerate(model.layers):
        tokens = replace(index, tokens.clone())
        inputs.append(tokens)
        tokens = layer(tokens)
    return inputs, model.layernorm(tokens)


def cosines(first, second):
    """Mean over images of the similarity of CLS, and of patches, in a model of 4 registers."""
    alike = F.cosine_similarity(first.double(), second.double(), dim=-1)
    return alike[:, 0].mean().item(), alike[:, 5:].mean().item()


def of_row(row):
    return row["pooled_cosine"]["mean"], row["patch_cosine"]["mean"]


@pytest.mark.parametrize("blocks", [None, [1, -1]])
def test_replaced_registers_are_those_of_a_run_by_hand(make_config, blocks):
    model, batches = ViTRegModel(make_config()).eval(), [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    unablated = [by_hand(model, pixels) for pixels in batches]
    means = [torch.cat([inputs[block] for inputs, _ in unablated])[:, 1:5].mean(0) for block in range(3)]
    modes = ["zero", "mean", "shuffle"]
    results = ablate(subject(model), lambda: iter(batches), kind="registers", modes=modes, blocks=blocks)
    edited = range(3) if blocks is None else (1, 2)
    assert results["blocks"] == list(edited)

    def literal(mode, inputs):
        def replace(index, tokens):
            if index in edited:
                if mode == "zero":
                    tokens[:, 1:5] = 0
                elif mode == "mean":
                    tokens[:, 1:5] = means[index]
                else:  # of two images there is one way: each gets what the other has unablated
                    tokens[:, 1:5] = inputs[index][:, 1:5].flip(0)
            return tokens

        return replace

    for mode in modes:
        expected = [
            cosines(before, by_hand(model, pixels, literal(mode, inputs))[1])
            for pixels, (inputs, before) in zip(batches, unablated)
        ]
        assert of_row(results["modes"][mode]["ablated"]) == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
        assert results["modes"][mode]["ablated"]["tokens"]["mean"] == 4


def test_noise_has_the_mean_and_the_spread_of_each_register(make_config):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(400, 3, 32, 32)
    inputs, before = by_hand(model, pixels)
    seen = spy(model)
    results = ablate(subject(model), lambda: iter([pixels]), kind="registers", modes=["noise"])
    assert [index for index, _ in seen] == [0, 1, 2] * 4  # two unablated passes, the registers', the control's
    noises = [tokens[:, 1:5] for _, tokens in seen[6:9]]
    for noise, tokens in zip(noises, inputs):
        mean, std = tokens[:, 1:5].mean(0), tokens[:, 1:5].std(0, correction=0)
        torch.testing.assert_close(noise.mean(0), mean, rtol=0, atol=5 * float(std.max()) / 20 + 1e-6)
        torch.testing.assert_close(noise.std(0), std, rtol=0.2, atol=1e-4)
    assert noises[1].std(0).min() > 1e-3  # and it is no mean

    def replay(index, tokens):
        tokens[:, 1:5] = noises[index]
        return tokens

    expected = cosines(before, by_hand(model, pixels, replay)[1])
    assert of_row(results["modes"]["noise"]["ablated"]) == pytest.approx(expected, abs=1e-6)


def test_the_control_replaces_as_many_patches_of_each_image(make_config):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(3, 3, 32, 32)
    seen = spy(model)
    results = ablate(subject(model), lambda: iter([pixels]), kind="registers", modes=["zero"])
    chosen = [(tokens == 0).all(-1) for _, tokens in seen[-3:]]  # before each block of the last pass
    assert all(torch.equal(mask, chosen[0]) for mask in chosen)
    assert chosen[0].sum(1).tolist() == [4, 4, 4]
    assert not chosen[0][:, :5].any()
    assert len({tuple(mask.tolist()) for mask in chosen[0]}) > 1  # not the same patches in all images

    def replace(index, tokens):
        tokens[chosen[0]] = 0
        return tokens

    before, after = by_hand(model, pixels)[1], by_hand(model, pixels, replace)[1]
    alike = F.cosine_similarity(before.double(), after.double(), dim=-1)
    kept = ~chosen[0][:, 5:]
    expected = alike[:, 0].mean().item(), torch.stack([a[k].mean() for a, k in zip(alike[:, 5:], kept)]).mean().item()
    assert of_row(results["modes"]["zero"]["control"]) == pytest.approx(expected, abs=1e-6)


# A model that needs its registers: they gather the colour of the patches, and CLS reads it off them


def marked(sign):
    """A marker of CLS, registers or patches, or the colour, with its negative, so that norms only scale."""
    vector = torch.zeros(8)
    vector[sign], vector[sign + 4] = 1.0, -1.0
    return vector


CLS, REGISTER, PATCH, COLOUR = (marked(index) for index in range(4))


def ask(layer, pairs, value=COLOUR):
    """Each asking token attends to the tokens it is paired with alone, and takes their colour."""
    attention = layer.attention
    for channel, (asking, answering, avoided) in enumerate(pairs):
        attention.q_proj.weight[channel] = 40 * asking
        attention.k_proj.weight[channel] = answering - sum(avoided)
    attention.v_proj.weight.copy_(torch.outer(value, value) / 4)
    attention.o_proj.weight.copy_(torch.eye(8))


@torch.no_grad()
def relay(make_config, family_class, read_registers=True):
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 2, "num_register_tokens": 2}
    model = family_class(make_config(**shape, num_labels=2)).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.fill_(1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0)
    base = model.base_model
    base.embeddings.cls_token.copy_(CLS)
    base.embeddings.register_tokens.copy_(REGISTER)
    base.embeddings.patch_embeddings.projection.weight.copy_(COLOUR.view(8, 1, 1, 1).expand(8, 3, 8, 8) / 192)
    base.embeddings.patch_embeddings.projection.bias.copy_(PATCH)
    ask(base.layers[0], [(REGISTER, PATCH, (CLS, REGISTER)), (CLS, CLS, (PATCH, REGISTER))])
    read, avoided = (REGISTER, (CLS, PATCH)) if read_registers else (PATCH, (CLS, REGISTER))
    ask(base.layers[1], [(CLS, read, avoided)])
    if family_class is ViTRegForImageClassification:
        model.classifier.weight.copy_(torch.stack([COLOUR, -COLOUR]))
        model.classifier.bias.copy_(torch.tensor([0.01, 0.0]))  # class 0 where nothing is known
    return model


def colours(labels, size=2):
    """One flat image per label, class 0 bright and class 1 dark, in batches."""
    images = torch.tensor([1.0 - 2 * label for label in labels]).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    return lambda: iter(images.split(size))


LABELS = [0, 1] * 8


def test_what_registers_carry_is_lost_with_them(make_config):
    results = ablate(
        subject(relay(make_config, ViTRegForImageClassification)), colours(LABELS), kind="registers", labels=LABELS
    )
    assert results["unablated"]["accuracy"]["mean"] == 1.0
    rows = {mode: places["ablated"] for mode, places in results["modes"].items()}
    # Without the colour all images are of class 0; with that of the other image, all answers are wrong.
    assert {mode: rows[mode]["accuracy"]["mean"] for mode in ("zero", "mean", "shuffle")} == {
        "zero": 0.5,
        "mean": 0.5,
        "shuffle": 0.0,
    }
    assert rows["zero"]["agreement"]["mean"] == 0.5
    assert rows["zero"]["accuracy_change"]["mean"] == -0.5
    assert rows["shuffle"]["accuracy_change"] == {"mean": -1.0, "low": -1.0, "high": -1.0, "n": 16}
    assert 0.1 < rows["noise"]["accuracy"]["mean"] < 0.9
    # By hand: a normed patch is 2 ** 0.5 (PATCH + COLOUR), of which registers take COLOUR / 2 ** 0.5; of a normed
    # register CLS takes COLOUR / 3 ** 0.5; without it CLS is as it was.
    assert rows["zero"]["pooled_cosine"]["mean"] == pytest.approx((1 + 1 / 3) ** -0.5, abs=1e-5)
    for mode in ("zero", "shuffle"):  # all patches tell the same, and the others are still there
        assert results["modes"][mode]["control"]["accuracy"]["mean"] == 1.0


def test_a_probe_loses_what_registers_carry(make_config):
    results = ablate(subject(relay(make_config, ViTRegModel)), colours(LABELS), kind="registers", labels=LABELS)
    assert results["unablated"]["probe_accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 8}
    rows = {mode: places["ablated"]["probe_accuracy"] for mode, places in results["modes"].items()}
    assert rows["zero"]["mean"] == rows["mean"]["mean"] == 0.5
    assert rows["shuffle"]["mean"] == 0.0
    assert results["modes"]["zero"]["control"]["probe_accuracy"]["mean"] == 1.0
    assert "agreement" not in results["unablated"]


@pytest.mark.parametrize("mode", MODES)
def test_registers_that_nothing_reads_cost_nothing(make_config, mode):
    model = relay(make_config, ViTRegForImageClassification, read_registers=False)
    results = ablate(subject(model), colours(LABELS), kind="registers", labels=LABELS, modes=[mode])
    row = results["modes"][mode]["ablated"]
    assert row["accuracy"]["mean"] == row["agreement"]["mean"] == 1.0
    assert row["accuracy_change"]["mean"] == 0.0


def test_registers_without_attention_to_them_cost_exactly_nothing(make_config):
    model = ViTRegModel(make_config()).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.o_proj.weight.zero_()
    results = ablate(subject(model), lambda: iter([torch.randn(4, 3, 32, 32)]), kind="registers")
    for mode in MODES:
        assert of_row(results["modes"][mode]["ablated"]) == (1.0, 1.0)
        assert results["modes"][mode]["ablated"]["pooled_cosine"]["low"] == 1.0


# Which tokens are hit


@torch.no_grad()
def bright_patches(make_config, **overrides):
    """Blocks that add nothing; a patch's norm is its brightness, and attention goes to bright patches, and CLS."""
    model = ViTRegModel(make_config(num_hidden_layers=2, **overrides)).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.fill_(1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0)
    embeddings = model.embeddings
    embeddings.patch_embeddings.projection.weight[0] = 1 / 192
    embeddings.patch_embeddings.projection.weight[1] = -1 / 192
    if embeddings.cls_token is not None:
        embeddings.cls_token[..., 0] = 90.0  # normed, more than a patch can have, so that CLS gets most
    embeddings.register_tokens[..., 2] = 1.0
    for layer in model.layers:
        layer.attention.q_proj.bias[::8] = 1.0
        layer.attention.k_proj.weight[::8, 0] = 1.0
    return model


def spotted(spots, size=32):
    """Images of grey noise; each of them with bright patches of 8 pixels at the numbers given."""
    images = -torch.rand(len(spots), 3, size, size) - 0.5
    columns = size // 8
    for image, patches in zip(images, spots):
        for patch in patches:
            row, column = divmod(patch, columns)
            image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 50.0
    return images


def hit(seen):
    """Tokens of each image that are zero before every block of a pass."""
    masks = [(tokens == 0).all(-1) for _, tokens in seen]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    return [mask.nonzero().flatten().tolist() for mask in masks[0]]


def test_outliers_are_the_patches_above_the_threshold(make_config):
    model, spots = bright_patches(make_config), [[3], [], [0, 7, 15]]
    seen = spy(model)
    pixels = spotted(spots)
    results = ablate(subject(model), lambda: iter([pixels]), kind="outliers", threshold=20.0, modes=["zero"])
    ablated, control = hit(seen[-4:-2]), hit(seen[-2:])
    assert ablated == [[5 + 3], [], [5, 12, 20]]
    assert [len(tokens) for tokens in control] == [1, 0, 3]
    assert not set(control[0]) & {8}
    assert not set(control[2]) & {5, 12, 20}
    assert results["images_without"] == 1
    row = results["modes"]["zero"]["ablated"]
    assert row["tokens"] == {**row["tokens"], "mean": 2.0, "n": 2}
    assert row["patch_cosine"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}  # the others are what they were


def test_outliers_are_looked_for_where_asked(make_config):
    model = bright_patches(make_config)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.bias[3] = 30.0  # the last block lifts all patches above the threshold
    seen, rest = spy(model), {"kind": "outliers", "threshold": 25.0, "modes": ["zero"]}
    pixels = spotted([[3], [2]])
    ablate(subject(model), lambda: iter([pixels]), state=-2, **rest)
    assert hit(seen[-4:-2]) == [[8], [7]]
    ablate(subject(model), lambda: iter([pixels]), **rest)
    assert [len(tokens) for tokens in hit(seen[-4:-2])] == [16, 16]
    assert hit(seen[-2:]) == [[], []]  # no normal patch is left to compare with


@pytest.mark.parametrize("use_cls_token", [True, False])
def test_the_sink_is_the_token_that_gets_most_but_never_cls(make_config, use_cls_token):
    options = {} if use_cls_token else {"use_cls_token": False, "pooling": "mean"}
    model = bright_patches(make_config, **options)
    seen, first = spy(model), 5 if use_cls_token else 4
    pixels = spotted([[3], [14]])
    results = ablate(subject(model), lambda: iter([pixels]), kind="sink", modes=["zero"])
    assert hit(seen[-4:-2]) == [[first + 3], [first + 14]]
    assert results["modes"]["zero"]["ablated"]["tokens"]["mean"] == 1


def test_a_register_can_be_the_sink_of_the_layer_that_is_asked(make_config):
    model = bright_patches(make_config)
    with torch.no_grad():
        model.layers[0].attention.k_proj.weight[::8, 2] = 5.0
        model.embeddings.register_tokens[0, 2, 2] = 2.0
        model.embeddings.register_tokens[0, [0, 1, 3], 2] = -1.0
    seen, pixels = spy(model), spotted([[3], [14]])
    ablate(subject(model), lambda: iter([pixels]), kind="sink", sink_layer=0, modes=["zero"])
    assert hit(seen[-4:-2]) == [[3], [3]]
    ablate(subject(model), lambda: iter([pixels]), kind="sink", modes=["zero"])
    assert hit(seen[-4:-2]) == [[8], [19]]


def test_without_outliers_nothing_is_measured_and_nothing_breaks(make_config, tmp_path):
    model = subject(ViTRegModel(make_config()))
    results = ablate(model, lambda: iter([torch.randn(2, 3, 32, 32)]), kind="outliers", threshold=1e6)
    assert results["images_without"] == results["images"] == 2
    for mode in MODES:
        assert results["modes"][mode]["ablated"]["pooled_cosine"]["n"] == 0
    write_json(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text())["unablated"]["tokens"]["mean"] is None


def test_an_outlier_without_another_to_take_its_place_does_not_count_as_shuffled(make_config):
    model = subject(bright_patches(make_config))
    batches = [spotted([[3], []]), spotted([[1], [2, 9]])]
    results = ablate(model, lambda: iter(batches), kind="outliers", threshold=20.0, modes=["zero", "shuffle"])
    assert results["modes"]["zero"]["ablated"]["tokens"]["n"] == 3
    assert results["modes"]["shuffle"]["ablated"]["tokens"]["n"] == 2
    assert results["modes"]["shuffle"]["control"]["tokens"]["n"] == 2


# Parts


@pytest.mark.parametrize("images", [2, 3, 7])
def test_equal_numbers_are_deranged(images):
    image = torch.arange(images).repeat_interleave(4)
    for seed in range(20):
        donor = donors(image, images, generator(seed))
        assert not (image[donor] == image).any()
        assert torch.equal(donor % 4, torch.arange(4).repeat(images))  # a register gets its own kind
        assert torch.equal(donor.sort().values, torch.arange(4 * images))  # each is given once


def test_unequal_numbers_are_drawn_from_all_other_images():
    image = torch.tensor([0, 0, 0, 2, 3, 3])
    drawn = torch.stack([donors(image, 4, generator(seed)) for seed in range(200)])
    for token, own in enumerate(image.tolist()):
        assert set(drawn[:, token].tolist()) == {index for index in range(6) if image[index] != own}
    assert donors(torch.tensor([1, 1]), 3, generator()).tolist() == [-1, -1]
    assert donors(torch.tensor([], dtype=torch.long), 3, generator()).tolist() == []


def test_moments_of_batches_add_up_to_those_of_all():
    tokens, slot = torch.randn(3, 50, 6) * 30 + 100, torch.randint(0, 2, (50,))
    parts = [moments(list(tokens[:, part]), slot[part], 3) for part in (slice(0, 20), slice(20, 50))]
    mean, std = mean_and_std(parts[0] + parts[1])
    for index in range(2):
        torch.testing.assert_close(mean[:, index], tokens[:, slot == index].double().mean(1))
        torch.testing.assert_close(std[:, index], tokens[:, slot == index].double().std(1, correction=0))
    assert not mean[:, 2].any()
    assert not std[:, 2].any()


def test_a_half_holds_every_class():
    labels = torch.tensor([0] * 5 + [1] * 4 + [2])
    half = training_half(labels, generator())
    assert labels[half].bincount().tolist() == [3, 2, 1]
    assert not torch.equal(half, training_half(labels, generator(1)))


# What must not depend on chance, and what must not change


def test_a_seed_decides_everything_and_another_one_something_else(make_config):
    model, batches = subject(ViTRegModel(make_config())), [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    first = ablate(model, lambda: iter(batches), kind="registers")
    torch.manual_seed(7)
    assert ablate(model, lambda: iter(batches), kind="registers") == first
    other = ablate(model, lambda: iter(batches), kind="registers", seed=1)
    assert other["modes"]["zero"]["ablated"] == first["modes"]["zero"]["ablated"]
    assert other["modes"]["zero"]["control"] != first["modes"]["zero"]["control"]
    assert other["modes"]["noise"]["ablated"] != first["modes"]["noise"]["ablated"]
    alone = ablate(model, lambda: iter(batches), kind="registers", modes=["noise"])
    assert alone["modes"]["noise"] == first["modes"]["noise"]  # whatever else is asked


def test_the_model_is_left_as_it_was(make_config):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(2, 3, 32, 32)
    before = model(pixels).last_hidden_state
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ablate(subject(model), lambda: iter([pixels]), kind="sink", threshold=1.0)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(pixels).last_hidden_state, before)


@pytest.mark.parametrize("with_head", [True, False])
def test_other_projects_models_run(with_head):
    transformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    timm_model = transformer(**shape, reg_tokens=2, num_classes=3 if with_head else 0)
    pixels = torch.randn(4, 3, 32, 32)
    row = ablate(subject(timm_model), lambda: iter([pixels]), kind="registers")["modes"]["mean"]["ablated"]
    assert ("agreement" in row) == with_head
    if not with_head:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, patch_size=8))
        with torch.no_grad():
            model.embeddings.register_tokens.normal_()
        results = ablate(subject(model), lambda: iter([pixels]), kind="registers", modes=["zero"])
        assert results["modes"]["zero"]["ablated"]["pooled_cosine"]["mean"] < 1


# Mistakes


def test_mistakes_are_refused_before_work_starts(make_config):
    model = ViTRegModel(make_config()).eval()
    model.layers[0].register_forward_hook(lambda *_: pytest.fail("work has started"))
    plain = ViTRegModel(make_config(num_register_tokens=0)).eval()

    def refused(match, model=model, **arguments):
        with pytest.raises(ValueError, match=match):
            ablate(subject(model), lambda: iter([torch.zeros(2, 3, 32, 32)]), **{"kind": "registers", **arguments})

    refused("registers, outliers, sink, got 'cls'", kind="cls")
    refused("zero, mean, noise, shuffle, got none", modes=[])
    refused("zero, mean, noise, shuffle, got zero, swap", modes=["zero", "swap"])
    refused("model with registers, got 'tiny' without", model=plain)
    refused("a threshold, .* got none", kind="outliers")
    refused("positive threshold, got 0.0", kind="outliers", threshold=0.0)
    refused("positive threshold, got nan", kind="outliers", threshold=math.nan)
    refused("blocks from -3 to 2, got 3", blocks=[0, 3])
    refused("at least one block, got none", blocks=[])
    refused("state from -4 to 3, got 4", kind="outliers", threshold=1.0, state=4)
    refused("sink_layer from -3 to 2, got -4", kind="sink", sink_layer=-4)
    refused("2 classes or more, .* got 1 classes and at most 4", labels=[1, 1, 1, 1])
    refused("3 images or more, .* got 2 classes and at most 2", labels=[1, 1, 0, 0])
    refused("one whole number per image as labels, got torch.float32", labels=[0.0, 1.0])


def test_images_that_do_not_fit_are_refused(make_config):
    model, two = subject(ViTRegForImageClassification(make_config())), torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="at least 2 images in every batch"):
        ablate(model, lambda: iter([two, two[:1]]), kind="registers")
    ablate(model, lambda: iter([two, two[:1]]), kind="registers", modes=["zero", "mean", "noise"])
    with pytest.raises(ValueError, match="at least one image, got 0"):
        ablate(model, lambda: iter([]), kind="registers")
    for labels in ([0, 1, 2], [0]):
        with pytest.raises(ValueError, match=f"as many images as labels, {len(labels)}, got 2"):
            ablate(model, lambda: iter([two]), kind="registers", labels=labels)
    used_up = iter([two, two])
    with pytest.raises(ValueError, match=r"the same 4 images each time .* got 0"):
        ablate(model, lambda: used_up, kind="registers")
    growing = iter([[two], [two, two]])
    with pytest.raises(ValueError, match=r"the same 2 images each time .* got 4"):
        ablate(model, lambda: iter(next(growing)), kind="registers")


# Report


def test_the_report_has_a_row_per_mode_and_control(make_config, tmp_path):
    model = subject(relay(make_config, ViTRegForImageClassification))
    results = ablate(model, colours(LABELS), kind="registers", labels=LABELS)
    json.dumps(results)
    [section] = sections(results)
    [table] = section.tables
    assert [row[:2] for row in table.rows[:4]] == [
        ("none", ""),
        ("zero", "registers"),
        ("zero", "random patches"),
        ("mean", "registers"),
    ]
    assert len(table.rows) == 9
    change = table.header.index("change of accuracy, points")
    assert table.rows[7][change] == "-100 [-100, -100] (n = 16)"
    assert table.rows[0][table.header.index("accuracy, %")] == "100 [100, 100] (n = 16)"
    assert "16 images, 0 of them without" in section.text[1]
    write_report(tmp_path / "report.html", "a report", "a finding", [section])
