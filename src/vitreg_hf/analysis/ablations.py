# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What registers, outlier patches or sink tokens are worth: they are replaced, and the loss is measured.

Tokens are replaced at the input of blocks by zeros, by their mean over images, by noise of their mean and spread, or
by those of another image. Zeros are no state that a model knows, so zeroing alone exaggerates (Parodi, arXiv
2604.14433); registers fixed to their mean in all layers change little (Sun et al., arXiv 2402.17762). Means, spreads
and the tokens of other images are always those of the model without any replacement.

Every mode is also applied to as many random normal patches of the same images: the control.

Shapes: B images, N tokens, P patches, D channels, S slots. A slot is what has a mean of its own: each register; all
outliers together, all sinks, all control patches. `slots` `(B, N)` is -1 for tokens that stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from tqdm import tqdm

from vitreg_hf.analysis.ablation_costs import Outcome, cost_table, costs, summary
from vitreg_hf.analysis.extract import Subject, classify, normed, read
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.analysis.replacements import MODES, Edit, Mode, moments, replacing
from vitreg_hf.analysis.report import Section
from vitreg_hf.analysis.sinks import received_attention
from vitreg_hf.analysis.token_norms import outlier_mask, patch_norms

Kind = Literal["registers", "outliers", "sink"]
Batches = Callable[[], Iterator[Tensor]]

_PLACES = ("ablated", "control")


@dataclass(frozen=True)
class _Plan:
    """The arguments of `ablate`, checked; indices count from 0."""

    kind: Kind
    modes: tuple[Mode, ...]
    threshold: float | None
    state: int
    sink_layer: int
    blocks: frozenset[int]
    seed: int
    head: bool


