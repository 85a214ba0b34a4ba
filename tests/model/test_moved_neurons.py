"""Register neurons against the paper's algorithm in loops over images and tokens, and in every kind of pass."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from vitreg_hf.model.configuration_checks import count_parameters

# Out of order and several in a block; block 1 has one of them alone.
NEURONS = [[0, 3], [2, 40], [0, 17], [1, 0], [2, 5], [2, 6], [0, 47]]
MOVED = {"register_neurons": NEURONS, "num_test_time_registers": 1}
NO_CLS = {"use_cls_token": False, "pooling": "mean"}
ROTARY = {"position_embedding_type": "rotary", "qk_norm": True}
REDUCTIONS = ["max", "largest", "layer"]
SIZES = [(2, 3, 32, 32), (3, 3, 48, 24), (1, 3, 72, 40), (2, 3, 24, 56)]


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def moved(make_config, model_class=ViTRegModel, **fields):
    return model_class(make_config(**{**MOVED, **fields})).eval()


def plain_twin(model):
    """The same weights in a model that knows nothing of register neurons."""
    config = copy.deepcopy(model.config)
    config.register_neurons, config.num_test_time_registers = None, 0
    twin = type(model)(config).train(model.training)
    twin.load_state_dict(model.state_dict())
    return twin


# The algorithm, image by image and token by token


def slow_move(activations, layer, config):
    """SHIFTREGISTERNEURONS of the paper's Algorithm 2 for the neurons of one block and image, `(N, F)`."""
    first, count = config.num_cls_tokens + config.num_register_tokens, config.num_test_time_registers
    tokens, registers = range(len(activations)), range(first, first + count)
    others = [token for token in tokens if token not in registers]
    own = [(turn, neuron) for turn, (place, neuron) in enumerate(config.register_neurons) if place == layer]
    result = activations.clone()
    for turn, neuron in own:
        values = [activations[token, neuron].item() for token in others]
        if config.register_neuron_reduction == "max":
            value = max(values)
        elif config.register_neuron_reduction == "largest":
            value = max(values, key=abs)
        else:  # `sign_max(output[0, :, neuron_indices])` of the authors' shared/hook_fn.py
            value = max((activations[token, n].item() for token in tokens for _, n in own), key=abs)
        for token in tokens:
            kept = token == 0 and config.use_cls_token and config.test_time_register_cls == "keep"
            if not kept:
                result[token, neuron] = value if count and token == first + turn % count else 0.0
    return result


def scattered(count, width):
    """The fixed numbers of `test_time_register_init="random"`, in Python's own integers."""
    prime, rows = 2**31 - 1, []
    for place in range(count * width):
        number = place
        for _ in range(3):
            number = (number * number + 48271 * number + 1) % prime
        rows.append((number / prime - 0.5) * 12**0.5)
    return torch.tensor(rows).view(count, width)


def slow_initial(patches, config):
    """What test-time registers hold at first, `(T, D)`, from the patches `(P, D)` of one image."""
    count, width = config.num_test_time_registers, config.hidden_size
    if config.test_time_register_init == "zero":
        return torch.zeros(count, width)
    if config.test_time_register_init == "mean":
        return torch.stack([sum(patches) / len(patches)] * count)
    return scattered(count, width) * patches.square().mean().sqrt()


def slow_states(model, image):
    """Hidden states `(N, D)` of one image `(C, H, W)`; embeddings and attention are those of a plain model."""
    config, twin = model.config, plain_twin(model)
    embedded = twin.embeddings(image[None])
    tokens, first = embedded.tokens[0], config.num_cls_tokens + config.num_register_tokens
    tokens = torch.cat([tokens[:first], slow_initial(tokens[first:], config), tokens[first:]])
    states = [tokens]
    for number, layer in enumerate(twin.layers):
        tokens = tokens + layer.layer_scale1(layer.attention(layer.norm1(tokens)[None])[0][0])
        normed, mlp = layer.norm2(tokens), layer.mlp
        if config.use_swiglu_ffn:
            activations = torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        else:
            activations = torch.nn.functional.gelu(mlp.up_proj(normed))
        tokens = tokens + layer.layer_scale2(mlp.down_proj(slow_move(activations, number, config)))
        states.append(tokens)
    return states


