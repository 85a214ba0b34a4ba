# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The classifier that a training starts from, and the batches of it that fit into memory.

Shapes: B images of C channels and h x w pixels, K classes.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.training.augmentation import Mixing, model_size
from vitreg_hf.training.batch_size import find_batch_size, recompute_activations, training_probe
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.finetuning import check_family, freeze, load_classifier, processor_for, train_mode
from vitreg_hf.training.lora import add_lora
from vitreg_hf.training.losses import Loss
from vitreg_hf.training.seeding import seed_weights

Loaded = TypeVar("Loaded")
Change = Callable[[ViTRegForImageClassification], ViTRegForImageClassification]


def check_model(settings: ImageClassificationSettings) -> None:
    """Refuse a shape that does not fit together, or a checkpoint that is none, before images are read.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if settings.init_from is None:
        settings.model_config()
    else:
        _from_checkpoint(settings.init_from, lambda: check_family(str(settings.init_from)))


def create_model(
    settings: ImageClassificationSettings, class_names: Sequence[str], change: Change | None = None
) -> ViTRegForImageClassification:
    """The model with random weights, or with those of a checkpoint and what is not to be trained frozen.

    Args:
        settings: of the training.
        class_names: name of each class, by index.
        change: makes another model of a checkpoint's before anything of it is frozen, such as one with more registers.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or does not fit the settings.
    """
    seed_weights(settings.seed)
    if settings.init_from is None:
        config = settings.model_config()
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
        model = ViTRegForImageClassification(config)
    else:
        model = _loaded(settings, settings.init_from, class_names, change)
        settings.check_colours(model.config.num_channels)
    if settings.gradient_checkpointing:
        recompute_activations(model)
    return model


def create_processor(settings: ImageClassificationSettings, config: ViTRegConfig) -> ViTRegImageProcessor:
    """How images are prepared for the model that is trained.

    Raises:
        ValueError: if the processor of the checkpoint cannot be loaded.
    """
    crops, source = settings.crop_scale is not None, settings.init_from
    return _from_checkpoint(str(source), lambda: processor_for(source, config, crops, settings.eval_crop_ratio))


def _loaded(
    settings: ImageClassificationSettings, source: str, class_names: Sequence[str], change: Change | None
) -> ViTRegForImageClassification:
    changes = settings.model_changes()
    model, head_is_new = _from_checkpoint(
        source,
        lambda: load_classifier(source, class_names, settings.image_size, settings.num_channels, **changes),
    )
    if change is not None:
        model = change(model)
    if settings.tuning == "lora":
        numbers = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
        add_lora(model, *numbers, mlp=settings.lora_mlp, registers=settings.lora_registers)
    else:
        freeze(model, settings.tuning, settings.num_tuned_layers, head_is_new)
    return model


def _from_checkpoint(source: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except ValueError:
        raise
    except Exception as error:  # of the Hub, the file system, JSON, safetensors or PyTorch
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Expected a checkpoint to fine-tune, a folder or an id, got {source}: {said[0]}") from error


def fit_batch_size(
    settings: ImageClassificationSettings,
    accelerator: Accelerator,
    model: ViTRegForImageClassification,
    processor: ViTRegImageProcessor,
    loss: Loss,
    mix: Mixing | None,
) -> None:
    """Find the largest batch that fits into memory, and put it into settings and accelerator.

    To be called by every process, with all on the device that a training holds there.

    Args:
        settings: of the training; `per_device_train_batch_size` and `gradient_accumulation_steps` may change.
        accelerator: of the launch, with neither model nor optimizer prepared.
        model: on the device; weights and mode stay as they are.
        processor: says how large images are.
        loss: of logits and targets.
        mix: mixes images and labels; None: they are not mixed.

    Raises:
        ValueError: as `find_batch_size`.
    """
    shape = model.config.num_channels, *model_size(processor)

    def batch_of(images: int) -> tuple[Tensor, Tensor]:
        labels = torch.zeros(images, dtype=torch.long, device=accelerator.device)
        made_up = torch.rand(images, *shape, device=accelerator.device)
        return (made_up, labels) if mix is None else mix(made_up, labels)

    def loss_of(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        return loss(model(pixel_values=images).logits, targets)

    was_training = model.training
    train_mode(model, settings.tuning)
    probe = training_probe(model, batch_of, loss_of, accelerator)
    asked = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    found = find_batch_size(probe, *asked, accelerator)
    model.train(was_training)
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = found
    accelerator.gradient_accumulation_steps = found.accumulation
    accelerator.print(
        f"batch     {found.per_device} images x {found.accumulation} per update and process, "
        f"asked for {asked[0]} x {asked[1]}"
    )
