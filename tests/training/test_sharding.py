# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Sharded models: here by FSDP2 in a group of one process; `runs/test_sharded_runs.py` has two."""

import copy
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from vitreg_hf.model.layers import ViTRegLayer
from vitreg_hf.training.optim import create_ema
from vitreg_hf.training.sharding import clip_gradients, shard_like, spare_copy, whole_model

# FSDP2 tells that changing the outputs in place would break training, which nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture
def model(make_config: Callable[..., ViTRegConfig]) -> ViTRegForImageClassification:
    return ViTRegForImageClassification(make_config()).eval()


def shard(model: nn.Module) -> nn.Module:
    """Units as Accelerate makes them."""
    mesh = init_device_mesh("cpu", (1,))
    inner = [module for module in model.modules() if isinstance(module, ViTRegLayer)]
    for module in (*inner, *(part for name, part in model.named_modules() if name.endswith("patch_embeddings"))):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def units(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32)


class TestCopies:
    def test_copies_of_whole_models_stay_whole(
        self, accelerator: Accelerator, model: ViTRegForImageClassification
    ) -> None:
        average = create_ema(model, 0.5)
        shard_like(average.module, model)
        assert units(average) == []
        assert spare_copy(accelerator, model) is None
        assert whole_model(accelerator, model, None) is model

    def test_weights_that_were_rounded_are_not_averaged(self, model: ViTRegForImageClassification) -> None:
        with pytest.raises(ValueError, match=r"Expected weights in torch.float32 to average, got torch.bfloat16"):
            shard_like(copy.deepcopy(model), model.to(torch.bfloat16))

    def test_a_copy_is_sharded_as_the_model_is(self, model: ViTRegForImageClassification) -> None:
        whole, inputs = copy.deepcopy(model), pixels()
        average = create_ema(model, 0.5)
        shard(model)
        shard_like(average.module, model)
        assert units(average.module) == units(model)
        assert len(units(model)) == 5
        with torch.no_grad():
            logits = average(pixel_values=inputs).logits
        torch.testing.assert_close(logits, whole(inputs).logits)
        # With FSDP2's defaults the outermost parameters would now be whole, and no longer those of the average.
        assert all(isinstance(parameter, DTensor) for parameter in average.parameters())

    def test_an_average_of_slices_is_the_average_of_wholes(
        self, accelerator: Accelerator, model: ViTRegForImageClassification
    ) -> None:
        whole, spare = copy.deepcopy(model), copy.deepcopy(model)
        averages = [create_ema(model, 0.5) for _ in range(2)]
        shard(model)
        shard_like(averages[0].module, model)
        inputs = pixels()
        for average, trained in zip(averages, (model, whole), strict=True):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
            for _ in range(3):
                trained(inputs).logits.square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(trained)
                with torch.no_grad():
                    average(pixel_values=inputs)
        gathered = whole_model(accelerator, averages[0].module, spare)
        assert gathered is spare
        torch.testing.assert_close(gathered.state_dict(), averages[1].module.state_dict())

    def test_a_spare_copy_is_of_the_main_process_where_models_are_sharded(
        self, model: ViTRegForImageClassification
    ) -> None:
        sharding: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_main_process=True)
        spare = spare_copy(sharding, model.train())
        assert spare is not None
        assert spare is not model
        assert not spare.training
        sharding.is_main_process = False
        assert spare_copy(sharding, model) is None


class TestGradients:
    def test_their_norm_is_that_of_the_whole_model(
        self, accelerator: Accelerator, model: ViTRegForImageClassification
    ) -> None:
        whole, inputs = copy.deepcopy(model), pixels()
        shard(model)
        norms = []
        for trained in (model, whole):
            trained(inputs).logits.square().sum().backward()
            norms.append(clip_gradients(accelerator, trained, 0))
            torch.testing.assert_close(clip_gradients(accelerator, trained, 0.1), norms[-1])
            torch.testing.assert_close(clip_gradients(accelerator, trained, 0), torch.tensor(0.1), rtol=1e-3, atol=0)
        assert not isinstance(norms[0], DTensor)
        torch.testing.assert_close(*norms)

    @pytest.mark.parametrize(("told", "norm"), [(2.5, torch.tensor(2.5)), (None, None)])
    def test_deepspeed_tells_a_number_or_nothing(self, told: float | None, norm: Tensor | None) -> None:
        engine: Any = SimpleNamespace(clip_grad_norm_=lambda parameters, largest: told, device=torch.device("cpu"))
        assert clip_gradients(engine, nn.Linear(1, 1), 1.0) == norm


class Packed(nn.Module):
    """Runs a backbone on several resolutions at once, as self-supervision does."""

    def __init__(self, backbone: ViTRegModel) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        return torch.cat([outputs.cls_token for outputs in self.backbone.forward_packed(images)])


def test_blocks_that_take_several_groups_of_tokens_can_be_sharded(make_config: Callable[..., ViTRegConfig]) -> None:
    model = Packed(ViTRegModel(make_config()))
    whole = copy.deepcopy(model)
    images = [pixels(), torch.randn(3, 3, 16, 16)]
    shard(model)
    for module in (model, whole):
        module(images).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