@torch.no_grad()
def check_against_loops(model, pixels):
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(model.layers) + 1
    for index, image in enumerate(pixels):
        states = slow_states(model, image)
        for state, expected in zip(outputs.hidden_states, states, strict=True):
            close(state[index], expected)
        close(outputs.last_hidden_state[index], model.layernorm(states[-1]))


@pytest.mark.parametrize("swiglu", [False, True], ids=["MLP", "SwiGLU"])
@pytest.mark.parametrize("cls", ["zero", "keep"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_every_reduction_is_that_of_the_loops(make_config, swiglu, cls, reduction, count):
    fields = {"use_swiglu_ffn": swiglu, "test_time_register_cls": cls, "register_neuron_reduction": reduction}
    check_against_loops(moved(make_config, num_test_time_registers=count, **fields), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("fields", [{}, NO_CLS, {"layerscale_value": 0.5}], ids=["CLS", "no CLS", "LayerScale"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tokens_of_every_kind_stand_around(make_config, fields, registers, count):
    fields = {**fields, "num_register_tokens": registers, "num_test_time_registers": count}
    for cls in ("zero", "keep"):
        model = moved(make_config, test_time_register_cls=cls, **fields)
        check_against_loops(model, torch.randn(2, 3, 24, 16))


@pytest.mark.parametrize("init", ["zero", "mean", "random"])
@pytest.mark.parametrize("fields", [{}, {"embedding_norm": True}], ids=["plain", "norm before the blocks"])
def test_every_beginning(make_config, init, fields):
    model = moved(make_config, num_test_time_registers=2, test_time_register_init=init, **fields)
    check_against_loops(model, torch.randn(2, 3, 32, 32))


@torch.no_grad()
def test_reductions_cls_and_beginnings_make_a_difference(make_config):
    """Or the comparisons above could not fail."""
    pixels, swiglu, found = torch.randn(2, 3, 32, 32), {"use_swiglu_ffn": True}, []
    first = moved(make_config, **swiglu)
    choices = [{}, *({"register_neuron_reduction": reduction} for reduction in REDUCTIONS[1:])]
    choices += [{"test_time_register_cls": "keep"}, {"num_test_time_registers": 2}, {"register_neurons": NEURONS[1:]}]
    for choice in [*choices, {"test_time_register_init": "mean"}, {"test_time_register_init": "random"}]:
        model = moved(make_config, **swiglu, **choice)
        model.load_state_dict(first.state_dict())
        found.append(model(pixels).pooler_output)
    distances = torch.cdist(torch.stack(found).flatten(1), torch.stack(found).flatten(1))
    assert distances[~torch.eye(len(found), dtype=torch.bool)].min() > 1e-3


@pytest.mark.parametrize("cls", ["zero", "keep"])
def test_without_test_time_registers_neurons_are_zero_everywhere(make_config, cls):
    model = moved(make_config, num_test_time_registers=0, test_time_register_cls=cls)
    pixels = torch.randn(2, 3, 32, 32)
    check_against_loops(model, pixels)
    if cls == "zero":  # the same as a projection that does not read them
        twin = plain_twin(model)
        with torch.no_grad():
            for layer, neuron in NEURONS:
                twin.layers[layer].mlp.down_proj.weight[:, neuron] = 0
        close(model(pixels).last_hidden_state, twin(pixels).last_hidden_state)


def test_the_random_beginning_is_spread_as_patches_are(make_config):
    fields = {"num_test_time_registers": 3, "test_time_register_init": "random", "hidden_size": 256}
    model = moved(make_config, **fields)
    tokens = model.embeddings(torch.randn(4, 3, 32, 32)).tokens
    registers, patches = model.layout.test_time_registers(tokens), model.layout.patch_tokens(tokens)
    sizes = registers.square().mean((1, 2)).sqrt() / patches.square().mean((1, 2)).sqrt()
    assert sizes.tolist() == pytest.approx([sizes[0].item()] * 4)
    assert sizes[0].item() == pytest.approx(1, abs=0.05)
    assert abs(registers[0].mean() / registers[0].std()) < 0.1
    assert torch.corrcoef(registers[0]).fill_diagonal_(0).abs().max() < 0.2


# Batches


def padded(sizes, largest, filling):
    """Images of these sizes, alone and padded with `filling` to one batch, and its mask."""
    images = [torch.randn(3, *size) for size in sizes]
    pixels = torch.randn(len(sizes), 3, *largest) * filling
    mask = torch.zeros(len(sizes), *largest)
    for index, image in enumerate(images):
        height, width = image.shape[-2:]
        pixels[index, :, :height, :width], mask[index, :height, :width] = image, 1
    return images, pixels, mask


BATCHED = [
    {"register_neuron_reduction": reduction, "test_time_register_init": init, "num_test_time_registers": 2}
    for reduction, init in zip(REDUCTIONS, ["mean", "random", "zero"], strict=True)
]
BATCHED += [{**ROTARY, "use_swiglu_ffn": True, "register_neuron_reduction": "layer"}, NO_CLS]


@pytest.mark.parametrize("fields", BATCHED, ids=str)
class TestBatches:
    @torch.no_grad()
    def test_of_eight_are_eight_of_one(self, make_config, fields):
        model, pixels = moved(make_config, **fields), torch.randn(8, 3, 32, 48)
        together = model(pixels, output_hidden_states=True)
        for index in range(8):
            alone = model(pixels[index : index + 1], output_hidden_states=True)
            for one, other in zip(together.hidden_states, alone.hidden_states, strict=True):
                close(one[index], other[0])

    @torch.no_grad()
    def test_padding_takes_no_part(self, make_config, fields):
        model = moved(make_config, **fields)
        images, pixels, mask = padded([(40, 24), (48, 48), (16, 40)], (48, 48), filling=30.0)
        together = model(pixels, pixel_mask=mask, output_hidden_states=True)
        for index, image in enumerate(images):
            alone = model(image[None], output_hidden_states=True)
            rows, columns = alone.patch_map.shape[-2:]
            close(together.patch_map[index, :, :rows, :columns], alone.patch_map[0])
            for one, other in zip(together.hidden_states, alone.hidden_states, strict=True):
                close(model.layout.prefix_tokens(one)[index], model.layout.prefix_tokens(other)[0])

    def test_packed_groups_are_passes_of_their_own(self, make_config, fields):
        model = moved(make_config, **fields).train()
        images = [torch.randn(4, 3, 32, 32), torch.randn(3, 3, 16, 16), torch.randn(1, 3, 24, 40)]
        together, apart = model.forward_packed(images), [model(group) for group in images]
        for one, other in zip(together, apart, strict=True):
            for value, wanted in zip(one.to_tuple(), other.to_tuple(), strict=True):
                close(value, wanted)
        expected = gradients_of(model, lambda: [model(group) for group in images])
        assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
        for name, gradient in gradients_of(model, lambda: model.forward_packed(images)).items():
            close(gradient, expected[name])

    @torch.no_grad()
    def test_any_image_size(self, make_config, fields):
        model = moved(make_config, **fields)
        if "position_embedding_type" in fields:  # the loops know of no rotation
            assert model(torch.randn(2, 3, 72, 8)).patch_map.shape == (2, 32, 9, 1)
            return
        for size in [(8, 8), (48, 24), (16, 72)]:
            check_against_loops(model, torch.randn(1, 3, *size))


# Training


def weighted(outputs):
    """A sum of all tokens with random weights, the same in every call; squares behind a norm would be constant."""
    generator = torch.Generator().manual_seed(5)
    tokens = [output.last_hidden_state for output in outputs]
    return sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).mean() for t in tokens)


def gradients_of(model, run):
    model.zero_grad()
    torch.manual_seed(5)
    weighted(run()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_slopes(make_config):
    """Along a random direction of all parameters, a loss changes as its gradients say."""
    model = moved(make_config, num_test_time_registers=2, register_neuron_reduction="largest").double()
    pixels, step = torch.randn(1, 3, 16, 16).double(), 1e-4
    gradients = gradients_of(model, lambda: [model(pixels)])
    directions = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for name, p in model.named_parameters():
                p.add_(directions[name], alpha=sign * step)
            losses.append(weighted([model(pixels)]).item())
            for name, p in model.named_parameters():
                p.sub_(directions[name], alpha=sign * step)
    slope = sum((gradient * directions[name]).sum().item() for name, gradient in gradients.items())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)
    assert abs(slope) > 1e-3


RATES = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "hidden_dropout_prob": 0.1}


@pytest.mark.parametrize("fields", [{}, RATES, {**RATES, "drop_path_kind": "subset"}])
def test_gradient_checkpointing_changes_no_gradient(make_config, fields):
    model = moved(make_config, num_test_time_registers=2, **fields).train()
    pixels = torch.randn(4, 3, 32, 32)
    expected = gradients_of(model, lambda: [model(pixels)])
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for name, gradient in gradients_of(model, lambda: [model(pixels)]).items():
        close(gradient, expected[name])


@pytest.mark.parametrize("fields", [{}, {"patch_dropout_rate": 0.5}, ROTARY], ids=str)
def test_stochastic_depth_by_subsets_takes_masks_along(make_config, fields):
    """What padding holds must not matter, whichever samples and patches were kept."""
    rates = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "drop_path_kind": "subset"}
    model = moved(make_config, test_time_register_init="mean", **rates, **fields).train()
    _, pixels, mask = padded([(32, 8), (32, 16), (16, 16), (32, 32)], (32, 32), filling=1.0)
    found = []
    for filling in (0.0, 100.0):
        torch.manual_seed(3)
        outputs = model(pixels.where(mask[:, None].bool(), filling), pixel_mask=mask)
        found.append(outputs.cls_token)
    close(*found)
    packed = model.forward_packed([torch.randn(4, 3, 32, 32), torch.randn(3, 3, 16, 16)])
    assert all(output.last_hidden_state.isfinite().all() for output in packed)


def test_a_subset_of_one_sample_is_that_sample_alone(make_config):
    rates = {"drop_path_rate": 0.9, "drop_path_schedule": "uniform", "drop_path_kind": "subset"}
    layer, hidden = moved(make_config, **rates).train().layers[0], torch.randn(4, 22, 32)
    torch.manual_seed(1)
    kept = [torch.randperm(4)[0].item() for _ in range(2)]
    expected = hidden.clone()
    for sample, branch in zip(
        kept, [lambda x: layer.attention(layer.norm1(x))[0], lambda x: layer.mlp(layer.norm2(x))], strict=True
    ):
        expected[sample] += 4 * branch(expected[sample][None])[0]
    torch.manual_seed(1)
    close(layer(hidden), expected)


@pytest.mark.parametrize("init", ["zero", "mean", "random"])
def test_patch_dropout_keeps_test_time_registers(make_config, init):
    model = moved(make_config, patch_dropout_rate=0.5, num_test_time_registers=2, test_time_register_init=init).train()
    outputs = model(torch.randn(3, 3, 32, 48), output_hidden_states=True)
    assert outputs.hidden_states[0].shape == (3, 5 + 2 + 12, 32)
    tokens = outputs.hidden_states[0]
    for image in tokens:
        close(image[5:7], slow_initial(image[7:], model.config))
    outputs.last_hidden_state.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_half_precision_holds_sums_of_large_images(make_config):
    for init in ("mean", "random"):
        model = moved(make_config, test_time_register_init=init).half()
        model.embeddings.patch_embeddings.projection.bias.fill_(20.0)
        tokens = model.embeddings(torch.randn(1, 3, 512, 512).half()).tokens
        assert tokens.dtype == torch.float16
        close(tokens[0, 5].float().square().mean().sqrt().item(), 20.0, 2.0)


# Nothing else changes


def test_without_register_neurons_nothing_is_added(make_config):
    config = make_config(test_time_register_init="mean", test_time_register_cls="keep", register_neurons=[])
    plain, pixels = ViTRegModel(make_config()).eval(), torch.randn(2, 3, 32, 32)
    model = ViTRegModel(config).eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    assert all(layer.mlp.register_neurons is None for layer in model.layers)
    assert torch.equal(model(pixels).last_hidden_state, plain(pixels).last_hidden_state)


@pytest.mark.parametrize("fields", [{}, {"use_swiglu_ffn": True, **ROTARY}])
def test_no_parameter_is_added(make_config, fields):
    plain = ViTRegForImageClassification(make_config(**fields))
    model = moved(make_config, ViTRegForImageClassification, num_test_time_registers=3, **fields)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not list(model.buffers())
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert model.config.num_register_tokens == 4
    assert model.config.num_prefix_tokens == 8


def test_blocks_without_register_neurons_are_as_before(make_config):
    model = moved(make_config, register_neurons=[[1, 2]])
    assert [layer.mlp.register_neurons is None for layer in model.layers] == [True, False, True]


# Outputs


pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))
NO_REGISTERS = {"num_register_tokens": 0}
PREFIXES = [({}, 1, 4), (NO_CLS, 0, 4), (NO_REGISTERS, 1, 0), ({**NO_CLS, **NO_REGISTERS}, 0, 0)]


