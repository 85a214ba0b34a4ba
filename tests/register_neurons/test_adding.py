"""Registers in a trained model: at test time, as a bias of attention, and learned ones that start as mean patches."""

import copy

import pytest
import torch

from vitreg_hf import (
    RegisterNeurons,
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
    add_registers,
    add_test_time_registers,
    bias_from_images,
    find_register_neurons,
    mean_patch,
)
from vitreg_hf.register_neurons.adding import add_attention_bias, with_config
from vitreg_hf.register_neurons.averages import mean_register
from vitreg_hf.register_neurons.planted import planted_network, planted_neurons, processor_for


def said(model, pixels, **wanted):
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **wanted)


def cosines(one, other):
    return torch.cosine_similarity(one.pooler_output, other.pooler_output, dim=-1)


@pytest.fixture(params=[False, True], ids=["MLP", "SwiGLU"])
def model(request):
    return planted_network(swiglu=request.param)


@pytest.fixture
def found(model):
    """The planted neurons, as a search would give them."""
    from vitreg_hf.register_neurons.ranking import RegisterNeuron

    ranking = tuple(RegisterNeuron(*pair, 50.0, 0.0) for pair in planted_neurons(model.config))
    reduction = "largest" if model.config.use_swiglu_ffn else "max"
    return RegisterNeurons(ranking, 5, 60.0, "median rule", 6, 4, 0.2, 8, reduction)


# At test time


@pytest.mark.parametrize("init", ["zero", "mean", "random"])
@pytest.mark.parametrize("cls", ["zero", "keep"])
@pytest.mark.parametrize("count", [1, 2])
def test_no_choice_of_the_authors_matters(model, found, images, init, cls, count):
    mended = add_test_time_registers(model, found, count, init=init, cls=cls)
    before, after = said(model, images.pixels), said(mended, images.pixels, output_prefix_attentions=True)
    assert before.hidden_states[-1][:, -36:].norm(dim=-1).max() > 4 * found.threshold
    assert after.hidden_states[-1][:, -36:].norm(dim=-1).max() < found.threshold
    assert cosines(before, after)[:-1].min() > 0.98
    on_registers = after.prefix_attentions[-1][:-1, :4, 0, 1 : 1 + count].sum(-1)
    assert on_registers.min() > 0.8


def test_negative_neurons_of_swiglu_need_the_largest_magnitude(images):
    model = planted_network(swiglu=True)
    neurons = planted_neurons(model.config)
    sizes = {}
    for reduction in ("max", "largest"):
        mended = add_test_time_registers(model, neurons, reduction=reduction)
        sizes[reduction] = said(mended, images.pixels[:-1]).hidden_states[-1][:, 1].norm(dim=-1).mean().item()
    assert sizes["largest"] > 1.5 * sizes["max"]


def test_the_reduction_is_that_of_the_search_unless_told(model, found):
    assert add_test_time_registers(model, found).config.register_neuron_reduction == found.reduction
    assert add_test_time_registers(model, list(found)).config.register_neuron_reduction == "max"
    assert add_test_time_registers(model, found, reduction="layer").config.register_neuron_reduction == "layer"


def test_the_register_stands_behind_trained_ones(images):
    model = planted_network(registers=4)
    mended = add_test_time_registers(model, planted_neurons(model.config))
    before, after = said(model, images.pixels), said(mended, images.pixels)
    assert after.last_hidden_state.shape[1] == before.last_hidden_state.shape[1] + 1
    assert after.register_tokens.shape == before.register_tokens.shape
    norms = after.hidden_states[-1][:-1].norm(dim=-1)
    assert norms[:, 5].min() > 4 * torch.cat([norms[:, :5], norms[:, 6:]], dim=1).max()
    assert cosines(before, after)[:-1].min() > 0.999


