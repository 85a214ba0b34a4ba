# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a forward pass costs: operations counted by hand, a model left as it was, the precision measured."""

import json
from types import MethodType
from typing import Any

import pytest
import torch

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.training.speed import describe_speed


@pytest.fixture
def processor() -> ViTRegImageProcessor:
    return ViTRegImageProcessor(size={"height": 32, "width": 48}, do_center_crop=False, size_divisor=8)


@pytest.fixture
def model(make_config: Any) -> ViTRegForImageClassification:
    return ViTRegForImageClassification(make_config(image_size=[32, 48]))


def by_hand(config: Any, patches: int) -> int:
    """Floating-point operations of one image, a multiply-add being two."""
    tokens, width = config.num_prefix_tokens + patches, config.hidden_size
    embedding = 2 * patches * 3 * 8 * 8 * width
    projections = 2 * tokens * width * width * 4
    attention = 2 * 2 * tokens * tokens * width
    mlp = 2 * 2 * tokens * width * config.intermediate_size
    return embedding + config.num_hidden_layers * (projections + attention + mlp) + 2 * width * config.num_labels


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_operations_do_not_depend_on_the_attention_backend(
    model: ViTRegForImageClassification, processor: ViTRegImageProcessor, attention: str
) -> None:
    model.set_attn_implementation(attention)
    speed = describe_speed(model, processor, batch_size=2)
    assert speed["image_size"] == [32, 48]
    assert speed["flops_per_image"] == by_hand(model.config, patches=4 * 6)
    assert model.config._attn_implementation == attention


def test_size_and_time(model: ViTRegForImageClassification, processor: ViTRegImageProcessor) -> None:
    speed = describe_speed(model, processor, batch_size=4)
    assert speed["weights_megabytes"] == pytest.approx(4 * model.num_parameters() / 1e6)
    assert speed["milliseconds_per_image"] > 0
    assert speed["images_per_second_in_batches"] > 0
    assert (speed["batch_size"], speed["threads"], speed["precision"]) == (4, torch.get_num_threads(), "float32")
    assert speed["device"]
    assert describe_speed(model.bfloat16(), processor, batch_size=1)["precision"] == "bfloat16"
    json.dumps(speed, allow_nan=False)


def test_times_are_those_of_one_pass_each(
    model: ViTRegForImageClassification, processor: ViTRegImageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of our own: each reading is a second later than the one before, whatever the machine does."""
    readings = iter(range(10_000))
    monkeypatch.setattr("vitreg_hf.training.speed.time.perf_counter", lambda: next(readings))
    speed = describe_speed(model, processor, batch_size=5)
    assert speed["milliseconds_per_image"] == 1000
    assert speed["images_per_second_in_batches"] == 5


def test_the_model_and_chance_stay_as_they_were(
    model: ViTRegForImageClassification, processor: ViTRegImageProcessor
) -> None:
    model.train()
    frozen = model.vitreg.embeddings.eval() if hasattr(model, "vitreg") else next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    assert not all(modes)
    assert any(modes)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    describe_speed(model, processor, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_after_a_failure(
    model: ViTRegForImageClassification, processor: ViTRegImageProcessor
) -> None:
    model.train()
    with pytest.raises(ValueError):  # the patch size does not divide 30
        describe_speed(model, ViTRegImageProcessor(size={"height": 30, "width": 30}, do_center_crop=False))
    assert all(module.training for module in model.modules())


def test_passes_are_those_of_evaluation(
    model: ViTRegForImageClassification, processor: ViTRegImageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = type(model).forward

    def watched(self: Any, **inputs: Any) -> Any:
        assert not torch.is_grad_enabled()
        seen.append((inputs["pixel_values"].device.type, len(inputs["pixel_values"]), self.training))
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", watched)
    describe_speed(model.train(), processor, batch_size=7)
    assert set(seen) == {("cpu", 1, False), ("cpu", 7, False), ("meta", 1, False)}


def test_the_precision_is_not_that_of_training(
    model: ViTRegForImageClassification, processor: ViTRegImageProcessor
) -> None:
    """What Accelerate puts in the place of an object's `forward` would run under autocast."""

    def mixed(self: Any, **inputs: Any) -> Any:
        raise AssertionError("the wrapper ran")

    model.forward = MethodType(mixed, model)  # type: ignore[method-assign]
    assert describe_speed(model, processor, batch_size=1)["precision"] == "float32"
