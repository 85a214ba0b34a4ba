# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Passes over images of many sizes at once, without padding: the backbone and the classifier.

Shapes: B images, groups of B_i images of one size, C channels, H x W pixels, P patches, N tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from .outputs import ViTRegImageClassifierOutput, ViTRegModelOutput
from .packing import Packing
from .token_layout import packed

_RECORDED = ("output_attentions", "output_hidden_states", "output_prefix_attentions")


class Grouping(NamedTuple):
    """Images by size."""

    groups: list[Tensor]  # (B_i, C, H_i, W_i)
    masks: list[Tensor | None]  # (B_i, P_i), True where a patch is masked
    places: list[list[int]] | None  # of each group's images in what was given; None if groups were given

    @classmethod
    def of(cls, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> "Grouping":
        """Group single images `(C, H, W)`, or take groups `(B_i, C, H_i, W_i)` as they come.

        Raises:
            ValueError: if there is no image, masks are not one per image or group, or images and groups are mixed.
        """
        masks = [None] * len(images) if masks is None else masks
        if len(images) == 0 or len(masks) != len(images):
            expected = "images, or groups of images, and a mask or None for each"
            raise ValueError(f"Expected {expected}, got {len(images)}, {len(masks)}")
        single = {isinstance(image, Tensor) and image.ndim == 3 for image in images}
        if len(single) > 1:
            shapes = [tuple(getattr(image, "shape", ())) for image in images]
            raise ValueError(f"Expected images (C, H, W) alone or groups (B, C, H, W) alone, got shapes {shapes}")
        if single == {False}:
            return cls(list(images), list(masks), None)
        by_size: dict[Any, list[int]] = {}
        for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
            by_size.setdefault((image.shape, mask is None), []).append(place)
        places = list(by_size.values())
        return cls(
            [torch.stack([images[place] for place in own]) for own in places],
            [None if masks[own[0]] is None else torch.stack([cast(Tensor, masks[i]) for i in own]) for own in places],
            places,
        )

    def as_given(self, outputs: Sequence[ViTRegModelOutput]) -> tuple[ViTRegModelOutput, ...]:
        """One output per image or group as it was given, from those of the groups; views, `(1, ...)` of an image."""
        if self.places is None:
            return tuple(outputs)
        by_place = {}
        for own, output in zip(self.places, outputs, strict=True):
            for number, place in enumerate(own):
                fields: dict[str, Any] = {name: value.narrow(0, number, 1) for name, value in output.items()}
                by_place[place] = ViTRegModelOutput(**fields)
        return tuple(by_place[place] for place in range(len(by_place)))

    def in_order(self, rows: Sequence[Tensor]) -> Tensor:
        """Vectors of images in the order given, `(B, ...)`, from those of the groups, `(B_i, ...)`."""
        vectors = torch.cat(list(rows))
        places = torch.tensor([place for own in self.places or [] for place in own])
        return vectors.index_select(0, places.argsort().to(vectors.device, non_blocking=True))


class PackedModelMixin:
    """For the backbone; `self` is `ViTRegModel`, whose file imports this one."""

    def forward_packed(
        self: Any,
        images: Sequence[Tensor],
        bool_masked_pos: Sequence[Tensor | None] | None = None,
        output_tokens: bool | None = None,
    ) -> tuple[ViTRegModelOutput, ...]:
        """Run the backbone on images of many sizes at once, or on groups of them.

        Norms, projections and MLPs run once on the tokens of all images; attention stays within each image, without
        padding: in one call with FlashAttention and flex attention, else once per size. Equal to `forward` of each
        image, or of each group, by itself. Hidden states and attention are not recorded here, whatever the config
        says. Gradient checkpointing must not be reentrant, which is the default of Transformers.

        Stochastic depth of the kind `"subset"` draws from all single images together, so that it also drops where
        every size differs, and from each group by itself; with `output_tokens=False` the last layer drops as the kind
        `"mask"` does.

        Under DDP and FSDP only `forward` of the wrapped module is prepared: call this from the `forward` of a module
        around the model, and wrap that. `ViTRegForImageClassification` takes lists of images in its `forward`.

        Args:
            images: single images `(C, H_i, W_i)`, or groups `(B_i, C, H_i, W_i)` of images of one size.
            bool_masked_pos: for each image `(P_i,)` or each group `(B_i, P_i)`, True where a patch is replaced by the
                mask token, or None.
            output_tokens: as in `forward`.

        Returns:
            One `ViTRegModelOutput` per image (of a batch of one) or group, in the order given.

        Raises:
            ValueError: if there is no image, masks are not one per image, images and groups are mixed, or an input
                does not fit the config.
        """
        grouping = Grouping.of(images, bool_masked_pos)
        return grouping.as_given(self.run_packed(grouping, output_tokens))

    def run_packed(
        self: Any, grouping: Grouping, output_tokens: bool | None = None, num_states: int = 0
    ) -> list[ViTRegModelOutput]:
        """One output per group, with the `hidden_states` of the last `num_states` layers if there are to be any."""
        pairs = zip(grouping.groups, grouping.masks, strict=True)
        embedded = [self.embeddings(group, bool_masked_pos=mask) for group, mask in pairs]
        tokens = packed([one.tokens for one in embedded])
        sizes = [(one.tokens.shape[0], one.tokens.shape[1]) for one in embedded]
        rotations = [one.rotation for one in embedded if one.rotation is not None]
        packing = Packing(sizes, tokens.device, rotations, apart=grouping.places is None)
        num_tokens = self._num_tokens_read(None) if output_tokens is False else None
        nothing = dict.fromkeys(_RECORDED, False)
        encoded = self._run_packed_layers(tokens, packing, num_tokens, num_states, **nothing, return_dict=True)
        normed = self._normed_by_group(encoded.last_hidden_state, packing.first(num_tokens))
        states_of_groups = zip(*encoded.hidden_states, strict=True) if num_states else [None] * len(embedded)
        return [
            ViTRegModelOutput(
                pooler_output=self._pooled(group, None),
                hidden_states=hidden_states,
                **self._by_name(group, one.grid, num_tokens),
            )
            for group, one, hidden_states in zip(normed, embedded, states_of_groups, strict=True)
        ]

    # Nothing is captured, but outside of this the hooks that would do so cannot be compiled by PyTorch 2.11.
    @capture_outputs(tie_last_hidden_states=False)
    def _run_packed_layers(
        self: Any, tokens: Tensor, packing: Packing, num_tokens: int | None, num_states: int, **_: bool
    ) -> BaseModelOutput:
        """Tokens `(T, D)` after the last layer, and the last `num_states` states by layer and group."""
        states: list[Any] = []
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            own = num_tokens if index == last else None
            tokens = layer(tokens, packing=packing, num_queries=own)
            if index > last - num_states:
                states.append(packing.first(own).by_group(tokens))
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=tuple(states) or None)

    def _normed_by_group(self: Any, tokens: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        """Tokens `(T, D)` as they leave the model, by group; a norm that all of them share runs once."""
        if self.cls_norm is None and not self.config.pooled_norm:
            return packing.by_group(self.layernorm(tokens))
        return tuple(self.normed(group) for group in packing.by_group(tokens))


class PackedClassifierMixin:
    """For the classifier; `self` is `ViTRegForImageClassification`."""

    def _classify_packed(
        self: Any,
        images: Sequence[Tensor],
        labels: Tensor | None,
        pixel_mask: Tensor | None,
        output_tokens: bool | None = None,
        **kwargs: Any,
    ) -> ViTRegImageClassifierOutput:
        """Classify single images `(C, H_i, W_i)`; what differs in size between them is None in the output."""
        _check_packed(images, pixel_mask, kwargs)
        kwargs = self.vitreg._read(kwargs)
        grouping, layers = Grouping.of(images), self.config.num_classifier_layers
        outputs = self.vitreg.run_packed(grouping, output_tokens, num_states=layers if layers > 1 else 0)
        logits = self.classifier(grouping.in_order([self._classifier_input(output) for output in outputs]))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        tokens = {name: [getattr(output, name) for output in outputs] for name in ("cls_token", "register_tokens")}
        of_all: dict[str, Any] = {name: grouping.in_order(own) for name, own in tokens.items() if own[0] is not None}
        return ViTRegImageClassifierOutput(loss=loss, logits=logits, **of_all)


def _check_packed(images: Sequence[Tensor], pixel_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    shapes = [tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image in images]
    if not all(isinstance(image, Tensor) and image.ndim == 3 for image in images):
        raise ValueError(f"Expected a list of images as tensors (channels, height, width), got {shapes}")
    if pixel_mask is not None:
        raise ValueError("Expected no pixel_mask for a list of images, which are not padded, got one")
    if asked := [name for name in _RECORDED if kwargs.get(name)]:
        raise ValueError(f"Expected images of one size in a tensor to record attention or states, got a list, {asked}")