@pytest.mark.parametrize(("fields", "cls", "registers"), PREFIXES, ids=["all", "no CLS", "no registers", "alone"])
@torch.no_grad()
def test_named_tokens_leave_test_time_registers_out(make_config, fields, cls, registers):
    model = moved(make_config, num_test_time_registers=2, **fields)
    outputs = model(pixels, output_hidden_states=True, output_attentions=True, output_prefix_attentions=True)
    tokens, prefix = outputs.last_hidden_state, cls + registers + 2
    assert tokens.shape == (2, prefix + 15, 32)
    assert torch.equal(outputs.patch_tokens, tokens[:, prefix:])
    assert torch.equal(outputs.patch_map, tokens[:, prefix:].reshape(2, 5, 3, 32).permute(0, 3, 1, 2))
    assert (outputs.cls_token is None) == (cls == 0)
    assert outputs.register_tokens is None or torch.equal(outputs.register_tokens, tokens[:, cls : cls + registers])
    assert (outputs.register_tokens is None) == (registers == 0)
    for full, part in zip(outputs.attentions, outputs.prefix_attentions, strict=True):
        assert full.shape[-2:] == (prefix + 15, prefix + 15)
        assert part.shape == (2, 4, prefix, prefix + 15)
        close(part, full[:, :, :prefix])
        close(part.sum(-1), torch.ones(2, 4, prefix))