def test_weights_are_shared_and_the_given_model_is_not_changed(model, found, images):
    before, config = said(model, images.pixels).pooler_output, model.config.to_dict()
    mended = add_test_time_registers(model.train(), found)
    assert mended.training
    assert model.config.to_dict() == config
    pairs = zip(model.parameters(), mended.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert torch.equal(said(model.eval(), images.pixels).pooler_output, before)


CLASSES = [
    *(ViTRegModel, ViTRegForImageClassification, ViTRegForSemanticSegmentation),
    *(ViTRegForMaskedImageModeling, ViTRegBackbone),
]


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_class_comes_back_as_itself(model_class, images):
    model = planted_network(model_class, out_indices=[2, 6]) if model_class is ViTRegBackbone else None
    model = model or planted_network(model_class)
    model.config._attn_implementation = "eager"
    mended = add_test_time_registers(model, planted_neurons(model.config))
    back = with_config(mended, register_neurons=None, num_test_time_registers=0)
    for one in (mended, back):
        assert type(one) is model_class
        assert one.config._attn_implementation == "eager"
    with torch.no_grad():
        outputs = [one(images.pixels[:2]) for one in (model, back, mended)]
    for value, again in zip(outputs[0].to_tuple(), outputs[1].to_tuple(), strict=True):
        (value, again) = (value[-1], again[-1]) if isinstance(value, tuple) else (value, again)
        assert torch.equal(value, again)
    assert outputs[2].to_tuple()[0] is not None


def test_a_mask_token_that_the_config_does_not_tell_of_is_kept():
    model = ViTRegModel(planted_network().config, use_mask_token=True)
    mended = add_test_time_registers(model, [(0, 1)])
    assert torch.equal(mended.embeddings.mask_token, model.embeddings.mask_token)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_weights_stay(dtype):
    mended = add_test_time_registers(planted_network().to(dtype), [(0, 1)])
    assert {parameter.dtype for parameter in mended.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("neurons", "options", "message"),
    [
        ([], {}, "at least one register neuron, got none"),
        ([(0, 1)], {"num_registers": 0}, "one test-time register or more, got 0"),
        ([(6, 1)], {}, "register_neurons"),
        ([(0, 192)], {}, "register_neurons"),
        ([(-1, 0)], {}, "register_neurons"),
        ([(0, 1), (0, 1)], {}, "register_neurons"),
        ([(0, 1)], {"cls": "leave"}, "test_time_register_cls"),
        ([(0, 1)], {"init": "ones"}, "test_time_register_init"),
        ([(0, 1)], {"reduction": "mean"}, "register_neuron_reduction"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(neurons, options, message):
    with pytest.raises(ValueError, match=message):
        add_test_time_registers(planted_network(), neurons, **options)


# As a bias of attention


def test_the_mean_register_is_that_of_single_passes(model, found, images):
    mended = add_test_time_registers(model, found)
    keys, values = mean_register(mended, images.pixels, batch_size=3)
    for layer, block in enumerate(mended.layers):
        states = [said(mended, image[None]).hidden_states[layer][0, 1] for image in images.pixels]
        normed = block.norm1(torch.stack(states))
        for got, projection in ((keys, block.attention.k_proj), (values, block.attention.v_proj)):
            expected = projection(normed).mean(0).view(6, 16)
            torch.testing.assert_close(got[layer], expected, atol=1e-4, rtol=1e-4)


def test_a_bias_of_attention_leaves_no_outlier_anywhere(model, found, images):
    mended = add_test_time_registers(model, found)
    biased = bias_from_images(mended, images.pixels[:-1])
    before, after = said(model, images.pixels), said(biased, images.pixels, output_prefix_attentions=True)
    assert after.last_hidden_state.shape == before.last_hidden_state.shape  # no token more
    for state in after.hidden_states:
        assert state.norm(dim=-1).max() < found.threshold
    assert cosines(before, after)[:-1].min() > 0.98
    deleted = with_config(mended, num_test_time_registers=0)
    assert cosines(before, said(deleted, images.pixels))[:-1].max() < 0.8
    left = 1 - after.prefix_attentions[-1][:, :4, 0].sum(-1)  # what goes to the bias
    assert left.min() > 0.8


def test_biases_are_refused_where_they_do_not_fit(model, found, images):
    mended = add_test_time_registers(model, found)
    keys, values = mean_register(mended, images.pixels[:1])
    two = add_test_time_registers(model, found, 2)
    for wrong in (model, two):
        with pytest.raises(ValueError, match="one test-time register"):
            bias_from_images(wrong, images.pixels)
        with pytest.raises(ValueError, match="one test-time register"):
            add_attention_bias(wrong, keys, values)
    with pytest.raises(ValueError, match=r"shape \(6, 6, 16\), got \(5, 6, 16\), \(6, 6, 16\)"):
        add_attention_bias(mended, keys[1:], values)
    own = add_test_time_registers(planted_network(attention_bias_kv=True), [(0, 1)])
    with pytest.raises(ValueError, match="attention_bias_kv=True"):
        add_attention_bias(own, keys, values)


# New ones to be tuned


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("model_class", [ViTRegModel, ViTRegForImageClassification])
def test_registers_that_start_as_average_patches_hardly_change_outputs(registers, model_class, images):
    model = planted_network(model_class, registers=registers, token_initializer_range=2.0)
    average = mean_patch(model, images.pixels)
    by_patch, at_random = add_registers(model, 4, average), add_registers(model, 4)
    backbones = [one.base_model for one in (model, by_patch, at_random)]
    before, *after = [said(one, images.pixels[:-1]) for one in backbones]
    near, far = [(1 - cosines(before, one)).mean().item() for one in after]
    assert near < 1e-3
    assert near < far / 2
    for one in (by_patch, at_random):
        assert type(one) is model_class
        assert one.config.num_register_tokens == registers + 4
        tokens = one.base_model.embeddings.register_tokens
        assert tokens.shape == (1, registers + 4, 96)
        if registers:  # which stay in front
            assert torch.equal(tokens[:, :registers], model.base_model.embeddings.register_tokens)
        distances = torch.cdist(tokens[0], tokens[0]) + torch.eye(registers + 4) * 1e3
        assert distances.min() > 0.1


def test_the_average_patch_is_what_joins_registers(images):
    """What the first block gets, before the norm of the embeddings, which registers go through too."""
    for fields in ({}, {"embedding_norm": True}, {"registers": 2}, {"hidden_dropout_prob": 0.5}):
        model = planted_network(**fields).train()
        without_norm = copy.deepcopy(model).eval()
        without_norm.embeddings.norm = torch.nn.Identity()
        expected = said(without_norm, images.pixels).hidden_states[0][:, -36:].mean((0, 1))
        torch.testing.assert_close(mean_patch(model, images.pixels, batch_size=3), expected, atol=1e-5, rtol=1e-5)
        by_files = mean_patch(model, images.folder, processor_for(model))
        torch.testing.assert_close(by_files, expected, atol=1e-5, rtol=1e-5)
        assert model.training
        assert isinstance(
            model.embeddings.norm, torch.nn.LayerNorm if "embedding_norm" in fields else torch.nn.Identity
        )


def test_gradients_reach_new_registers_each_its_own(images):
    model = add_registers(planted_network(registers=1).train(), 3, torch.zeros(96))
    assert model.training
    tokens = model.embeddings.register_tokens
    assert isinstance(tokens, torch.nn.Parameter)
    model = add_registers(planted_network(), 3, mean_patch(planted_network(), images.pixels))
    (model(images.pixels[:2]).cls_token * torch.randn(96)).sum().backward()
    gradients = model.embeddings.register_tokens.grad[0]
    assert gradients.norm(dim=-1).min() > 0
    assert torch.pdist(gradients).min() > 1e-6


def test_a_seed_makes_the_differences(images):
    model, average = planted_network(), torch.randn(96)
    made = [add_registers(model, 2, average, seed).embeddings.register_tokens for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, (0,), "one register or more, got 0"),
        ({}, (1, torch.zeros(95)), r"shape \(96,\), got \(95,\)"),
        ({"registers": 1, "register_position_embeddings": True}, (1,), "register_position_embeddings=True"),
    ],
)
def test_registers_that_cannot_be_added_are_refused(fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_registers(planted_network(**fields), *arguments)


def test_averages_leave_the_mode_as_it_was(images):
    model = planted_network().train()
    model.layers[1].eval()
    mended = add_test_time_registers(model, planted_neurons(model.config))
    modes = [module.training for module in model.modules()]
    mean_patch(model, images.pixels[:1])
    assert [module.training for module in model.modules()] == modes
    mean_register(mended, images.pixels[:1])
    assert mended.training


def test_a_mended_model_can_be_mended_with_other_neurons(images):
    """The latter replace the former: mending never adds up."""
    model = planted_network()
    first = add_test_time_registers(model, [(0, 1)])
    again = add_test_time_registers(first, planted_neurons(model.config))
    once = add_test_time_registers(model, planted_neurons(model.config))
    assert torch.equal(said(again, images.pixels).pooler_output, said(once, images.pixels).pooler_output)


def test_a_bias_for_other_neurons_is_not_mended_again(images):
    mended = add_test_time_registers(planted_network(), planted_neurons(planted_network().config))
    biased = bias_from_images(mended, images.pixels)
    with pytest.raises(ValueError, match="got one with an attention bias for its register neurons"):
        add_test_time_registers(biased, [(0, 1)])


def test_weights_that_are_added_have_the_type_of_the_others(images):
    model = planted_network().to(torch.bfloat16)
    mended = add_test_time_registers(model, planted_neurons(model.config))
    for one in (bias_from_images(mended, images.pixels), add_registers(model, 2, mean_patch(model, images.pixels))):
        assert {parameter.dtype for parameter in one.parameters()} == {torch.bfloat16}


def test_what_is_frozen_stays_so_in_the_mode_that_it_was_in(images):
    model = planted_network(registers=1).requires_grad_(False).train()
    model.layers[0].eval()
    model.config.name_or_path = "from/here"
    mended = add_test_time_registers(model, planted_neurons(model.config))
    assert not any(parameter.requires_grad for parameter in mended.parameters())
    added = add_registers(model, 2)
    assert [name for name, p in added.named_parameters() if p.requires_grad] == ["embeddings.register_tokens"]
    for one in (mended, added):
        assert [layer.training for layer in one.layers] == [False, *[True] * 5]
        assert one.training
        assert one.name_or_path == "from/here"


def test_a_copy_of_a_mended_model_is_its_own(images):
    mended = add_test_time_registers(planted_network(), planted_neurons(planted_network().config))
    other = copy.deepcopy(mended)
    with torch.no_grad():
        other.embeddings.cls_token.add_(1)
    assert not torch.equal(other.embeddings.cls_token, mended.embeddings.cls_token)
    assert find_register_neurons(planted_network(), images.pixels, top_k=5, progress=False).count == 5
