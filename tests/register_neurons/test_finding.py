"""Finding register neurons on a network that has planted ones, against the paper's Algorithm 1 in loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
    add_test_time_registers,
    find_register_neurons,
)
from vitreg_hf.analysis.images import find_images
from vitreg_hf.analysis.outliers import OutlierRule
from vitreg_hf.register_neurons import finding
from vitreg_hf.register_neurons.planted import planted_network, planted_neurons, processor_for

VARIANTS = {
    "MLP": {},
    "SwiGLU": {"swiglu": True},
    "four registers": {"registers": 4},
    "no CLS": {"use_cls_token": False, "pooling": "mean"},
    "LayerScale": {"layerscale_value": 1.0},
    "norm before the blocks, QuickGELU": {"embedding_norm": True, "patch_bias": False, "hidden_act": "quick_gelu"},
    "no norm at the end": {"final_norm": False},
    "bias of attention": {"attention_bias_kv": True},
    "half the precision": {"dtype": torch.bfloat16},
}


def find(model, images, processor=None, **options):
    return find_register_neurons(model, images, processor, progress=False, **options)


def network(name="MLP", model_class=ViTRegModel):
    fields = dict(VARIANTS[name])
    dtype = fields.pop("dtype", torch.float32)
    return planted_network(model_class, **fields).to(dtype)


# The algorithm, image by image, layer by layer and patch by patch


def slow_activations(model, states, layer):
    """Activations `(N, F)` of one image from the weights, given the residual streams `(N, D)` before every block."""
    block, tokens = model.layers[layer], states[layer]
    attended = block.attention(block.norm1(tokens)[None])[0][0]
    normed = F.layer_norm(
        tokens + block.layer_scale1(attended),
        tokens.shape[-1:],
        block.norm2.weight,
        block.norm2.bias,
        model.config.layer_norm_eps,
    )
    mlp = block.mlp
    up = normed @ mlp.up_proj.weight.T + mlp.up_proj.bias
    if model.config.use_swiglu_ffn:
        gate = normed @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
        return gate * torch.sigmoid(gate) * up
    return up * torch.sigmoid(1.702 * up) if model.config.hidden_act == "quick_gelu" else F.gelu(up)


@torch.no_grad()
def slow_scores(model, pixels, threshold, top_layer):
    """FINDREGISTERNEURONS: mean activation at outliers and elsewhere, averaged over images with outliers."""
    prefix = model.config.num_prefix_tokens
    shape = (top_layer + 1, model.config.intermediate_size)
    at_outliers, elsewhere, images = torch.zeros(shape), torch.zeros(shape), 0
    for image in pixels:
        states = [state[0] for state in model(image[None], output_hidden_states=True).hidden_states]
        outliers = [i for i in range(prefix, len(states[-1])) if states[-1][i].norm() > threshold]
        if not outliers:
            continue
        images += 1
        for layer in range(top_layer + 1):
            activations = slow_activations(model, states, layer)
            for i in range(prefix, len(activations)):
                if i in outliers:
                    at_outliers[layer] += activations[i] / len(outliers)
                else:
                    elsewhere[layer] += activations[i] / (len(activations) - prefix - len(outliers))
    return at_outliers / images, elsewhere / images


@pytest.mark.parametrize("name", ["MLP", "SwiGLU", "four registers", "norm before the blocks, QuickGELU"])
def test_scores_are_those_of_the_loops(name, images):
    model = network(name)
    found = find(model, images.pixels, top_k=5)
    at_outliers, elsewhere = slow_scores(model, images.pixels, found.threshold, found.top_layer)
    assert len(found.ranking) == 300
    for one in found.ranking:
        assert one.at_outliers == pytest.approx(at_outliers[one.layer, one.neuron].item(), rel=1e-5, abs=1e-5)
        assert one.elsewhere == pytest.approx(elsewhere[one.layer, one.neuron].item(), rel=1e-5, abs=1e-5)
    scores = at_outliers.abs() if model.config.use_swiglu_ffn else at_outliers
    assert torch.tensor([abs(one.at_outliers) for one in found.ranking]).tolist() == pytest.approx(
        scores.flatten().sort(descending=True).values[:300].tolist(), rel=1e-5, abs=1e-5
    )


# What is found


@pytest.mark.parametrize("name", VARIANTS)
def test_the_planted_neurons_are_found_and_no_others(name, images):
    model = network(name)
    found = find(model, images.pixels)
    assert set(found) == set(planted_neurons(model.config))
    assert len(found) == found.count == 5
    assert found.top_layer == 4  # after block 4 outliers are there
    assert found.outlier_share == pytest.approx(images.blue.float().mean().item())
    assert (found.images, found.state) == (8, 6)
    first, chosen = found.trials[0], next(trial for trial in found.trials if trial.count == 5)
    assert [trial.count for trial in found.trials] == [0, 1, 2, 3, 5, 8, 12]
    assert first.outlier_share == pytest.approx(images.blue[:-1].float().mean().item())  # of images that have some
    assert all(trial.outlier_share == first.outlier_share for trial in found.trials[:4])
    assert chosen.outlier_share == 0
    assert chosen.largest_norm < 0.5 * first.largest_norm


@pytest.mark.parametrize("registers", [0, 4])
def test_options_of_the_authors_code_find_the_same(registers, images):
    """CLS keeps its activations, one value per block is written, and the cutoff is three standard deviations."""
    model = planted_network(registers=registers)
    found = find(model, images.pixels, rule=OutlierRule("sigma", 1.5))
    assert set(found) == set(planted_neurons(model.config))
    mended = add_test_time_registers(model, found, cls="keep", reduction="layer")
    with torch.no_grad():
        states = mended(images.pixels, output_hidden_states=True).hidden_states
        pooled = [one(images.pixels).pooler_output for one in (model, mended)]
    assert states[-1][:, -36:].norm(dim=-1).max() < found.threshold
    assert torch.cosine_similarity(*pooled, dim=-1).min() > 0.99


HEADS = [
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegForMaskedImageModeling,
    ViTRegBackbone,
]


@pytest.mark.parametrize("model_class", HEADS)
def test_models_with_any_head_are_searched_and_keep_it(model_class, images):
    model = network(model_class=model_class)
    found = find(model, images.pixels)
    assert set(found) == set(planted_neurons(model.config))
    mended = add_test_time_registers(model, found)
    assert type(mended) is model_class
    assert dict(mended.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_a_top_layer_and_a_number_can_be_told(images):
    model = network()
    planted = planted_neurons(model.config)
    told = find(model, images.pixels, top_layer=5, top_k=3)
    assert set(told) == set(planted[:3])
    assert (told.top_layer, told.trials) == (5, ())
    low = find(model, images.pixels, top_layer=2)
    assert set(low.first(2)) == set(planted[:2])
    assert all(one.layer <= 2 for one in low.ranking)
    assert low.count == 1  # none helps, so one is as good as many
    assert low.trials[-1].outlier_share == low.trials[0].outlier_share


def test_all_blocks_are_searched_where_later_ones_write_outliers_too(images):
    """After the first planted block all outliers are there, and only those of a later one make them large."""
    model = network()
    first, last = planted_neurons(model.config)[0], planted_neurons(model.config)[-1]
    writes = [model.layers[layer].mlp.down_proj.weight[:, neuron] for layer, neuron in (first, last)]
    with torch.no_grad():
        writes[0].copy_(0.1 * writes[1])
    found = find(model, images.pixels)
    assert find(model, images.pixels, top_layer=first[0]).left == 1
    assert set(found) >= {first, *planted_neurons(model.config)[-2:]}
    assert found.top_layer == model.config.num_hidden_layers - 1
    assert found.left == 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_any_size_give_the_same(batch_size, images):
    whole, batched = (find(network(), images.pixels, batch_size=size) for size in (8, batch_size))
    assert [(one.layer, one.neuron) for one in whole.ranking[:20]] == [
        (one.layer, one.neuron) for one in batched.ranking[:20]
    ]
    for mine, theirs in zip(whole.ranking, batched.ranking, strict=True):
        assert mine.at_outliers == pytest.approx(theirs.at_outliers, rel=1e-5, abs=1e-5)
    assert whole.threshold == pytest.approx(batched.threshold, rel=1e-6)
    assert [trial.outlier_share for trial in whole.trials] == [trial.outlier_share for trial in batched.trials]


def test_only_so_many_images_are_read(images):
    few = find(network(), images.pixels, num_images=4)
    assert few.images == 4
    assert few == find(network(), images.pixels[:4])


def test_images_without_outliers_take_no_part_in_scores(images):
    """They do in the median of norms; with a cutoff that is told they change nothing at all."""
    rule = OutlierRule("fixed", 100.0)
    sets = images.pixels, images.pixels[:-1]
    with_it, without = (find(network(), pixels, rule=rule, top_k=5) for pixels in sets)
    assert with_it.ranking == without.ranking
    assert with_it.outlier_share == pytest.approx(without.outlier_share * 7 / 8)


def test_trials_are_made_on_images_that_have_outliers(images, monkeypatch):
    """However many there are before them."""
    monkeypatch.setattr(finding, "_TRIED_ON", 3)
    behind = torch.cat([images.pixels[-1:].repeat(7, 1, 1, 1), images.pixels[:5]])
    found = find(network(), behind, batch_size=3)
    assert set(found) == set(planted_neurons(network().config))
    blue = images.blue[[0, 2, 4]]
    assert found.trials[0].outlier_share == pytest.approx(blue.float().mean().item())


def test_folders_files_and_pixel_values_agree(images):
    model = network()
    processor = processor_for(model)
    by_pixels = find(model, images.pixels)
    assert find(model, images.folder, processor) == by_pixels
    assert find(model, str(images.folder), processor) == by_pixels
    assert find(model, find_images(images.folder), processor) == by_pixels
    larger = find(model, images.folder, processor, image_size=64)
    assert set(larger) == set(by_pixels)
    assert larger.outlier_share != by_pixels.outlier_share


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [
        (OutlierRule("fixed", 200.0), lambda _: 200.0),
        (OutlierRule("sigma", 1.0), lambda norms: norms.mean() + norms.std(correction=0)),
        (OutlierRule("median", 3.0), lambda norms: 3 * np.median(norms)),
        (OutlierRule("median", None, -2), lambda norms: 2 * np.median(norms)),
        (OutlierRule("median", None, 6), lambda norms: 2 * np.median(norms)),
    ],
    ids=["fixed", "sigma", "thrice the median", "the last but one", "block 6"],
)
def test_every_rule_has_its_cutoff_and_its_state(rule, threshold, images):
    model = network()
    found = find(model, images.pixels, rule=rule)
    assert set(found) == set(planted_neurons(model.config))
    assert found.state == {-1: 6, -2: 5, 6: 6}[rule.layer]
    with torch.no_grad():
        norms = model(images.pixels, output_hidden_states=True).hidden_states[found.state][:, 1:].norm(dim=-1)
    assert found.threshold == pytest.approx(float(threshold(norms)), rel=1e-4)
    assert found.outlier_share == pytest.approx((norms > found.threshold).float().mean().item())
    assert rule.rule in found.rule


# What is refused, and what is left as it was


def test_a_model_without_outliers_needs_no_registers(images):
    message = r"Expected outliers, got none among 288 patches of 8 images .*: this model needs no registers"
    with pytest.raises(ValueError, match=message):
        find(planted_network(planted=False), images.pixels)


REFUSED = {
    "a top layer that there is not": ({"top_layer": 6}, "top_layer of 0 to 5, got 6"),
    "a negative top layer": ({"top_layer": -1}, "top_layer of 0 to 5, got -1"),
    "no neuron": ({"top_k": 0}, "1 to 300 register neurons, got 0"),
    "more than are ranked": ({"top_k": 301}, "1 to 300 register neurons, got 301"),
    "a layer that there is not": ({"rule": OutlierRule(layer=9)}, "layers 1 to 6, or -6 to -1, got 9"),
    "no image": ({"num_images": 0}, "one image or more, and in a batch, got 0 and 8"),
    "an empty batch": ({"batch_size": 0}, "one image or more, and in a batch, got 500 and 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_mistakes_are_told_before_anything_runs(what, images, monkeypatch):
    monkeypatch.setattr(ViTRegModel, "forward", lambda *_, **__: pytest.fail("a pass was made"))
    options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        find(network(), images.pixels, **options)


def test_images_of_another_kind_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"pixel values \(n, C, H, W\), got \(3, 48, 48\)"):
        find(network(), images.pixels[0])
    with pytest.raises(ValueError, match="an image processor for a folder of images, got none"):
        find(network(), images.folder)
    with pytest.raises(ValueError, match="Expected images in"):
        find(network(), tmp_path, processor_for(network()))
    with pytest.raises(ValueError, match="the patch size 8 x 8 divides, got 50 x 48"):
        find(network(), torch.zeros(2, 3, 50, 48))


def test_other_families_and_mended_models_are_refused(images):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
    with pytest.raises(ValueError, match="a model of this family, got dinov2: convert_checkpoint"):
        find(Dinov2Model(Dinov2Config(**small)), images.pixels)
    with pytest.raises(ValueError, match="a model of this family, got Linear"):
        find(torch.nn.Linear(1, 1), images.pixels)
    mended = add_test_time_registers(network(), [(0, 1)])
    with pytest.raises(ValueError, match="Expected a model without test-time registers"):
        find(mended, images.pixels)


def test_the_model_is_left_as_it_was(images):
    model = network("SwiGLU", ViTRegForImageClassification)
    model.train()
    model.vitreg.layers[2].eval()
    model.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    weights, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    find(model, images.pixels, num_images=3)
    with pytest.raises(ValueError, match="needs no registers"):
        find(model, images.pixels, num_images=3, rule=OutlierRule("fixed", 1e6))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()] == hooks


def test_norms_that_are_no_numbers_are_not_those_of_a_healthy_model(images):
    model = network()
    model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"finite norms of patches, got others from weights in torch\.float32"):
        find(model, images.pixels)