@torch.no_grad()
def test_every_backend_gives_the_same_with_padding_too(make_config):
    model, found = moved(make_config, num_test_time_registers=2, test_time_register_init="mean"), []
    _, images, mask = padded([(40, 24), (48, 48), (16, 40)], (48, 48), filling=30.0)
    flags = {"output_attentions": True, "output_prefix_attentions": True, "output_hidden_states": True}
    for backend in ("eager", "sdpa", "flex_attention"):
        model.config._attn_implementation = backend
        found.append(model(images, pixel_mask=mask, **flags))
    real = model.layout.token_mask(found[0].patch_mask)
    for outputs in found[1:]:
        for mine, theirs in zip(outputs.hidden_states, found[0].hidden_states, strict=True):
            close(mine[real], theirs[real])
        for mine, theirs in zip(outputs.attentions, found[0].attentions, strict=True):
            close(mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real])
        for mine, theirs in zip(outputs.prefix_attentions, found[0].prefix_attentions, strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("reshape", [True, False])
@torch.no_grad()
def test_intermediate_layers_are_patches_alone(make_config, reshape):
    model = moved(make_config, num_test_time_registers=2)
    states = model(pixels, output_hidden_states=True).hidden_states
    for layer, (patches, cls_token) in enumerate(
        model.get_intermediate_layers(pixels, 3, reshape=reshape, return_class_token=True, norm=False)
    ):
        patches = patches.flatten(2).transpose(1, 2) if reshape else patches
        assert torch.equal(patches, states[layer + 1][:, 7:])
        assert torch.equal(cls_token, states[layer + 1][:, 0])


@torch.no_grad()
def test_feature_maps_of_a_backbone_are_patches_alone(make_config):
    model = moved(make_config, ViTRegBackbone, num_test_time_registers=2, out_indices=[0, 2], apply_layernorm=False)
    outputs = model(pixels, output_hidden_states=True)
    for stage, feature_map in zip((0, 2), outputs.feature_maps, strict=True):
        patches = outputs.hidden_states[stage][:, 7:]
        assert torch.equal(feature_map, patches.reshape(2, 5, 3, 32).permute(0, 3, 1, 2))


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "cls_register_mean"])
@torch.no_grad()
def test_classifiers_read_what_they_read_before(make_config, pooling):
    model = moved(make_config, ViTRegForImageClassification, pooling=pooling)
    tokens = model.vitreg(pixels).last_hidden_state
    kinds = {"cls": tokens[:, 0], "mean": tokens[:, 6:].mean(1), "register": tokens[:, 1:5].mean(1)}
    logits = model.classifier(torch.cat([kinds[kind] for kind in pooling.split("_") if kind in kinds][:2], dim=-1))
    if pooling == "cls_register_mean":
        logits = model.classifier(torch.cat([kinds["cls"], kinds["register"]], dim=-1))
    assert logits.shape == (2, 5)
    close(model(pixels).logits, logits)


