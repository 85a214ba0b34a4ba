# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The task "attention-maps": what CLS and each register of an image attend to.

Shapes: T prefix tokens (CLS, then registers), h heads, rows x columns patches.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from torch import Tensor
from transformers import Pipeline

from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.pipelines.images import ReadsImages

if TYPE_CHECKING:
    from vitreg_hf.analysis.foreign import Anatomy

_HEADS = ("mean", "all")


class AttentionMapsPipeline(ReadsImages, Pipeline):  # type: ignore[misc]  # see ReadsImages
    """Attention of CLS and registers to the patches of an image; reads and names images as `ReadsImages` says.

    For models of this family under any attention backend, with any head, and for the vision models of Transformers
    that `vitreg_hf.analysis.foreign` lists.

    Args (when it is made, or called):
        layer: index of the layer, default -1, the last one.
        heads: "mean" over them, the default, or "all".
        overlay: draw a picture, the default; needs the extra `analysis`, and takes longer than a small model.
        timeout: seconds to wait for an image from an address.

    Returns:
        Per image a dict with `tokens`, their names ("CLS", "register 1", ...); `maps`, float32
        `(T, rows, columns)` or `(T, h, rows, columns)`, softmax probabilities; `on_patches`, float32 `(T,)` or
        `(T, h)`, the share of each token's attention that its map holds, the rest being on CLS and registers; `layer`
        from 0; and `overlay`, a PIL image of the maps (mean over heads) over the image as the model saw it.

    Raises:
        ValueError: for a model of another family, or with neither CLS nor registers, for options of other values,
            for a model in training mode, and for images that the patch size does not divide, unless the model pads.
    """

    # Declared as None by Transformers, and set like this by all its pipelines.
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    @cached_property
    def _anatomy(self) -> Anatomy:
        from vitreg_hf.analysis.foreign import anatomy_of

        anatomy = anatomy_of(self.model)
        if anatomy.layout is None or not anatomy.prefix_names:
            raise ValueError(
                f"Expected a vision model with CLS or registers, got {type(self.model).__name__}, which has neither"
            )
        return anatomy

    def _sanitize_parameters(  # type: ignore[override]  # names its options, so that no other is swallowed
        self,
        layer: int | None = None,
        heads: str | None = None,
        overlay: bool | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        count = len(self._anatomy.blocks)
        if layer is not None and (
            isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count
        ):
            raise ValueError(f"Expected layer from {-count} to {count - 1}, got {layer!r}")
        if heads is not None and heads not in _HEADS:
            raise ValueError(f"Expected heads 'mean' or 'all', got {heads!r}")
        if overlay is not None and not isinstance(overlay, bool):
            raise ValueError(f"Expected overlay True or False, got {overlay!r}")
        before = getattr(self, "_postprocess_params", None)
        drawn = overlay if overlay is not None else (before or {}).get("overlay", before is not None)
        if drawn and find_spec("matplotlib") is None:  # when it is made, only if an overlay is asked for by name
            raise ValueError(
                "Expected matplotlib for an overlay, got an environment without it: pip install 'vitreg_hf[analysis]' "
                "or pass overlay=False"
            )
        chosen = {"layer": layer, "heads": heads, "overlay": overlay}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        forward = {} if layer is None else {"layer": layer}
        return {} if timeout is None else {"timeout": timeout}, forward, chosen

    def _prepare_picture(self, picture: PIL.Image.Image, **options: Any) -> Any:
        return self._prepare_array(picture, **options)

    def _forward(  # type: ignore[override]  # a plain dict, which Transformers splits into images too
        self, model_inputs: Any, layer: int = -1
    ) -> dict[str, Tensor]:
        if self.model.training:
            raise ValueError("Expected a model in evaluation mode, got one in training mode: call model.eval() first")
        pixel_values = model_inputs["pixel_values"]
        own = self._anatomy.family == ViTRegConfig.model_type
        maps = self._own_maps(model_inputs, layer) if own else self._foreign_maps(pixel_values, layer)
        return {"maps": maps.float(), "pixel_values": pixel_values}

    def _own_maps(self, model_inputs: Any, layer: int) -> Tensor:
        """`(B, h, T, rows, columns)` of this family, which also knows what is padding."""
        backbone: Any = self._anatomy.backbone
        outputs = backbone(**model_inputs, output_prefix_attentions=[layer], return_dict=True)
        return backbone.layout.attention_to_patches(outputs.prefix_attentions[layer], outputs.patch_map.shape[-2:])

    def _foreign_maps(self, pixel_values: Tensor, layer: int) -> Tensor:
        """`(B, h, T, rows, columns)` of a model that does not return them."""
        from vitreg_hf.analysis.extract import prefix_attention

        return prefix_attention(self.model, pixel_values, layer).maps

    def postprocess(  # type: ignore[override]  # names its options
        self, model_outputs: dict[str, Tensor], layer: int = -1, heads: str = "mean", overlay: bool = True
    ) -> dict[str, Any]:
        """Turn the maps of one image into what the pipeline returns."""
        every = model_outputs["maps"][0].transpose(0, 1).contiguous()  # (T, h, rows, columns)
        mean = every.mean(dim=1)
        maps = mean if heads == "mean" else every
        results: dict[str, Any] = {
            "tokens": list(self._anatomy.prefix_names),
            "maps": maps.numpy(),
            "on_patches": maps.sum(dim=(-2, -1)).numpy(),
            "layer": layer % len(self._anatomy.blocks),
        }
        if overlay:
            results["overlay"] = self._draw(model_outputs["pixel_values"], mean.numpy(), results["layer"])
        return results

    def _draw(self, pixel_values: Tensor, maps: np.ndarray, layer: int) -> PIL.Image.Image:
        from vitreg_hf.analysis.figures.overlay import attention_overlay
        from vitreg_hf.analysis.images import as_seen

        name = Path(getattr(self.model, "name_or_path", "") or type(self.model).__name__).name
        return attention_overlay(
            as_seen(pixel_values, self.image_processor)[0],
            maps,
            token_names=self._anatomy.prefix_names,
            title=f"{name}: attention in layer {layer + 1} of {len(self._anatomy.blocks)}",
        )
