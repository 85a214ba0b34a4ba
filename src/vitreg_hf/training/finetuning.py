# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Classifiers made from a checkpoint: other classes, another image size, other channels, and what of them is trained.

Nothing of what is loaded is random but a head for other classes: positions and the projection of patches are computed
from those of the checkpoint, and a checkpoint that lacks anything else is refused.

Shapes: C channels, D channels of the residual stream.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification, ViTRegModel, ViTRegPreTrainedModel
from vitreg_hf.model.position_embedding import split_positions

Source = str | os.PathLike[str]
# What may differ from the checkpoint besides labels, image size and channels: no weight depends on it but the head.
_CHANGES = {
    *("drop_path_rate", "drop_path_schedule", "drop_path_kind", "patch_dropout_rate", "pooling"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "num_classifier_layers"),
}
_POSITIONS = "vitreg.embeddings.position_embeddings"
_RGB = range(3)  # channels of a processor that says nothing else
_PROJECTION = "vitreg.embeddings.patch_embeddings.projection.weight"

Tuning = Literal["full", "partial", "linear", "registers", "registers_partial"]

# Loading


class Classifier(NamedTuple):
    """A classifier, and whether its head is a random one, for other classes or another pooling than before."""

    model: ViTRegForImageClassification
    head_is_new: bool


def load_for_finetuning(
    source: Source,
    class_names: Sequence[str],
    image_size: int | None = None,
    num_channels: int | None = None,
    **changes: Any,
) -> ViTRegForImageClassification:
    """The model of `load_classifier`, with the same arguments and errors."""
    return load_classifier(source, class_names, image_size, num_channels, **changes).model


def load_classifier(
    source: Source,
    class_names: Sequence[str],
    image_size: int | None = None,
    num_channels: int | None = None,
    **changes: Any,
) -> Classifier:
    """A classifier for given classes in float32, with the weights of a checkpoint.

    The head is that of the checkpoint if this classifies the same classes in the same order from the same pooling;
    else it is new and random. Positions are resized to the image size by the interpolation rule of the checkpoint, as
    the model would do at run time; the projection of patches is that of `with_channels`.

    Args:
        source: folder or id of a ViTReg checkpoint: a backbone, as self-supervision saves it, or any head's model.
        class_names: name of each class, by index.
        image_size: height and width in pixels; None for those of the checkpoint.
        num_channels: C; None for those of the checkpoint.
        changes: fields of the config that change training or pooling alone, such as `drop_path_rate`.

    Raises:
        ValueError: if the checkpoint is of another family, a weight other than a head is missing or unknown, there
            are no classes, or a field may not be changed.
    """
    if not class_names or len(set(class_names)) != len(class_names):
        raise ValueError(f"Expected one or more class names that differ, got {list(class_names)}")
    if unknown := sorted(changes.keys() - _CHANGES):
        raise ValueError(f"Expected changes of {', '.join(sorted(_CHANGES))}, got {', '.join(unknown)}")
    check_family(source)
    old, has_head = _loaded(ViTRegForImageClassification, source)
    model = ViTRegForImageClassification(_config_for(old.config, class_names, image_size, num_channels, changes))
    projection = old.vitreg.embeddings.patch_embeddings.projection.weight
    weights = old.state_dict() | {_PROJECTION: with_channels(projection, model.config.num_channels)}
    if (positions := resized_positions(old.vitreg, model.config.position_grid)) is not None:
        weights[_POSITIONS] = positions
    kept = has_head and _names(old.config) == list(class_names) and _read(old.config) == _read(model.config)
    if not kept:
        head = {name: weight for name, weight in model.state_dict().items() if name.startswith("classifier.")}
        weights = {name: weight for name, weight in weights.items() if not name.startswith("classifier.")} | head
    model.load_state_dict(weights)
    return Classifier(model, not kept)


def check_family(source: Source) -> None:
    """Refuse checkpoints of other families.

    Raises:
        ValueError: naming the family.
    """
    saved, _ = PreTrainedConfig.get_config_dict(source)
    family = saved.get("model_type")
    if family != ViTRegConfig.model_type:
        raise ValueError(f"Expected a checkpoint of the family {ViTRegConfig.model_type}, got {family} in {source}")


