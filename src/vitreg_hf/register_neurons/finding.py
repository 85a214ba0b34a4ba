# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Finding the neurons that write a model's outliers (Jiang et al., arXiv 2506.08010, Algorithm 1), in batches.

Two passes over the images: the first sees norms and sets the cutoff, the second sees neurons. What is kept does not
grow with the number of images but for norms, one number per patch and block.

Shapes: B images, N tokens, P patches, F neurons of an MLP, L blocks, n images in all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from vitreg_hf.analysis.extract import Subject, read, subject_of
from vitreg_hf.analysis.images import ImageFiles, find_images, image_batches
from vitreg_hf.analysis.outliers import OutlierRule
from vitreg_hf.analysis.recorder import Readers
from vitreg_hf.analysis.token_norms import cutoff, patch_norms
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel
from vitreg_hf.register_neurons.adding import add_test_time_registers
from vitreg_hf.register_neurons.ranking import VANISHED, RegisterNeuron, RegisterNeurons, Trial

Images = str | Path | ImageFiles | Tensor  # a folder, files of one, or pixel values (n, C, H, W)
Batches = Callable[[], Iterator[Tensor]]

COUNTS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300)  # tried one after the other
_RANKED = max(COUNTS)
_BEYOND = 2  # counts tried after that, to see whether there is a plateau
_TRIED_ON = 64  # images with outliers


def find_register_neurons(
    model: ViTRegPreTrainedModel,
    images: Images,
    processor: Any = None,
    *,
    rule: OutlierRule | None = None,
    top_layer: int | None = None,
    top_k: int | None = None,
    num_images: int = 500,
    batch_size: int = 8,
    image_size: int | None = None,
    progress: bool = True,
) -> RegisterNeurons:
    """Rank the neurons of all MLPs by their mean activation at outliers, and choose how many are register neurons.

    The cutoff of norms follows from a rule over all images. The last block whose neurons are ranked is the first after
    which half of the final outliers are there (the authors: the first block with outliers). How many neurons are taken
    follows from trying: the fewest that leave at most 5 % of the outliers. If none do, later blocks write some too,
    and all are searched up to where norms are judged; if that does not help either, those that leave the fewest are
    taken, and the result says so where it is printed.

    Args:
        model: of this family (`convert_checkpoint` makes it one), without test-time registers.
        images: folder of images, or pixel values `(n, C, H, W)`.
        processor: image processor, for a folder.
        rule: what an outlier is; left out, twice the median norm after the last block. Where the last block shrinks
            norms, as in DINOv2-L, `OutlierRule(layer=-2)`.
        top_layer: last block whose neurons are ranked, from 0, in place of that rule.
        top_k: how many are taken, in place of trying.
        num_images: at most so many images are read; the authors take 100 to 1,000.
        batch_size: images at a time.
        image_size: side in pixels in place of the processor's.
        progress: show progress bars.

    Returns:
        The ranking, which prints, saves and loads.

    Raises:
        ValueError: if there is no outlier to be written by anything: such a model needs no registers; or if an
            argument or an image does not fit.
    """
    rule = rule or OutlierRule()
    _check(model, rule, top_layer, top_k)
    batches = batches_of(images, processor, num_images, batch_size, image_size)
    with evaluated(model):
        return _found(model, batches, rule, top_layer, top_k, progress)


def _check(model: ViTRegPreTrainedModel, rule: OutlierRule, top_layer: int | None, top_k: int | None) -> None:
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family != ViTRegConfig.model_type:
        raise ValueError(f"Expected a model of this family, got {family}: convert_checkpoint makes it one")
    if model.config.num_test_time_registers or model.config.register_neurons:
        raise ValueError("Expected a model without test-time registers, got one with them")
    layers = model.config.num_hidden_layers
    rule.state(layers)
    if top_layer is not None and not 0 <= top_layer < layers:
        raise ValueError(f"Expected top_layer of 0 to {layers - 1}, got {top_layer}")
    if top_k is not None and not 1 <= top_k <= _RANKED:
        raise ValueError(f"Expected 1 to {_RANKED} register neurons, got {top_k}")