def ablate(
    subject: Subject,
    batches: Batches,
    *,
    kind: Kind,
    modes: Sequence[Mode] = MODES,
    labels: Sequence[int] | None = None,
    threshold: float | None = None,
    state: int = -1,
    sink_layer: int = -1,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Replace tokens of every image and measure what is lost, beside the same for random patches.

    Two runs over the images, the first for means and spreads. Memory does not grow with their number but for some
    numbers, and where a probe is trained one vector, per image and mode.

    Args:
        subject: a vision model, with or without a classification head.
        batches: called twice; gives batches `(B, C, H, W)`, the same in the same order each time.
        kind: "registers", all of them; "outliers", patches whose norm is above `threshold`; "sink", in each image the
            token that receives most attention, mean over heads and queries. A sink may be a register or a patch, never
            CLS: replacing what the loss is read off would say nothing about it.
        modes: all four by default.
        labels: class of each image; needed for accuracies.
        threshold: norm of outliers, in residual-stream units; with other kinds, no control patch has more.
        state: where norms are compared with it, from 0 before the first block to L after the last; negative counts
            from the last, which is the default and the paper's (arXiv 2309.16588, section 2.1).
        sink_layer: where attention is read for "sink"; negative counts from the last, the default.
        blocks: before which blocks tokens are replaced; all by default.
        seed: of noise, of which image gets whose tokens, of control patches, and of the probe's halves.

    Returns:
        `unablated` and, for each of `modes`, what holds with `ablated` tokens and for the `control`: means with
        intervals over the images that have such tokens (for "shuffle", as another image of their batch has).
        `pooled_cosine` (of CLS; without CLS of the mean patch) and `patch_cosine` (mean over patches that were not
        replaced) compare with the unablated model after the final norm. With a head also `agreement` with its
        unablated answers; with labels `accuracy` and `accuracy_change`. With labels but no head `probe_accuracy`: of a
        logistic regression on unablated pooled features of half of the images, for ablated ones of the other half.

    Raises:
        ValueError: for arguments that do not fit the model or one another, before work starts; in or after the first
            run for a batch of one that is to be shuffled, or other numbers of images and labels; in the second if it
            has other images.
    """
    given = None if labels is None else torch.as_tensor(labels)
    plan = _checked_plan(subject, kind, tuple(dict.fromkeys(modes)), given, threshold, state, sink_layer, blocks, seed)
    totals, count = _first_run(subject, batches, plan)
    if count == 0 or (given is not None and len(given) != count):
        wanted = "at least one image" if given is None else f"as many images as labels, {len(given)}"
        raise ValueError(f"Expected {wanted}, got {count}")
    scores = _second_run(subject, batches, plan, totals, given, count)
    has_some = scores["unablated"]["tokens"] > 0
    same_images = {name: _only(values, has_some) for name, values in scores["unablated"].items()}
    return {
        "model": subject.name,
        "kind": kind,
        "blocks": sorted(plan.blocks),
        "images": count,
        "images_without": int((~has_some).sum()),
        "unablated": summary(same_images, scores["unablated"], given, seed),
        "modes": {
            mode: {place: summary(scores[f"{mode} {place}"], scores["unablated"], given, seed) for place in _PLACES}
            for mode in plan.modes
        },
    }


def _only(values: NDArray[Any], wanted: NDArray[np.bool_]) -> NDArray[Any]:
    return np.where(wanted.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)


# Which tokens


def _places(subject: Subject, pixel_values: Tensor, plan: _Plan, batch: int) -> dict[str, Tensor]:
    """Slots `(B, N)` of the tokens to replace, and of as many random patches that are neither these nor outliers.

    An image with too few such patches has fewer in its control.
    """
    layout, (rows, columns) = subject.layout, subject.grid(pixel_values)
    shape = (len(pixel_values), layout.num_prefix + rows * columns)
    slots, control = (torch.full(shape, -1, device=subject.device) for _ in _PLACES)
    norms, received = _looked_at(subject, pixel_values, plan)
    outliers = torch.zeros_like(layout.patches_of(slots), dtype=torch.bool)
    if norms is not None and plan.threshold is not None:
        outliers = outlier_mask(norms, plan.threshold)
    if plan.kind == "registers":
        registers = layout.by_kind(slots)[1]
        registers.copy_(torch.arange(registers.shape[1], device=slots.device))
    elif plan.kind == "outliers":
        layout.patches_of(slots)[outliers] = 0
    elif received is not None:
        layout.by_kind(received)[0].fill_(-1.0)  # CLS: less than any token gets
        slots.scatter_(1, received.argmax(dim=1, keepdim=True), 0)
    normal = (layout.patches_of(slots) < 0) & ~outliers
    lots = torch.rand(normal.shape, generator=_generator(plan.seed, batch), dtype=torch.float64).to(normal.device)
    rank = lots.masked_fill(~normal, 2.0).argsort(dim=1).argsort(dim=1)
    layout.patches_of(control)[normal & (rank < (slots >= 0).sum(dim=1, keepdim=True))] = 0
    return dict(zip(_PLACES, (slots, control)))


def _looked_at(subject: Subject, pixel_values: Tensor, plan: _Plan) -> tuple[Tensor | None, Tensor | None]:
    """Norms of patches `(B, P)` and attention that each token receives `(B, N)`, of the unablated model, if needed."""

    def read_norms(layer: int, state: Tensor) -> Tensor | None:
        return patch_norms(state, subject.layout) if layer == plan.state else None

    def read_attention(layer: int, call: AttentionCall) -> Tensor | None:
        if layer != plan.sink_layer:
            return None
        each = (call.of_input(image).probabilities() for image in range(len(call.query)))  # N x N maps are large
        return torch.cat([received_attention(one).mean(dim=1) for one in each])

    norms, sinks = plan.threshold is not None, plan.kind == "sink"
    if not norms and not sinks:
        return None, None
    readers = Readers(hidden=read_norms if norms else None, attention=read_attention if sinks else None)
    recorded = read(subject, pixel_values, readers)
    # A copy, as tensors of inference mode refuse to be written to outside it.
    received = recorded.attention[plan.sink_layer].clone() if sinks else None
    return recorded.hidden[plan.state] if norms else None, received


# Runs


def _pass(
    subject: Subject, pixel_values: Tensor, head: bool, places: Mapping[str, Tensor], edit: Edit | None = None
) -> tuple[Outcome, dict[str, list[Tensor]]]:
    """Run a batch; also the tokens that have a slot in each place, before each block."""
    last, final = len(subject.anatomy.blocks), []
    marked: dict[str, list[Tensor]] = {place: [] for place in places}

    def keep(layer: int, state: Tensor) -> None:
        if layer == last:
            final.append(state)
            return
        for place, slots in places.items():
            marked[place].append(state[slots >= 0])

    readers, logits = Readers(hidden=keep, edit=edit), None
    if head:
        logits = classify(subject, pixel_values, readers)
    else:
        read(subject, pixel_values, readers)
    return Outcome(normed(subject, final[0]).double(), logits), marked


def _first_run(subject: Subject, batches: Batches, plan: _Plan) -> tuple[dict[str, Tensor], int]:
    """Moments of the tokens to replace and of the control, and the number of images."""
    registers = subject.layout.num_registers + subject.layout.num_test_time_registers
    num_slots, count = registers if plan.kind == "registers" else 1, 0
    totals: dict[str, Tensor] = {}
    for batch, pixel_values in enumerate(tqdm(batches(), desc=f"Means of {subject.name}", unit="batch")):
        if "shuffle" in plan.modes and len(pixel_values) < 2:
            raise ValueError("Expected at least 2 images in every batch to shuffle between them, got a batch of 1")
        places = _places(subject, pixel_values, plan, batch)
        _, marked = _pass(subject, pixel_values, False, places)
        for place, slots in places.items():
            totals[place] = totals.get(place, 0) + moments(marked[place], slots[slots >= 0], num_slots)
        count += len(pixel_values)
    return totals, count


def _second_run(
    subject: Subject, batches: Batches, plan: _Plan, totals: Mapping[str, Tensor], labels: Tensor | None, count: int
) -> dict[str, dict[str, NDArray[Any]]]:
    """Costs per image, first dimension images: of the model as it is, and of each mode and place."""
    scores: dict[str, list[dict[str, Tensor]]] = {}
    start = 0
    for batch, pixel_values in enumerate(tqdm(batches(), desc=f"Ablating {subject.name}", unit="batch")):
        images = slice(start, start := start + len(pixel_values))
        if start > count:
            break
        right = None if labels is None else labels[images].to(subject.device)
        places = _places(subject, pixel_values, plan, batch)
        before, marked = _pass(subject, pixel_values, plan.head, places)
        every = torch.ones(len(pixel_values), dtype=torch.bool, device=subject.device)
        own = costs(before, before, subject.layout, places["ablated"], every, right)
        scores.setdefault("unablated", []).append(own)
        for place, slots in places.items():
            for mode in plan.modes:
                generator = _generator(plan.seed, batch, 1 + MODES.index(mode), _PLACES.index(place))
                edit, complete = replacing(mode, slots, marked[place], totals[place], plan.blocks, generator)
                after, _ = _pass(subject, pixel_values, plan.head, {}, edit)
                scores.setdefault(f"{mode} {place}", []).append(
                    costs(before, after, subject.layout, slots, complete, right)
                )
    if start != count:
        raise ValueError(f"Expected the same {count} images each time that batches() is called, got {start}")
    return {
        run: {name: torch.cat([one[name] for one in each]).cpu().numpy() for name in each[0]}
        for run, each in scores.items()
    }


def _generator(*numbers: int) -> Generator:
    """One stream of random numbers for each batch and purpose, whatever else was drawn."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# Checks


def _checked_plan(
    subject: Subject,
    kind: Kind,
    modes: tuple[Mode, ...],
    labels: Tensor | None,
    threshold: float | None,
    state: int,
    sink_layer: int,
    blocks: Sequence[int] | None,
    seed: int,
) -> _Plan:
    """Raise what `ablate` says of its arguments."""
    layers, head = len(subject.anatomy.blocks), has_head(subject)
    if kind not in get_args(Kind):
        raise ValueError(f"Expected kind to be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"Expected modes out of {', '.join(MODES)}, got {', '.join(modes) or 'none'}")
    if kind == "registers" and subject.layout.num_registers + subject.layout.num_test_time_registers == 0:
        raise ValueError(f"Expected a model with registers, got {subject.name!r} without")
    if kind == "outliers" and threshold is None:
        raise ValueError("Expected a threshold, the norm above which a patch is an outlier, got none")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"Expected a positive threshold, got {threshold}")
    if blocks is not None and not blocks:
        raise ValueError("Expected at least one block, got none")
    if labels is not None:
        _check_labels(labels, head)
    chosen = frozenset(_index("blocks", block, layers) for block in (range(layers) if blocks is None else blocks))
    places = _index("state", state, layers + 1), _index("sink_layer", sink_layer, layers)
    return _Plan(kind, modes, threshold, *places, chosen, seed, head)


def _check_labels(labels: Tensor, head: bool) -> None:
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"Expected one whole number per image as labels, got {labels.dtype} {tuple(labels.shape)}")
    counts = labels.unique(return_counts=True)[1]
    if not head and (len(counts) < 2 or counts.max() < 3):
        largest = int(counts.max()) if len(counts) else 0
        raise ValueError(
            "Expected labels of 2 classes or more, one of them with 3 images or more, to train and score a probe of a "
            f"model without head, got {len(counts)} classes and at most {largest} images of one"
        )