def test_masked_images_and_segmentations_train(make_config):
    masking = moved(make_config, ViTRegForMaskedImageModeling, use_mask_token=True).train()
    outputs = masking(pixels, bool_masked_pos=torch.rand(2, 15) < 0.5)
    assert outputs.reconstruction.shape == pixels.shape
    segmenting = moved(make_config, ViTRegForSemanticSegmentation).train()
    segmented = segmenting(pixels, labels=torch.randint(0, 5, (2, 40, 24)))
    assert segmented.logits.shape == (2, 5, 5, 3)
    for model, loss in ((masking, outputs.loss), (segmenting, segmented.loss)):
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_separate_norm_is_that_of_all_before_the_patches(make_config):
    model = moved(make_config, separate_cls_norm=True)
    torch.nn.init.normal_(model.cls_norm.weight)
    outputs = model(pixels, output_hidden_states=True)
    close(outputs.last_hidden_state[:, :6], model.cls_norm(outputs.hidden_states[-1][:, :6]))
    close(outputs.patch_tokens, model.layernorm(outputs.hidden_states[-1][:, 6:]))


def test_tensor_parallel_plans_leave_the_mlp_whole(make_config):
    plain = set(ViTRegModel(make_config(use_swiglu_ffn=True)).tp_plan)
    plan = set(moved(make_config, use_swiglu_ffn=True).tp_plan)
    assert plain - plan == {f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {f"layers.*.attention.{name}_proj" for name in "qkvo"} <= plan


# Saved, copied, compiled, exported


CHOSEN = {"num_test_time_registers": 2, "register_neuron_reduction": "layer", "test_time_register_cls": "keep"}
CHOSEN |= {"test_time_register_init": "random"}

REMOTE = """
    import sys
    sys.modules["vitreg_hf"] = None  # importing it is an error
    import torch, transformers

    folder = sys.argv[1]
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    torch.save(model(torch.load(folder + "/pixels.pt", weights_only=True)).last_hidden_state, folder + "/result.pt")
"""


class TestSaved:
    def test_comes_back_bit_by_bit(self, make_config, tmp_path):
        model = moved(make_config, **CHOSEN)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["register_neurons"] == NEURONS
        assert {name: saved[name] for name in CHOSEN} == CHOSEN
        loaded = ViTRegModel.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)

    def test_checkpoints_of_plain_models_load_with_register_neurons(self, make_config, tmp_path):
        plain = ViTRegModel(make_config())
        plain.save_pretrained(tmp_path)
        loaded, report = ViTRegModel.from_pretrained(tmp_path, **MOVED, output_loading_info=True)
        assert not any(report.values())
        check_against_loops(loaded.eval(), pixels)
        assert not any(".mlp." in name for name in loaded.tp_plan)

    def test_with_code_where_the_package_is_missing(self, make_config, tmp_path, tmp_path_factory, monkeypatch):
        monkeypatch.setattr(ViTRegModel, "_auto_class", None)  # undone after the test: registering is global
        ViTRegModel.register_for_auto_class("AutoModel")
        model = moved(make_config, **CHOSEN)
        model.save_pretrained(tmp_path)
        torch.save(pixels, tmp_path / "pixels.pt")
        environment = {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(REMOTE), str(tmp_path)],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        result = torch.load(tmp_path / "result.pt", weights_only=True)
        assert torch.equal(result, model(pixels).last_hidden_state)

    def test_copies_and_pickles_after_passes_of_every_kind(self, make_config):
        model = moved(make_config, **CHOSEN)
        expected = model(pixels).last_hidden_state
        with torch.inference_mode():
            assert torch.equal(model(pixels).last_hidden_state, expected)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(pixels).last_hidden_state, expected)
            other.train()(pixels).last_hidden_state.square().sum().backward()
            assert all(p.grad.isfinite().all() for p in other.parameters())


