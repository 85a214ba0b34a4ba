# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' tasks for single images: classification, segmentation, and features by the names of their tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_inputs import read_image
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.pipelines.images import ReadsImages

TOKENS = ("cls_token", "register_tokens", "patch_tokens", "patch_map", "pooler_output", "last_hidden_state")


class CheckedImageClassificationPipeline(ReadsImages, ImageClassificationPipeline):  # type: ignore[misc]  # see ReadsImages
    """Transformers' image classification; reads and names images as `ReadsImages` says.

    Of a model of this family the tokens that its classifier does not read are not computed in the last layer.
    """

    def _forward(  # type: ignore[override]  # names what it takes, as all of Transformers' pipelines do
        self, model_inputs: dict[str, Any]
    ) -> Any:
        if isinstance(self.model, ViTRegForImageClassification):
            model_inputs["output_tokens"] = False
        return super()._forward(model_inputs)


class CheckedImageSegmentationPipeline(ReadsImages, ImageSegmentationPipeline):  # type: ignore[misc]  # see ReadsImages
    """Transformers' image segmentation; reads and names images as `ReadsImages` says."""

    def _prepare_array(self, array: Any, subtask: str | None = None, **options: Any) -> Any:
        if self.tokenizer is not None:
            raise ValueError("expected a path, an address or a PIL image for a model that reads a text too")
        inputs = super()._prepare_array(array, **options)
        inputs["target_size"] = [tuple(read_image(array, do_convert_rgb=False).shape[-2:])]
        return inputs


class TokenFeaturesPipeline(ReadsImages, ImageFeatureExtractionPipeline):  # type: ignore[misc]  # see ReadsImages
    """Transformers' image feature extraction, with tokens by name; reads and names images as `ReadsImages` says.

    Args (when it is made, or called):
        tokens: one of `TOKENS`, or a list of them; only for models of this family. Shapes, one image each: `cls_token`
            and `pooler_output` `(1, D)`, `register_tokens` `(1, R, D)`, `patch_tokens` `(1, P, D)` row-major,
            `patch_map` `(1, D, rows, columns)`, `last_hidden_state` `(1, N, D)`, all after the final norm.

    Returns:
        Without `tokens` what Transformers returns. With a name the token as nested lists, or as a tensor with
        `return_tensors=True`; with a list of names a dict of them.

    Raises:
        ValueError: for an unknown name or one that the model has no tokens for, a model that does not name its tokens,
            or `pool=True` together with `tokens`.
    """

    def _sanitize_parameters(  # type: ignore[override]  # passes the others on
        self, tokens: str | Sequence[str] | None = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**options)
        if tokens is not None:
            postprocess["tokens"] = tokens
        chosen = {**getattr(self, "_postprocess_params", {}), **postprocess}  # also what it was made with
        if "tokens" in chosen:
            if chosen.get("pool"):
                raise ValueError("Expected tokens or pool=True, got both; the pooled features are 'pooler_output'")
            self._check_tokens(chosen["tokens"])
        return preprocess, forward, postprocess

    def _check_tokens(self, tokens: str | Sequence[str]) -> None:
        names = _listed(tokens)
        if not names or not set(names) <= set(TOKENS):
            raise ValueError(f"Expected tokens from {', '.join(TOKENS)}, or a list of them, got {tokens!r}")
        config = self.model.config
        if config.model_type != ViTRegConfig.model_type:
            raise ValueError(
                f"Expected a model that names its tokens, {ViTRegConfig.model_type!r}, for tokens={tokens!r}, got a "
                f"{config.model_type!r}, whose features come as one block: leave tokens out"
            )
        if "cls_token" in names and not config.num_cls_tokens:
            raise ValueError("Expected a model with CLS for 'cls_token', got one without")
        if "register_tokens" in names and not config.num_register_tokens:
            raise ValueError("Expected a model with registers for 'register_tokens', got one with none")

    def postprocess(  # type: ignore[override]  # names its options, as all of Transformers' pipelines do
        self,
        model_outputs: Any,
        pool: bool | None = None,
        return_tensors: bool = False,
        tokens: str | Sequence[str] | None = None,
    ) -> Any:
        """Pick what was asked for from the outputs of one image."""
        if tokens is None:
            return super().postprocess(model_outputs, pool=pool, return_tensors=return_tensors)
        found = {name: _picked(model_outputs, name) for name in _listed(tokens)}
        results = found if return_tensors else {name: values.tolist() for name, values in found.items()}
        return results[tokens] if isinstance(tokens, str) else results


def _listed(tokens: str | Sequence[str]) -> list[str]:
    return [tokens] if isinstance(tokens, str) else list(tokens)


def _picked(outputs: Mapping[str, Any], name: str) -> Tensor:
    if outputs.get(name) is None:  # a head passes on tokens, but neither the pooled features nor all of them
        there = ", ".join(known for known in TOKENS if outputs.get(known) is not None)
        raise ValueError(f"Expected one of {there}, which this model returns, got {name!r}: load it with AutoModel")
    return outputs[name]