def load_backbone(source: Source) -> ViTRegModel:
    """The backbone of a checkpoint in float32 and evaluation mode, whatever head it has.

    Raises:
        ValueError: as `load_for_finetuning`.
    """
    check_family(source)
    return _loaded(ViTRegModel, source)[0]


Model = TypeVar("Model", bound=ViTRegPreTrainedModel)


def _loaded(kind: type[Model], source: Source) -> tuple[Model, bool]:
    """The checkpoint as it is, and whether it has all weights of a head."""
    model, found = kind.from_pretrained(source, dtype=torch.float32, use_mask_token=False, output_loading_info=True)
    missing = [name for name in found["missing_keys"] if not name.startswith("classifier.")]
    for what, names in (("every weight of the backbone", missing), ("no other weights", found["unexpected_keys"])):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            verb = "without" if names is missing else "with"
            raise ValueError(f"Expected {what} in {source}, got a checkpoint {verb} {listed}")
    return model, not found["missing_keys"]


def _config_for(
    old: ViTRegConfig,
    class_names: Sequence[str],
    image_size: int | None,
    num_channels: int | None,
    changes: dict[str, Any],
) -> ViTRegConfig:
    given = {"image_size": image_size, "num_channels": num_channels}
    if changes.get("pooling", old.pooling) != old.pooling:
        changes = {"num_classifier_layers": 1, **changes}  # several are of one pooling alone
    changes = changes | {name: value for name, value in given.items() if value is not None}
    names = dict(enumerate(class_names))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}, "problem_type": None}
    return ViTRegConfig.from_dict(old.to_dict(), **{**labels, **changes})


def _read(config: ViTRegConfig) -> tuple[str, int]:
    """What a classifier reads."""
    return config.pooling, config.num_classifier_layers


def _names(config: ViTRegConfig) -> list[str]:
    labels = cast(dict[int, str], config.id2label)
    return [labels[index] for index in sorted(labels)]


@torch.no_grad()
def resized_positions(model: ViTRegModel, grid: tuple[int, int]) -> Tensor | None:
    """Position table of a model for another grid, as it computes it at run time.

    Returns:
        `(1, positions, D)`: those of CLS and registers, if they have any, then rows * columns; None for a model with
        rotary positions.

    Raises:
        ValueError: if positions are rotary and stretched to the grid of the config, which has to stay.
    """
    config, embeddings = model.config, model.embeddings
    table = embeddings.position_embeddings
    if grid == config.position_grid:
        return table
    if table is None:
        if config.rope_coordinates == "grid":
            raise ValueError(
                f"Expected the image size of the checkpoint, {config.image_size}, as rope_coordinates='grid' count "
                f"patches of it, got one of {grid[0]} x {grid[1]} patches"
            )
        return None
    cls_position, registers, patches = split_positions(table, config)
    before = [position for position in (cls_position, registers) if position is not None]
    return torch.cat([*before, embeddings.interpolation(patches, grid)], dim=1)


@torch.no_grad()
def with_channels(weight: Tensor, num_channels: int) -> Tensor:
    """The projection of patches for another number of channels; it answers to grey images as before.

    Images with equal channels get the same features, because the weights of all channels add up to the same: with
    fewer channels than before, each has an equal share of that sum; with more, they repeat the old ones in turn, and
    copies of one share its weight. So one channel has the sum over RGB, and six have RGB twice at half weight.

    Args:
        weight: `(D, old channels, height, width)`.
        num_channels: C.

    Returns:
        `(D, C, height, width)`.

    Raises:
        ValueError: if there is no channel.
    """
    old = weight.shape[1]
    if num_channels < 1:
        raise ValueError(f"Expected 1 channel or more, got {num_channels}")
    if num_channels == old:
        return weight
    if num_channels < old:
        return weight.sum(dim=1, keepdim=True).expand(-1, num_channels, -1, -1) / num_channels
    source = torch.arange(num_channels) % old
    copies = torch.bincount(source, minlength=old)
    return weight[:, source] / copies[source].to(weight)[:, None, None]