def test_passes_that_only_pretend_leave_nothing_behind(make_config):
    """Nor do real ones: tensors of one kind beside those of the other are an error."""
    model, mode = moved(make_config, **CHOSEN), FakeTensorMode()
    weights = {name: mode.from_tensor(p) for name, p in model.state_dict().items()}
    for _ in range(2):
        with mode, torch.no_grad():
            fake = torch.func.functional_call(model, weights, (torch.randn(2, 3, 32, 32),)).last_hidden_state
        assert fake.shape == (2, 23, 32)
        assert model(torch.randn(2, 3, 32, 32)).last_hidden_state.isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own attention under vmap
@torch.no_grad()
def test_an_ensemble_by_vmap(make_config):
    models = [moved(make_config, **CHOSEN) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)

    def tokens(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (pixels,)).cls_token

    for _ in range(2):
        together = torch.func.vmap(tokens)(parameters, buffers)
        close(together, torch.stack([model(pixels).cls_token for model in models]))


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


SHALLOW = {"num_hidden_layers": 2, "register_neurons": [[0, 3], [1, 40], [0, 17]]}
OTHER = {"use_swiglu_ffn": True, "register_neuron_reduction": "largest", "test_time_register_init": "mean", **ROTARY}
COMPILED = {"layer, random, keep": {**SHALLOW, **CHOSEN}, "rotary, SwiGLU, largest, mean": {**SHALLOW, **OTHER}}


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    @torch.no_grad()
    def test_once_for_all_sizes_and_passes_between(self, make_config, count_graphs):
        model = moved(make_config, **SHALLOW, **CHOSEN)
        compiled, graphs = count_graphs(model)
        for size in [(2, 3, 48, 24), (4, 3, 24, 56), (5, 3, 72, 40)]:
            images = torch.randn(*size)
            got = compiled(images)
            close(got.last_hidden_state, model(images).last_hidden_state)  # which keeps what a compiled pass does not
        assert len(graphs) == 1

    def test_in_training_with_padding_and_subsets(self, make_config):
        rates = {"drop_path_rate": 0.5, "drop_path_kind": "subset"}
        model = moved(make_config, **SHALLOW, **OTHER, **rates).train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        _, images, mask = padded([(32, 8), (32, 16), (16, 16), (32, 32)], (32, 32), filling=1.0)
        compiled(images, pixel_mask=mask).last_hidden_state.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def dynamic_axes(patch=8):
    return {0: Dim("batch", min=1, max=64), 2: patch * Dim("rows", max=64), 3: patch * Dim("columns", max=64)}