def _index(name: str, value: int, count: int) -> int:
    if not -count <= value < count:
        raise ValueError(f"Expected {name} from {-count} to {count - 1}, got {value}")
    return value % count


def has_head(subject: Subject) -> bool:
    """Transformers names such models so; a model of timm counts its classes, 0 for none."""
    named = type(subject.model).__name__.endswith("ForImageClassification")
    return named or (subject.model is subject.anatomy.backbone and getattr(subject.model, "num_classes", 0) > 0)


# Report


def sections(results: dict[str, Any]) -> list[Section]:
    """What `ablate` measured, for a report."""
    kind = {"registers": "Registers", "outliers": "Outlier patches", "sink": "Sink tokens"}[results["kind"]]
    text = [
        f"{kind} of {results['model']} were replaced at the input of {len(results['blocks'])} blocks: by zeros, by "
        "their mean over images, by noise of their mean and spread, or by those of another image. What they cost with "
        "the milder replacements is what they tell of an image; zeros also cost what any state costs that the model "
        "never saw. The control replaces as many random normal patches of the same images in the same way.",
        f"{results['images']} images, {results['images_without']} of them without such tokens and left out. Means "
        "over images with 95 % bootstrap intervals; cosines compare with the unablated model after the final norm, 1 "
        "is no change.",
    ]
    return [Section(f"Ablation: {kind.lower()}", text, [cost_table(results, kind)])]
