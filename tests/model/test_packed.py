"""Crops of several resolutions in one pass: equal to one pass each, for outputs and gradients."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vitreg_hf import ViTRegForImageClassification, ViTRegModel
from vitreg_hf.model.token_layout import packed, unpacked

SIZES = [(4, 3, 32, 32), (6, 3, 16, 16), (2, 3, 24, 40)]
VARIANTS = {
    "plain": {},
    "no registers": {"num_register_tokens": 0},
    "no CLS": {"use_cls_token": False, "pooling": "mean"},
    "bare patches": {"use_cls_token": False, "pooling": "mean", "num_register_tokens": 0},
    "LayerScale and SwiGLU": {"layerscale_value": 0.3, "use_swiglu_ffn": True},
    "heads of their own size": {"num_attention_heads": 3, "head_dim": 16, "qkv_bias": False},
    "eager": {"attn_implementation": "eager"},
}


def crops(sizes=SIZES):
    return [torch.randn(size) for size in sizes]


def gradients(model, outputs):
    """Of a sum of all outputs with random weights, the same in every call."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    tokens = [output.last_hidden_state for output in outputs]
    sum((states * torch.randn(states.shape, generator=generator)).mean() for states in tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_equal_to_one_pass_per_resolution(make_config, fields):
    model = ViTRegModel(make_config(**fields)).train()
    images = crops()
    together, apart = model.forward_packed(images), [model(group) for group in images]
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        for value, expected in zip(one.to_tuple(), other.to_tuple(), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    expected = gradients(model, apart)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    for name, gradient in gradients(model, together).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_masked_groups_beside_unmasked_ones(make_config):
    model = ViTRegModel(make_config(use_mask_token=True)).train()
    torch.nn.init.normal_(model.embeddings.mask_token)
    images = crops()
    masks = [torch.rand(4, 16) < 0.5, None, torch.rand(2, 15) < 0.5]
    together = model.forward_packed(images, masks)
    for one, group, mask in zip(together, images, masks, strict=True):
        expected = model(group, bool_masked_pos=mask).last_hidden_state
        torch.testing.assert_close(one.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_one_group_is_a_forward_pass(make_config):
    model = ViTRegModel(make_config()).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.forward_packed([images])[0].last_hidden_state, model(images).last_hidden_state)


def test_nothing_is_recorded_whatever_the_config_says(make_config):
    config = make_config(output_attentions=True, output_hidden_states=True, output_prefix_attentions=True)
    output, _ = ViTRegModel(config).forward_packed(crops(SIZES[:2]))
    assert output.attentions is output.hidden_states is output.prefix_attentions is None


@pytest.mark.parametrize("kind", ["mask", "subset"])
def test_gradient_checkpointing_repeats_what_was_dropped(make_config, kind):
    rates = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "hidden_dropout_prob": 0.1}
    model = ViTRegModel(make_config(drop_path_kind=kind, **rates)).train()
    images, found = crops(), []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(1)
        found.append(gradients(model, model.forward_packed(images)))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-5)


def test_subsets_are_of_each_group(make_config, monkeypatch):
    fields = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "drop_path_kind": "subset"}
    model = ViTRegModel(make_config(num_hidden_layers=1, **fields)).train()
    seen = []
    model.layers[0].norm1.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model.forward_packed(crops())
    halves = 2 * (5 + 16) + 3 * (5 + 4) + 1 * (5 + 15)  # samples x tokens
    assert seen == [halves, halves]


def test_compiles_without_a_graph_break(make_config):
    model = ViTRegModel(make_config(num_hidden_layers=1, drop_path_rate=0.5, drop_path_kind="subset"))
    images = crops(SIZES[:2])
    torch.compiler.reset()
    compiled = torch.compile(lambda *groups: model.forward_packed(groups), fullgraph=True, backend="aot_eager")
    model.train()
    assert all(gradient.isfinite().all() for gradient in gradients(model, compiled(*images)).values())
    model.eval()
    for one, group in zip(compiled(*images), images, strict=True):
        torch.testing.assert_close(one.patch_map, model(group).patch_map, atol=1e-5, rtol=1e-5)


class Student(torch.nn.Module):
    """What a training wraps: the hooks of FSDP stand at a module's call."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        tokens = [output.last_hidden_state for output in self.backbone.forward_packed(images)]
        return sum(states[..., :5].square().mean() for states in tokens)


def test_shards_of_fsdp_have_the_gradients_of_the_whole(make_config):
    plain = Student(ViTRegModel(make_config(drop_path_rate=0.5, drop_path_kind="subset"))).train()
    sharded, images = copy.deepcopy(plain), crops()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (sharded.backbone.embeddings, *sharded.backbone.layers, sharded):
            fully_shard(module, mesh=mesh)
        for student in (plain, sharded):
            torch.manual_seed(1)
            student(images).backward()
        for expected, found in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad, atol=1e-5, rtol=1e-5)
        assert sharded.backbone.parameter_layers() == plain.backbone.parameter_layers()
    finally:
        torch.distributed.destroy_process_group()


def test_packed_passes_leave_heads_and_later_passes_alone(make_config):
    model = ViTRegForImageClassification(make_config()).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images, output_hidden_states=True)
    model.vitreg.forward_packed(crops())
    after = model(images, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert len(after.hidden_states) == 4


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ([], None, "Expected images, or groups of images, and a mask or None for each, got 0, 0"),
        ([torch.randn(1, 3, 32, 32)], [None, None], "got 1, 2"),
        ([torch.randn(1, 3, 32, 32), torch.randn(1, 3, 30, 32)], None, "got 30 x 32"),
        ([torch.randn(32, 32)], None, "Expected pixel_values of shape"),
        ([torch.randn(1, 3, 32, 32), torch.randn(3, 32, 32)], None, r"got shapes \[\(1, 3, 32, 32\), \(3, 32, 32\)\]"),
    ],
)
def test_wrong_groups_are_refused(make_config, images, masks, message):
    with pytest.raises(ValueError, match=message):
        ViTRegModel(make_config()).forward_packed(images, masks)


def test_packing_and_unpacking_keep_every_token():
    groups = [torch.randn(2, 3, 4), torch.randn(1, 5, 4)]
    rows = packed(groups)
    assert rows.shape == (11, 4)
    for group, found in zip(groups, unpacked(rows, [(2, 3), (1, 5)]), strict=True):
        assert torch.equal(group, found)
