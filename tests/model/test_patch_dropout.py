"""Patch dropout: which patches training leaves out, and that CLS and registers always stay."""

import pytest
import torch

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegConfig,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from vitreg_hf.model.token_layout import TokenLayout


@pytest.fixture
def layout():
    return TokenLayout(num_cls=1, num_registers=2, num_test_time_registers=0, patch_size=(8, 8))


def embedded(model, pixels, **kwargs):
    """What the first block gets in this mode, and what it would get in evaluation."""
    mode = model.training
    found = model.embeddings(pixels, **kwargs)
    whole = model.eval().embeddings(pixels, **kwargs)
    model.train(mode)
    return found, whole


@pytest.mark.parametrize("fields", [{}, {"num_register_tokens": 0}, {"use_cls_token": False, "pooling": "mean"}])
def test_cls_and_registers_stay_and_kept_patches_have_their_own_positions(make_config, fields):
    model = ViTRegModel(make_config(patch_dropout_rate=0.5, **fields)).train()
    found, whole = embedded(model, torch.randn(3, 3, 32, 48))
    layout = model.layout
    assert torch.equal(layout.prefix_tokens(found.tokens), layout.prefix_tokens(whole.tokens))
    kept, all_patches = layout.patch_tokens(found.tokens), layout.patch_tokens(whole.tokens)
    assert kept.shape == (3, 12, 32)
    for image in range(3):  # each kept one is one of the whole, and they stand in its order
        same = (kept[image][:, None] == all_patches[image][None]).all(-1)
        assert same.sum(1).tolist() == [1] * 12
        assert same.int().argmax(1).diff().min() > 0
    assert found.grid is None


def test_every_patch_is_kept_as_often_as_the_rate_says(layout):
    draws, count = 4000, 5
    chosen = layout.random_patches(torch.zeros(draws, 8, 1), count, None)
    kept = torch.zeros(draws, 8).scatter_(1, chosen, 1.0)
    assert torch.equal(kept.sum(1), torch.full((draws,), 5.0))
    deviation = (5 / 8 * 3 / 8 / draws) ** 0.5
    assert ((kept.mean(0) - 5 / 8).abs() <= 5 * deviation).all()


def test_padding_is_kept_only_where_real_patches_do_not_suffice(layout):
    mask = torch.tensor([[True] * 6 + [False] * 2, [True] * 2 + [False] * 6])
    for _ in range(20):
        chosen = layout.random_patches(torch.zeros(2, 8, 1), 4, mask)
        real = layout.chosen_patches(mask, chosen)
        assert real.sum(1).tolist() == [4, 2]


def test_padded_batches_take_their_mask_along(make_config):
    model = ViTRegModel(make_config(patch_dropout_rate=0.5)).train()
    pixel_mask = torch.zeros(2, 32, 32)
    pixel_mask[0] = 1
    pixel_mask[1, :16, :16] = 1
    pixels = torch.randn(2, 3, 32, 32)
    outputs = []
    for padding in (0.0, 100.0):
        torch.manual_seed(4)
        outputs.append(model(pixels.where(pixel_mask[:, None].bool(), padding), pixel_mask=pixel_mask))
    assert outputs[0].patch_mask.sum(1).tolist() == [8, 4]
    assert outputs[0].patch_tokens.shape == (2, 8, 32)
    torch.testing.assert_close(outputs[0].cls_token, outputs[1].cls_token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 12), (0.5, 8), (0.99, 1)])
def test_the_number_of_kept_patches_is_exact_and_at_least_one(make_config, rate, kept):
    model = ViTRegModel(make_config(patch_dropout_rate=rate)).train()
    outputs = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert outputs.patch_tokens.shape == (2, kept, 32)
    assert outputs.register_tokens.shape == (2, 4, 32)
    assert outputs.patch_map is None
    assert all(state.shape == (2, 5 + kept, 32) for state in outputs.hidden_states)


