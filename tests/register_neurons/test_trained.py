"""A small model that was trained for some seconds, and has no artifacts: what looking for them and mending it do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from vitreg_hf import (
    ViTRegConfig,
    ViTRegForImageClassification,
    add_registers,
    add_test_time_registers,
    bias_from_images,
    find_register_neurons,
    mean_patch,
)
from vitreg_hf.analysis.outliers import OutlierRule


@pytest.fixture(scope="module")
def digits():
    """Scanned digits of 8 x 8, as pixel values for training and for tests, with labels."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    pixels, labels = pixels[order], torch.from_numpy(labels)[order]
    return (pixels[:1400], labels[:1400]), (pixels[1400:], labels[1400:])


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    config = ViTRegConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        num_register_tokens=0,
        pooling="cls_mean",
        token_initializer_range=0.1,
    )
    model, (pixels, labels) = ViTRegForImageClassification(config).train(), digits[0]
    epochs, batches = 12, pixels.shape[0] // 50
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels))[: batches * 50].split(50):
            loss = F.cross_entropy(model(pixels[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def right(model, digits):
    pixels, labels = digits[1]
    with torch.no_grad():
        return (model(pixels).logits.argmax(-1) == labels).double()


def interval(of_images):
    """Of a mean, at 95 %, by the normal approximation, a digit more for rounding at the edge."""
    mean, error = of_images.mean().item(), of_images.std().item() / len(of_images) ** 0.5
    return mean - 1.96 * error - 0.002, mean + 1.96 * error + 0.002


def test_it_has_learned(trained, digits):
    assert right(trained, digits).mean() > 0.93


def test_it_has_no_artifacts_by_the_default_rule(trained, digits):
    with pytest.raises(ValueError, match="this model needs no registers"):
        find_register_neurons(trained, digits[1][0], progress=False, batch_size=64)


@pytest.mark.parametrize("what", ["test-time", "test-time, CLS kept", "bias of attention", "added"])
def test_mending_it_all_the_same_leaves_its_accuracy(what, trained, digits):
    """With the two neurons that fire most at patches of the largest norms, by a rule that marks 2 % of any model."""
    pixels = digits[0][0][:200]
    if what == "added":
        mended = add_registers(trained, 2, mean_patch(trained, pixels))
    else:
        rule = OutlierRule("percentile")
        found = find_register_neurons(trained, pixels, rule=rule, top_k=2, batch_size=50, progress=False)
        assert 0.01 < found.outlier_share < 0.03
        mended = add_test_time_registers(trained, found, cls="keep" if "kept" in what else "zero")
        mended = bias_from_images(mended, pixels, batch_size=50) if what == "bias of attention" else mended
    before, after = right(trained, digits), right(mended, digits)
    low, high = interval(before)
    assert low <= after.mean() <= high
    with torch.no_grad():
        assert not torch.equal(mended(digits[1][0]).logits, trained(digits[1][0]).logits)  # something was done
