"""Stochastic depth by subsets against a slow reference, and against the kind that computes all and drops by a mask."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegModel

UNIFORM = {"drop_path_schedule": "uniform", "drop_path_kind": "subset"}


def layer_of(make_config, rate, **fields):
    config = make_config(**{**UNIFORM, "drop_path_rate": rate, "num_hidden_layers": 1, **fields})
    return ViTRegModel(config).train().layers[0]


def slow_block(layer, hidden_states, permutations):
    """One sample at a time: the branch of a kept one, times batch size over kept ones, is added to it."""
    outputs = list(hidden_states.unbind())
    count = len(outputs)
    keep = max(int(count * (1 - layer.drop_path.rate)), 1)
    branches = [
        lambda x: layer.layer_scale1(layer.attention(layer.norm1(x))[0]),
        lambda x: layer.layer_scale2(layer.mlp(layer.norm2(x))),
    ]
    for branch, permutation in zip(branches, permutations, strict=True):
        for sample in permutation[:keep].tolist():
            outputs[sample] = outputs[sample] + branch(outputs[sample][None])[0] * (count / keep)
    return torch.stack(outputs)


def seen_by(module):
    """Sizes of the batches that reach a module, as they come."""
    sizes = []
    module.register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].shape[0]))
    return sizes


@pytest.mark.parametrize("fields", [{}, {"layerscale_value": 0.5, "use_swiglu_ffn": True}])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_equal_to_the_slow_reference_for_the_same_permutations(make_config, rate, fields):
    layer, hidden = layer_of(make_config, rate, **fields), torch.randn(6, 5, 32)
    torch.manual_seed(7)
    permutations = [torch.randperm(6), torch.randperm(6)]
    assert not torch.equal(*permutations)
    found = []
    for run in (lambda: layer(hidden), lambda: slow_block(layer, hidden, permutations)):
        torch.manual_seed(7)
        layer.zero_grad()
        output = run()
        output.square().mean().backward()
        found.append((output, {name: p.grad.clone() for name, p in layer.named_parameters()}))
    (fast, fast_gradients), (slow, slow_gradients) = found
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for name, gradient in slow_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mask", "subset"])
def test_in_expectation_both_kinds_are_the_identity_plus_the_branch(make_config, kind):
    """One branch, as the second one is a nonlinear function of what the first one dropped."""
    layer, hidden = layer_of(make_config, 0.3, drop_path_kind=kind), torch.randn(5, 4, 32)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.bias)
    with torch.no_grad():
        expected = layer.eval()(hidden)
        draws = 3000
        layer.train()
        total = torch.zeros_like(hidden)
        for _ in range(draws):
            total += layer(hidden)
    branch = expected - hidden
    kept = 0.7 if kind == "mask" else 3 / 5
    deviation = branch.abs() * ((1 - kept) / kept / draws) ** 0.5  # of the mean, which is off by few of these
    assert ((total / draws - expected).abs() <= 5 * deviation + 1e-5).all()


@pytest.mark.parametrize(("batch", "rate", "keep"), [(8, 0.1, 7), (8, 0.5, 4), (5, 0.3, 3), (4, 0.9, 1), (1, 0.9, 1)])
def test_the_number_of_samples_in_both_branches_is_exact(make_config, batch, rate, keep):
    layer = layer_of(make_config, rate)
    attended, transformed = seen_by(layer.attention), seen_by(layer.mlp)
    for _ in range(3):
        layer(torch.randn(batch, 5, 32))
    assert attended == transformed == [keep] * 3


def test_one_sample_is_never_dropped_nor_scaled(make_config):
    layer, hidden = layer_of(make_config, 0.9), torch.randn(1, 5, 32)
    torch.testing.assert_close(layer(hidden), layer.eval()(hidden))


def test_evaluation_and_rate_zero_draw_nothing(make_config):
    layer, hidden = layer_of(make_config, 0.5), torch.randn(4, 5, 32)
    sizes = seen_by(layer.mlp)
    state = torch.get_rng_state()
    layer.eval()(hidden)
    layer_of_zero = ViTRegModel(make_config(**UNIFORM)).train().layers[0]
    state_after_weights = torch.get_rng_state()
    layer_of_zero(hidden)
    assert sizes == [4]
    assert torch.equal(torch.get_rng_state(), state_after_weights)
    torch.set_rng_state(state)
    layer(hidden)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_parameter_and_sample_has_a_gradient(make_config):
    """DDP stops at a parameter without one."""
    model = ViTRegForImageClassification(make_config(drop_path_rate=0.9, **UNIFORM)).train()
    pixels = torch.randn(3, 3, 32, 32, requires_grad=True)
    model(pixels, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padded_batches_keep_the_masks_of_the_kept_samples(make_config, backend):
    """What the padding holds must not matter, whichever samples were kept."""
    model = ViTRegModel(make_config(drop_path_rate=0.5, attn_implementation=backend, **UNIFORM)).train()
    pixels, mask = torch.randn(4, 3, 32, 32), torch.zeros(4, 32, 32)
    for image, width in enumerate((8, 16, 24, 32)):
        mask[image, :, :width] = 1
    real, found = mask[:, None].bool(), []
    for filling in (0.0, 100.0):
        torch.manual_seed(3)
        found.append(model(pixels.where(real, filling), pixel_mask=mask))
    patches = found[0].patch_mask[..., None]
    first, second = (output.patch_tokens.where(patches, 0) for output in found)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_where_attention_is_recorded_all_samples_are_computed(make_config):
    model = ViTRegModel(make_config(drop_path_rate=0.5, **UNIFORM)).train()
    sizes = seen_by(model.layers[1].mlp)
    outputs = model(torch.randn(4, 3, 32, 32), output_attentions=True, output_hidden_states=True)
    assert [attention.shape for attention in outputs.attentions] == [(4, 4, 21, 21)] * 3
    assert [state.shape for state in outputs.hidden_states] == [(4, 21, 32)] * 4
    outputs = model(torch.randn(4, 3, 32, 32), output_prefix_attentions=[2])
    assert outputs.prefix_attentions[2].shape == (4, 4, 5, 21)
    assert sizes == [4, 2]  # the second time, attention of another layer was asked for


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(make_config, checkpointing):
    model = ViTRegForImageClassification(make_config(drop_path_rate=0.5, num_hidden_layers=2, **UNIFORM)).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (4, 6):  # the second one compiles with a batch size that may change
        model.zero_grad()
        compiled(torch.randn(batch, 3, 32, 32), labels=torch.zeros(batch, dtype=torch.long)).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_adds_a_branch_of_half_precision(make_config):
    layer = layer_of(make_config, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.randn(4, 5, 32))
    assert output.dtype == torch.float32
    output.sum().backward()


def flops(model, pixels):
    with FlopCounterMode(display=False) as counter:
        model(pixels).last_hidden_state.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_work_saved_is_the_drop_rate_of_the_blocks(make_config, rate):
    pixels = torch.randn(8, 3, 32, 32)
    fields = {"drop_path_rate": rate, "drop_path_schedule": "uniform", "hidden_size": 64}
    mask, subset = (
        flops(ViTRegModel(make_config(drop_path_kind=kind, **fields)).train(), pixels) for kind in ("mask", "subset")
    )
    whole = ViTRegModel(make_config(hidden_size=64)).train()
    blocks = mask - flops(without_blocks(whole), pixels)
    assert (mask - subset) / blocks == pytest.approx(rate, abs=0.02)


def without_blocks(model):
    model.layers = torch.nn.ModuleList()
    return model


def test_ddp_finds_every_gradient(make_config):
    """A process group of one: a parameter without a gradient would stop the second step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = ViTRegForImageClassification(make_config(drop_path_rate=0.9, **UNIFORM)).train()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(torch.randn(4, 3, 32, 32), labels=torch.zeros(4, dtype=torch.long)).loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["subset", "mask"])
def test_the_kind_is_saved(make_config, tmp_path, kind):
    make_config(drop_path_kind=kind).save_pretrained(tmp_path)
    assert ViTRegConfig.from_pretrained(tmp_path).drop_path_kind == kind


def test_configs_saved_before_the_field_mean_the_mask():
    saved = ViTRegConfig().to_dict()
    del saved["drop_path_kind"]
    assert ViTRegConfig.from_dict(saved).drop_path_kind == "mask"


def test_unknown_kinds_are_refused(make_config):
    with pytest.raises(ValueError, match="Expected drop_path_kind to be one of mask, subset, got 'batch'"):
        make_config(drop_path_kind="batch")
