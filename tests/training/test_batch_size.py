# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches shrink until they fit, updates keep their size, and other errors are no want of memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.training import batch_size
from vitreg_hf.training.batch_size import BatchSize, find_batch_size, training_probe

# As PyTorch words it.
MESSAGES = {
    "cuda": "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB",
    "cpu": "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)",
}


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Accelerate collects garbage before each try, which takes half a second in a process that has imported much."""
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)


def fitting(most, tried=None, kind=RuntimeError, message=MESSAGES["cuda"]):
    """A probe that has memory for so many images."""

    def probe(size):
        if tried is not None:
            tried.append(size)
        if size > most:
            raise kind(message)

    return probe


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_a_batch_shrinks_and_an_update_keeps_its_images(message):
    tried = []
    found = find_batch_size(fitting(5, tried, message=message), 16, 3, Accelerator(cpu=True))
    assert found == BatchSize(per_device=4, accumulation=12)
    assert tried == [16, 12, 8, 6, 4]  # the divisors of 48


def test_the_error_class_of_gpus_is_want_of_memory():
    found = find_batch_size(fitting(2, kind=torch.OutOfMemoryError), 8, 1, Accelerator(cpu=True))
    assert found == (2, 4)


@pytest.mark.parametrize("most", [1, 2, 7, 24, 1000])
@pytest.mark.parametrize(("per_device", "accumulation"), [(24, 1), (7, 2), (1, 5), (30, 4)])
def test_per_device_times_accumulation_stays(per_device, accumulation, most):
    found = find_batch_size(fitting(most), per_device, accumulation, Accelerator(cpu=True))
    assert found.per_device * found.accumulation == per_device * accumulation
    assert found.per_device <= min(most, per_device)
    if most >= per_device:
        assert found == (per_device, accumulation)


def test_no_memory_for_one_image_is_an_error():
    with pytest.raises(ValueError, match="batch of 1 image or more, got out of memory"):
        find_batch_size(fitting(0), 8, 1, Accelerator(cpu=True))


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), KeyError("labels")]
)
@pytest.mark.parametrize("fails_at", [8, 1])
def test_other_errors_pass_through_at_once(error, fails_at):
    def probe(size):
        if size <= fails_at:
            raise error
        raise RuntimeError(MESSAGES["cuda"])

    with pytest.raises(type(error)) as caught:
        find_batch_size(probe, 8, 1, Accelerator(cpu=True))
    assert caught.value is error


def gathered(monkeypatch, *others):
    """Makes believe that there are other processes."""
    monkeypatch.setattr(batch_size, "gather_object", lambda own: own + list(others))


def test_processes_agree_on_the_smallest(monkeypatch):
    gathered(monkeypatch, (8, None), (2, None))
    assert find_batch_size(fitting(4), 16, 1, Accelerator(cpu=True)) == (2, 8)
    gathered(monkeypatch, (0, None))
    with pytest.raises(ValueError, match="got out of memory with 1 image"):
        find_batch_size(fitting(4), 16, 1, Accelerator(cpu=True))


def test_an_error_in_another_process_is_raised_here_too(monkeypatch):
    gathered(monkeypatch, (0, "KeyError: 'labels'"))
    with pytest.raises(RuntimeError, match="in another process KeyError: 'labels'"):
        find_batch_size(fitting(4), 16, 1, Accelerator(cpu=True))


def test_a_sharded_model_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="got one sharded by FSDP: choose the batch size by hand"):
        find_batch_size(fitting(4), 16, 1, accelerator)


def test_a_probe_trains_and_leaves_no_trace():
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTRegForImageClassification(ViTRegConfig(**shape, num_labels=3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made, graded = [], []

    def batch_of(size):
        made.append(size)
        if size > 4:
            raise RuntimeError(MESSAGES["cpu"])
        return {"pixel_values": torch.zeros(size, 3, 16, 16), "labels": torch.zeros(size, dtype=torch.int64)}

    def loss_of(model, batch):
        logits = model(pixel_values=batch["pixel_values"]).logits
        logits.register_hook(lambda gradient: graded.append(tuple(gradient.shape)))
        return F.cross_entropy(logits, batch["labels"])

    accelerator = Accelerator(cpu=True)
    assert find_batch_size(training_probe(model, batch_of, loss_of, accelerator), 8, 2, accelerator) == (4, 4)
    assert made == [8, 4]
    assert graded == [(4, 3)]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