@pytest.mark.parametrize("fields", COMPILED.values(), ids=COMPILED)
@torch.no_grad()
def test_exported_for_any_batch_height_and_width(make_config, fields):
    model = moved(make_config, **fields)
    axes = {"pixel_values": dynamic_axes()}
    program = torch.export.export(model, (), {"pixel_values": torch.randn(*SIZES[0])}, dynamic_shapes=axes).module()
    for size in SIZES:
        images = torch.randn(*size)
        close(program(pixel_values=images).last_hidden_state, model(images).last_hidden_state)


@pytest.mark.filterwarnings("ignore:.*The axis name. .* will not be used")  # said of every axis that two inputs share
@torch.no_grad()
def test_onnx_with_padding_at_other_sizes(make_config, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, path = moved(make_config, **SHALLOW, **CHOSEN), str(tmp_path / "model.onnx")
    batch, rows, columns = Dim("batch", max=64), Dim("rows", max=64), Dim("columns", max=64)
    axes = {
        "pixel_values": {0: batch, 2: 8 * rows, 3: 8 * columns},
        "pixel_mask": {0: batch, 1: 8 * rows, 2: 8 * columns},
    }
    inputs = {"pixel_values": torch.randn(2, 3, 40, 48), "pixel_mask": torch.ones(2, 40, 48)}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=axes, dynamo=True, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch_size, height, width in [(2, 40, 48), (3, 64, 24)]:
        images, mask = torch.randn(batch_size, 3, height, width), torch.ones(batch_size, height, width)
        mask[1, :, 16:] = 0
        expected = model(images, pixel_mask=mask)
        (first, *_) = session.run(None, {"pixel_values": images.numpy(), "pixel_mask": mask.numpy()})
        close(torch.from_numpy(first)[:, :7], expected.last_hidden_state[:, :7], 1e-4)