def test_evaluation_keeps_everything_and_rate_zero_draws_nothing(make_config):
    model = ViTRegModel(make_config(patch_dropout_rate=0.5)).eval()
    whole = ViTRegModel(make_config()).train()
    whole.load_state_dict(model.state_dict())
    pixels, state = torch.randn(2, 3, 32, 32), torch.get_rng_state()
    assert torch.equal(model(pixels).patch_map, whole(pixels).patch_map)
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_pooling_is_over_kept_patches(make_config):
    model = ViTRegForImageClassification(make_config(patch_dropout_rate=0.5, pooling="mean")).train()
    outputs = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1]))
    assert outputs.patch_tokens.shape == (2, 8, 32)
    torch.testing.assert_close(outputs.logits, model.classifier(outputs.patch_tokens.mean(1)))
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_only_kept_patches_have_gradients(make_config):
    model = ViTRegModel(make_config(patch_dropout_rate=0.75)).train()
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(pixels).pooler_output.square().mean().backward()
    per_patch = pixels.grad.abs().unfold(2, 8, 8).unfold(3, 8, 8).sum((1, 4, 5)).flatten(1)
    assert (per_patch > 0).sum(1).tolist() == [4, 4]


def test_an_average_of_first_layers_is_that_of_all_patches(make_config):
    """The mean over kept patches is an unbiased estimate of the mean over all."""
    model = ViTRegModel(make_config(patch_dropout_rate=0.5)).train()
    pixels = torch.randn(1, 3, 32, 32).expand(2000, -1, -1, -1)
    with torch.no_grad():
        found, whole = embedded(model, pixels)
    means = model.layout.patch_tokens(found.tokens).mean(1)
    expected = model.layout.patch_tokens(whole.tokens)[0].mean(0)
    assert ((means.mean(0) - expected).abs() <= 5 * means.std(0) / 2000**0.5).all()


def test_packed_groups_are_thinned_each(make_config):
    model = ViTRegModel(make_config(patch_dropout_rate=0.5)).train()
    large, small = model.forward_packed([torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)])
    assert (large.patch_tokens.shape, small.patch_tokens.shape) == ((2, 8, 32), (3, 2, 32))
    assert large.patch_map is small.patch_map is None


@pytest.mark.parametrize(
    ("model_class", "reader"),
    [
        (ViTRegForMaskedImageModeling, "masked image modeling"),
        (ViTRegForSemanticSegmentation, "semantic segmentation"),
        (ViTRegBackbone, "maps of a backbone"),
    ],
)
def test_what_reads_a_map_refuses_to_train_and_still_evaluates(make_config, model_class, reader):
    model, pixels = model_class(make_config(patch_dropout_rate=0.5)), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=f"Expected patch_dropout_rate=0 to train .*{reader}.* got 0.5"):
        model.train()(pixels)
    assert model.eval()(pixels).patch_map.shape == (1, 32, 4, 4)


def test_masked_patches_and_maps_of_layers_need_every_patch(make_config):
    model = ViTRegModel(make_config(patch_dropout_rate=0.5, use_mask_token=True)).train()
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="Expected patch_dropout_rate=0 to train with bool_masked_pos"):
        model(pixels, bool_masked_pos=torch.ones(1, 16))
    with pytest.raises(ValueError, match="Expected patch_dropout_rate=0 to train on maps of intermediate layers"):
        model.get_intermediate_layers(pixels, reshape=True)
    assert model.get_intermediate_layers(pixels)[0].shape == (1, 8, 32)


def test_token_sequences_of_a_backbone_train(make_config):
    model = ViTRegBackbone(make_config(patch_dropout_rate=0.5, reshape_hidden_states=False)).train()
    assert model(torch.randn(1, 3, 32, 32)).feature_maps[0].shape == (1, 5 + 8, 32)


def test_compiles_without_a_graph_break(make_config):
    model = ViTRegForImageClassification(make_config(patch_dropout_rate=0.5, num_hidden_layers=1)).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(torch.randn(2, 3, 32, 32), labels=torch.zeros(2, dtype=torch.long))
    assert outputs.patch_tokens.shape == (2, 8, 32)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_rates_out_of_range_are_refused(make_config, rate):
    with pytest.raises(ValueError, match="Expected patch_dropout_rate to be a probability in"):
        make_config(patch_dropout_rate=rate)


def test_the_rate_is_saved_and_old_configs_have_none(make_config, tmp_path):
    make_config(patch_dropout_rate=0.25).save_pretrained(tmp_path)
    assert ViTRegConfig.from_pretrained(tmp_path).patch_dropout_rate == 0.25
    saved = ViTRegConfig().to_dict()
    del saved["patch_dropout_rate"]
    assert ViTRegConfig.from_dict(saved).patch_dropout_rate == 0.0
