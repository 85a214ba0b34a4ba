"""At the size of ViT-S: planted neurons are found exactly, moving them mends the model, deleting them breaks it."""

from types import SimpleNamespace

import pytest
import torch

from vitreg_hf import add_test_time_registers, find_register_neurons
from vitreg_hf.register_neurons.adding import with_config
from vitreg_hf.register_neurons.planted import SINK_HEADS, planted_neurons, planted_vit_s

BLOCKS, ATTENDING = 12, 7  # from this block on, heads attend to the vector


@pytest.fixture(scope="module", params=[False, True], ids=["MLP", "SwiGLU"])
def vit_s(request, large_images):
    """The model, its neurons, and what it says as it is, with these moved, and with these deleted."""
    model = planted_vit_s(request.param)
    found = find_register_neurons(model, large_images.pixels, batch_size=3, progress=False)
    moved = add_test_time_registers(model, found)
    deleted = with_config(moved, num_test_time_registers=0)
    models = {
        "before": model,
        "moved": moved,
        "deleted": deleted,
        "clean": planted_vit_s(request.param, planted=False),
    }
    wanted = {"output_hidden_states": True, "output_prefix_attentions": True}
    with torch.no_grad():
        outputs = {name: one(large_images.pixels, **wanted) for name, one in models.items()}
    return SimpleNamespace(model=model, found=found, moved=moved, blue=large_images.blue, outputs=outputs)


def norms(vit_s, name, state=-1):
    return vit_s.outputs[name].hidden_states[state][:, -196:].norm(dim=-1)


def of_cls(vit_s, name, block):
    """What CLS attends to in the heads that look for the vector, `(B, heads, N)`."""
    return vit_s.outputs[name].prefix_attentions[block][:, :SINK_HEADS, 0]


def on_patches(vit_s, name, block):
    """The same among patches alone, mean over these heads, `(B, P)`."""
    maps = of_cls(vit_s, name, block)[..., -196:]
    return (maps / maps.sum(-1, keepdim=True)).mean(1)


def cosine(vit_s, name):
    pooled = [vit_s.outputs[one].pooler_output for one in ("before", name)]
    return torch.cosine_similarity(*pooled, dim=-1)


def test_the_planted_neurons_are_found_and_no_others(vit_s):
    assert set(vit_s.found) == set(planted_neurons(vit_s.model.config))
    assert vit_s.found.top_layer == 6
    assert vit_s.found.outlier_share == pytest.approx(vit_s.blue.float().mean().item())
    assert vit_s.found.reduction == ("largest" if vit_s.model.config.use_swiglu_ffn else "max")
    ranked = [abs(one.at_outliers) for one in vit_s.found.ranking]
    assert ranked[4] > 20 * ranked[5]


def test_outliers_vanish(vit_s):
    assert (norms(vit_s, "before") > vit_s.found.threshold).equal(vit_s.blue)
    for state in range(ATTENDING + 1):
        torch.testing.assert_close(norms(vit_s, "moved", state), norms(vit_s, "clean", state), atol=0.1, rtol=0)
    assert norms(vit_s, "before").max() > 4 * vit_s.found.threshold
    for state in range(ATTENDING + 1, BLOCKS + 1):  # where all tokens have got what they attend to the vector for
        assert norms(vit_s, "moved", state).max() < 1.5 * norms(vit_s, "moved", state).median()


def test_attention_goes_to_the_register_as_it_went_to_outliers(vit_s):
    has_blue = vit_s.blue.any(1)
    for block in range(ATTENDING, BLOCKS):
        before = (of_cls(vit_s, "before", block)[..., 1:] * vit_s.blue[:, None]).sum(-1)[has_blue]
        after = of_cls(vit_s, "moved", block)[..., 1][has_blue]
        assert before.min() > 0.97
        assert after.min() > 0.8


def test_attention_among_patches_is_restored_to_that_of_a_network_without_these_neurons(vit_s):
    has_blue = vit_s.blue.any(1)
    for block in range(ATTENDING, BLOCKS):
        clean = on_patches(vit_s, "clean", block)
        apart = [(on_patches(vit_s, name, block) - clean).abs().sum(-1)[has_blue] / 2 for name in ("before", "moved")]
        assert apart[0].min() > 0.8  # of all attention is elsewhere
        assert apart[1].max() < (0.001 if block == ATTENDING else 0.08)  # later ones read what was attended to


def test_moving_keeps_the_output_and_deleting_breaks_it(vit_s):
    has_blue = vit_s.blue.any(1)
    assert cosine(vit_s, "moved")[has_blue].min() > 0.999
    assert cosine(vit_s, "moved").min() > 0.99
    assert cosine(vit_s, "deleted")[has_blue].max() < 0.45
    patches = {name: vit_s.outputs[name].patch_tokens[~vit_s.blue] for name in ("before", "moved", "deleted")}
    assert torch.cosine_similarity(patches["before"], patches["moved"], dim=-1).mean() > 0.999
    assert torch.cosine_similarity(patches["before"], patches["deleted"], dim=-1).mean() < 0.7


def test_a_batch_is_its_images_one_by_one(vit_s, large_images):
    with torch.no_grad():
        alone = [vit_s.moved(image[None]) for image in large_images.pixels]
    for name in ("last_hidden_state", "pooler_output"):
        apart = torch.cat([one[name] for one in alone])
        torch.testing.assert_close(vit_s.outputs["moved"][name], apart, atol=1e-5, rtol=1e-5)
