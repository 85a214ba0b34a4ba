# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""All layouts, and which of them a source is of."""

from collections.abc import Mapping

from vitreg_hf.conversion.from_dinov2 import Dinov2Layout
from vitreg_hf.conversion.from_dinov3 import Dinov3Layout
from vitreg_hf.conversion.from_open_clip import OpenClipLayout
from vitreg_hf.conversion.from_timm import TimmLayout
from vitreg_hf.conversion.from_transformers import LAYOUTS as OF_TRANSFORMERS
from vitreg_hf.conversion.layout import Layout
from vitreg_hf.conversion.stored import Source

_OPEN_CLIP = OpenClipLayout()
_ALL: tuple[Layout, ...] = (*OF_TRANSFORMERS, TimmLayout(), Dinov3Layout(), Dinov2Layout(), _OPEN_CLIP)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in _ALL}


def named_layout(name: str) -> Layout:
    """The layout of a name; raises ValueError for one that there is not."""
    if name not in LAYOUTS:
        raise ValueError(f"Expected a layout of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def recognised(source: Source) -> tuple[Layout, str]:
    """The layout of a source and why it is this one.

    Raises:
        ValueError: if it is none, or is of the family already; with what it looks like.
    """
    model_type = (source.config or {}).get("model_type")
    if model_type == "vitreg":
        raise ValueError(f"Expected a checkpoint of another family, got {source.name}, which is of ViTReg already")
    # first what goes by names of tensors that no other layout has: a config of Transformers may lie beside OpenCLIP's
    for layout in (_OPEN_CLIP, *_ALL):
        if why := layout.recognise(source):
            return layout, why
    looks = f"model_type {model_type!r}" if model_type else f"tensors such as {', '.join(list(source.tensors)[:3])}"
    hint = ", which does not convert"
    if not model_type:
        hint = ": name the layout if it is one of them (files of Transformers need their config.json beside them)"
    raise ValueError(f"Expected a layout of {', '.join(LAYOUTS)}, got {source.name} with {looks}{hint}")