@contextmanager
def evaluated(model: ViTRegPreTrainedModel) -> Iterator[None]:
    """In evaluation mode; afterwards every part of the model is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _found(
    model: ViTRegPreTrainedModel,
    batches: Batches,
    rule: OutlierRule,
    top_layer: int | None,
    top_k: int | None,
    progress: bool,
) -> RegisterNeurons:
    subject = subject_of(model, device=str(model.device))
    state = rule.state(len(subject.anatomy.blocks))
    norms = torch.cat(_norms(subject, batches, progress))  # (n, L + 1, P)
    if not norms.isfinite().all():
        raise ValueError(f"Expected finite norms of patches, got others from weights in {model.dtype}")
    threshold = cutoff(norms[:, state].flatten().numpy(), rule.rule, rule.value)
    outliers = norms[:, state] > threshold
    share = float(outliers.float().mean())
    if not share:
        largest = float(norms[:, state].max())
        raise ValueError(
            f"Expected outliers, got none among {outliers.numel()} patches of {len(norms)} images (norms up to "
            f"{largest:.4g}, cutoff {threshold:.4g} by the {rule.rule} rule): this model needs no registers"
        )
    signed = bool(model.config.use_swiglu_ffn)  # neurons of an MLP are hardly ever far below 0, of SwiGLU they are
    best: RegisterNeurons | None = None
    for last in _top_layers(norms, outliers, threshold, state) if top_layer is None else [top_layer]:
        at_outliers, elsewhere = _activations(subject, batches, outliers, last, progress)
        ranking = _ranked(at_outliers, elsewhere, signed)
        found = RegisterNeurons(
            ranking,
            min(top_k or 1, len(ranking)),
            threshold,
            f"{rule.rule} rule" if rule.value is None else f"{rule.rule} rule, {rule.value:g}",
            state,
            last,
            share,
            len(norms),
            "largest" if signed else "max",
        )
        if top_k is not None:
            return found.first(top_k)
        found = _tried(model, found, _with_outliers(batches, outliers), progress)
        if best is None or found.left < best.left:
            best = found
        if best.left <= VANISHED:
            break
    return cast(RegisterNeurons, best)


# Images


def batches_of(
    images: Images,
    processor: Any,
    num_images: int,
    batch_size: int = 8,
    image_size: int | None = None,
) -> Batches:
    """Batches `(B, C, H, W)` of a folder or of pixel values, as often as they are asked for.

    Raises:
        ValueError: for pixel values of another shape, a folder without images, or numbers below one.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"Expected one image or more, and in a batch, got {num_images} and {batch_size}")
    if isinstance(images, Tensor):
        if images.ndim != 4 or not len(images):
            raise ValueError(f"Expected pixel values (n, C, H, W), got {tuple(images.shape)}")
        pixels = images[:num_images]
        return lambda: iter(pixels.split(batch_size))
    if processor is None:
        raise ValueError("Expected an image processor for a folder of images, got none")
    found = images if isinstance(images, ImageFiles) else find_images(images)
    files: Sequence[Path] = found.first(num_images).files
    return lambda: image_batches(files, processor, batch_size, image_size)


# First pass: norms


def _norms(subject: Subject, batches: Batches, progress: bool) -> list[Tensor]:
    """Norms of patches in every state, `(B, L + 1, P)` per batch."""
    readers = Readers(hidden=lambda _, state: patch_norms(state, subject.layout).cpu())
    bar = tqdm(batches(), desc="Norms", unit="batch", disable=not progress)
    return [torch.stack(read(subject, pixel_values, readers).hidden, dim=1) for pixel_values in bar]


def _top_layers(norms: Tensor, outliers: Tensor, threshold: float, state: int) -> list[int]:
    """The first block after which half of the outliers are above the cutoff, and the last one that can write any."""
    there = [float((norms[:, i] > threshold)[outliers].float().mean()) for i in range(1, state + 1)]
    return sorted({next(i for i, share in enumerate(there) if share >= 0.5), state - 1})


# Second pass: neurons