def processor_for(
    source: Source | None, config: ViTRegConfig, crops: bool, eval_crop_ratio: float
) -> ViTRegImageProcessor:
    """How images are prepared for a model: in the size of its config, normalised as those it was trained on.

    Args:
        source: checkpoint whose mean, std and filter are taken where it has a processor; None for random weights.
        config: of the model. If it has other channels than the source, all get the average of its means and stds.
        crops: the model is trained on crops; then the middle of a slightly larger image is evaluated, else all of it.
        eval_crop_ratio: share of the shorter edge in that middle.
    """
    own = None if source is None else _saved_processor(source)
    options: dict[str, Any] = {"resample": 2}
    if own is not None:
        options = {name: getattr(own, name) for name in ("resample", "image_mean", "image_std")}
    channels = config.num_channels
    if len(options.get("image_mean", _RGB)) != channels:
        for name in ("image_mean", "image_std"):
            values = options.get(name, [0.5])
            options[name] = [sum(values) / len(values)] * channels
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    options |= {"size_divisor": config.patch_size, "do_convert_rgb": channels == 3}
    exact = {"height": height, "width": width}
    if not crops:
        return ViTRegImageProcessor(size=exact, **options)
    larger = {"shortest_edge": round(max(height, width) / eval_crop_ratio)}
    return ViTRegImageProcessor(size=larger, crop_size=exact, **options)


def _saved_processor(source: Source) -> ViTRegImageProcessor | None:
    # A file that does not exist is none; a Hub that does not answer is an error, not another normalisation.
    file = cached_file(source, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    return None if file is None else ViTRegImageProcessor.from_pretrained(source)


# What is trained


def freeze(
    model: ViTRegForImageClassification, tuning: Tuning, num_tuned_layers: int = 0, head_is_new: bool = True
) -> None:
    """Leave gradients to what is tuned; to be called before a model is prepared for several processes.

    Args:
        model: not wrapped.
        tuning: `full`; `linear`, the head alone; `partial`, the last blocks, the final norm and the head;
            `registers`, the registers alone, and a head that is new; `registers_partial`, registers and what `partial`
            tunes.
        num_tuned_layers: how many of the last blocks the partial ones tune.
        head_is_new: whether `registers` needs to tune the head, too.

    Raises:
        ValueError: if the model has fewer blocks, or no registers where they are tuned; for another tuning.
    """
    backbone, count = model.vitreg, len(model.vitreg.layers)
    if tuning.endswith("partial") and not 1 <= num_tuned_layers <= count:
        raise ValueError(f"Expected num_tuned_layers of 1 to {count}, the blocks of the model, got {num_tuned_layers}")
    registers = backbone.embeddings.register_tokens
    if tuning.startswith("registers") and registers is None:
        raise ValueError("Expected a model with registers to tune them, got one without: add_registers adds some")
    tokens = [] if registers is None else [registers]
    norms = [norm for norm in (backbone.layernorm, backbone.cls_norm) if norm is not None]
    last_blocks = list(backbone.layers)[count - num_tuned_layers :]
    tuned: dict[str, list[torch.nn.Module | torch.nn.Parameter]] = {
        "full": [model],
        "partial": [*last_blocks, *norms, model.classifier],
        "linear": [model.classifier],
        "registers": [*tokens, *([model.classifier] if head_is_new else [])],
        "registers_partial": [*tokens, *last_blocks, *norms, model.classifier],
    }
    if tuning not in tuned:
        raise ValueError(f"Expected tuning of {', '.join(tuned)}, got {tuning!r}")
    model.requires_grad_(False)
    for part in tuned[tuning]:
        part.requires_grad_(True)


def train_mode(model: ViTRegForImageClassification, tuning: str) -> None:
    """Training mode, in place of `model.train()`.

    But for `full` and `lora`, embeddings and frozen blocks compute as in evaluation: dropout, drop path and patch
    dropout there would only add noise to features that cannot adapt to it. LayerNorm is the same in both modes.
    Registers are the only part of the embeddings that may be tuned then: patches stay as they are.

    Args:
        model: not wrapped.
        tuning: as of `freeze`, or `lora`.
    """
    model.train()
    if tuning in ("full", "lora"):
        return
    model.vitreg.embeddings.eval()
    for layer in model.vitreg.layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            continue
        layer.eval()
        if tuning.startswith("registers"):
            recompute_in_evaluation(layer)


def recompute_in_evaluation(block: torch.nn.Module) -> None:
    """Let a block in evaluation mode recompute activations, if it was told to do so in training.

    Gradients of registers pass all blocks, frozen ones too. The block's own mode says this and nothing else: what is
    random in training are parts of it.
    """
    block.training = True
