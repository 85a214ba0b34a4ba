"""Aim the FSDP and tensor-parallel mixins, which know causal language models only, at image classification.

Importing this module replaces a few functions of the FSDP mixin in this process. The mixin starts its ranks as new
processes, which import it too (see the stand-in for `distributed_testing_utils`).
"""

from types import SimpleNamespace
from typing import Any

import tests.test_fsdp_mixin as fsdp
import tests.test_tensor_parallel_mixin as tensor_parallel
import torch
from tests.distributed_testing_utils import _start_rank_processes
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageClassification

FSDPTesterMixin = fsdp.FSDPTesterMixin
TensorParallelTesterMixin = tensor_parallel.TensorParallelTesterMixin

RANKS = 2
BATCH_SIZE = 2

Batch = tuple[torch.Tensor, torch.Tensor]


def image_batch(config: Any, device: torch.device | str = "cpu") -> Batch:
    """The same random images and labels in each process."""
    generator = torch.Generator().manual_seed(fsdp.SEED)
    shape = (BATCH_SIZE, config.num_channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(config.num_labels, (BATCH_SIZE,), generator=generator)
    return images.to(device), labels.to(device)


def repeated_batches(config: Any, device: torch.device, num_steps: int) -> list[Batch]:
    return [image_batch(config, device)] * num_steps


def training_steps(
    model: Any, optimizer: torch.optim.Optimizer, batches: list[Batch], *, track_grad_norms: bool = True
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one optimizer step per batch."""
    dtype = next(model.parameters()).dtype
    losses, grad_norms = [], []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = model(pixel_values=images.to(dtype), labels=labels).loss
        loss.backward()
        if track_grad_norms:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=float("inf"))
            grad_norms.append(norm.item())
        optimizer.step()
        losses.append(loss.item())
    return losses, grad_norms


def _aim_fsdp_mixin() -> None:
    fsdp.AutoModelForCausalLM = AutoModelForImageClassification
    fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # None: every model that has a plan
    fsdp._build_repeated_training_batches = repeated_batches
    fsdp._run_training_steps = training_steps
    # The same tests on every machine: gloo ranks do not need a core each, and the tests for four ranks feed text.
    fsdp._get_available_fsdp_workers = lambda: RANKS
    if hasattr(fsdp, "mp"):  # 5.17 starts its ranks itself
        fsdp.mp = SimpleNamespace(spawn=_start_rank_processes)


def tensor_parallel_forward(rank: int, path: str, model_class: Any, atol: float, rtol: float) -> None:
    """A model split over the ranks gives the logits of the whole one."""
    split, whole, device = tensor_parallel._load_tp_and_reference_models(path, model_class)
    tensor_parallel._verify_tp_sharding(rank, split, whole)
    assert _split_parameters(split, whole), "the tensor-parallel plan splits no parameter"
    images, _ = image_batch(whole.config, device)
    with torch.no_grad():
        expected, got = whole.eval()(images).logits, split.eval()(images).logits
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def tensor_parallel_backward(rank: int, path: str, model_class: Any, atol: float, rtol: float) -> None:
    """A model split over the ranks gets the loss and the gradients of the whole one."""
    split, whole, device = tensor_parallel._load_tp_and_reference_models(path, model_class)
    images, labels = image_batch(whole.config, device)
    losses = []
    for model in (whole.eval(), split.eval()):  # dropout would draw differently on the two
        loss = model(images, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], atol=atol, rtol=rtol)
    for (name, parameter), (_, reference) in zip(split.named_parameters(), whole.named_parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), f"{name}: only one of the two has a gradient"
        if parameter.grad is not None:
            got, expected = _comparable(parameter.grad, reference.grad, rank)
            torch.testing.assert_close(got, expected, atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}")


def _comparable(split: torch.Tensor, whole: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors whole, or else (where a rank holds a plain tensor) both as this rank's contiguous part."""
    if isinstance(split, DTensor):
        return split.full_tensor(), whole
    for dim, (total, part) in enumerate(zip(whole.shape, split.shape, strict=True)):
        if total != part:
            return split, whole.narrow(dim, rank * -(-total // RANKS), part)
    return split, whole


def _split_parameters(split: Any, whole: Any) -> list[str]:
    pairs = zip(split.named_parameters(), whole.parameters(), strict=True)
    return [name for (name, parameter), reference in pairs if _local(parameter).shape != reference.shape]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_aim_fsdp_mixin()
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
tensor_parallel._test_tp_forward_impl = tensor_parallel_forward
tensor_parallel._test_tp_backward_impl = tensor_parallel_backward