def _activations(
    subject: Subject, batches: Batches, outliers: Tensor, last: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Mean activation of every neuron at outliers and at other patches, mean over images with outliers, `(L, F)`."""
    sums: list[Tensor] = []
    start = images = 0
    for pixel_values in tqdm(batches(), desc="Neurons", unit="batch", disable=not progress):
        marked = outliers[start : start + len(pixel_values)]
        start += len(pixel_values)
        having = marked.any(dim=1)
        if not having.any():
            continue
        images += int(having.sum())
        readers = Readers(neurons=lambda i, x: _by_kind(subject, x, marked, having) if i <= last else None)  # noqa: B023
        found = torch.stack(read(subject, pixel_values[having], readers).neurons[: last + 1])
        sums = [found.double()] if not sums else [sums[0] + found.double()]
    means = sums[0] / images  # (layers, 2, F)
    return means[:, 0].float(), means[:, 1].float()


def _by_kind(subject: Subject, activations: Tensor, marked: Tensor, having: Tensor) -> Tensor:
    """Sum over images of the mean activation at outliers and at other patches, `(2, F)`."""
    patches = subject.layout.patch_tokens(activations).float()
    at = marked[having].to(patches)
    weights = torch.stack([at, 1 - at], dim=1)  # (B, 2, P)
    return torch.bmm(weights / weights.sum(dim=2, keepdim=True).clamp(min=1), patches).sum(dim=0).cpu()


def _ranked(at_outliers: Tensor, elsewhere: Tensor, signed: bool) -> tuple[RegisterNeuron, ...]:
    scores = at_outliers.abs() if signed else at_outliers
    order = scores.flatten().argsort(descending=True, stable=True)[:_RANKED]
    width = at_outliers.shape[1]
    places = [divmod(index, width) for index in order.tolist()]
    return tuple(RegisterNeuron(i, j, float(at_outliers[i, j]), float(elsewhere[i, j])) for i, j in places)


# How many


def _with_outliers(batches: Batches, outliers: Tensor) -> tuple[Tensor, int]:
    """Images to try on, evenly spread over those that have outliers, and the size of a batch."""
    having = outliers.any(dim=1).nonzero()[:, 0]
    places = torch.linspace(0, len(having) - 1, min(_TRIED_ON, len(having))).round().long()
    wanted, kept, start, size = set(having[places].tolist()), [], 0, 1
    for pixel_values in batches():
        size = max(size, len(pixel_values))
        kept += [image for i, image in enumerate(pixel_values, start) if i in wanted]
        start += len(pixel_values)
    return torch.stack(kept), size


def _tried(
    model: ViTRegPreTrainedModel, found: RegisterNeurons, images: tuple[Tensor, int], progress: bool
) -> RegisterNeurons:
    """The ranking with the number of neurons that trying tells."""
    pixels, size = images
    norms, original = norms_and_pooled(model, pixels.split(size), found.state)
    trials = [_trial(0, norms, original, original, found.threshold)]
    goal, beyond = VANISHED * trials[0].outlier_share, _BEYOND
    for count in tqdm([c for c in COUNTS if c <= len(found.ranking)], desc="Trials", disable=not progress):
        mended = add_test_time_registers(model, found.first(count))
        norms, pooled = norms_and_pooled(mended, pixels.split(size), found.state)
        trials.append(_trial(count, norms, pooled, original, found.threshold))
        beyond -= any(trial.outlier_share <= goal for trial in trials[:-1])
        if not beyond:
            break
    best = min(trials[1:], key=lambda trial: (trial.outlier_share, trial.count))
    vanished = next((trial for trial in trials[1:] if trial.outlier_share <= goal), best)
    return RegisterNeurons(**{**vars(found), "count": vanished.count, "trials": tuple(trials)})


def _trial(count: int, norms: Tensor, pooled: Tensor, original: Tensor, threshold: float) -> Trial:
    cosine = float(torch.cosine_similarity(pooled, original, dim=-1).mean())
    return Trial(count, float((norms > threshold).float().mean()), float(norms.max()), cosine)


@torch.inference_mode()
def norms_and_pooled(model: ViTRegPreTrainedModel, batches: Iterable[Tensor], state: int) -> tuple[Tensor, Tensor]:
    """Norms of patches in one state, `(n, P)`, and pooled features, `(n, D)`, of batches `(B, C, H, W)`."""
    backbone: Any = model.base_model
    norms, pooled = [], []
    for batch in batches:
        # of the class below, as `ViTRegBackbone` itself gives no pooled feature
        outputs = ViTRegModel.forward(backbone, batch.to(model.device), output_hidden_states=True, return_dict=True)
        norms.append(patch_norms(outputs.hidden_states[state], backbone.layout).cpu())
        pooled.append(outputs.pooler_output.float().cpu())
    return torch.cat(norms), torch.cat(pooled)
