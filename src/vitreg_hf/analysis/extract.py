# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Asks a model: loads it, runs it, and hands out its tokens and attention. The only caller of a model in this room.

Shapes: B images, h heads, T prefix tokens (CLS, then registers), N tokens, rows x columns patches, D channels.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from vitreg_hf.analysis.foreign import TEXT_PATHS, Anatomy, anatomy_of
from vitreg_hf.analysis.recorder import AttentionCall, Readers, Recording, recording
from vitreg_hf.model.token_layout import TokenLayout


@dataclass(frozen=True)
class Subject:
    """A model under analysis.

    Attributes:
        name: what it is called in reports.
        model: as it was loaded, with its head if it has one.
        preprocess: its image processor, or its tokenizer.
        anatomy: where its parts are.
    """

    name: str
    model: nn.Module
    preprocess: Any
    anatomy: Anatomy

    @property
    def layout(self) -> TokenLayout:
        """Order of its tokens.

        Raises:
            ValueError: for a text model.
        """
        if self.anatomy.layout is None:
            raise ValueError(f"Expected a vision model, got a text model of the family {self.anatomy.family!r}")
        return self.anatomy.layout

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images `(B, C, H, W)`.

        Raises:
            ValueError: if the patch size does not divide the image, which most models would crop silently.
        """
        (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], self.layout.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"Expected images that the patch size {patch_height} x {patch_width} divides, got {height} x {width}"
            )
        return height // patch_height, width // patch_width


def load_vision(name: str, device: str | None = None) -> Subject:
    """Load a vision model by its folder or Hub id, with its classification head if it was saved with one.

    Raises:
        ValueError: if it is not of a family that `foreign` knows, or has no image processor.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # None would ask on the terminal
    except (StrictDataclassError, RecursionError) as error:
        raise ValueError(f"Expected a config that can be read in {name!r}, got: {error}") from error
    if config.model_type in TEXT_PATHS:
        raise ValueError(
            f"Expected a vision model, got {name!r}, a text model ({config.model_type}): see vitreg sinks"
        )
    classifies = any(kind.endswith("ForImageClassification") for kind in config.architectures or ())
    auto_class = AutoModelForImageClassification if classifies else AutoModel
    try:
        model = auto_class.from_pretrained(name, config=config, trust_remote_code=False)
    except RuntimeError as error:  # what Transformers raises for tensors of another shape
        raise ValueError(f"Expected weights that fit the config of {name!r}, got: {error}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"Expected an image processor beside the model {name!r}, got none: {error}") from error
    return subject_of(model, processor, _short(name), device)


def load_text(name: str, device: str | None = None) -> Subject:
    """Load a text model, without its head, and its tokenizer, by folder or Hub id."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    no_code: dict[str, Any] = {"trust_remote_code": False}
    kind = AutoConfig.from_pretrained(name, **no_code).model_type
    if kind not in TEXT_PATHS:
        known = ", ".join(TEXT_PATHS)
        raise ValueError(f"Expected a text model of a known family ({known}), got {name!r} of the family {kind!r}")
    model, tokenizer = AutoModel.from_pretrained(name, **no_code), AutoTokenizer.from_pretrained(name, **no_code)
    return subject_of(model, tokenizer, _short(name), device)


def _short(name: str) -> str:
    """What reports call a model: its Hub id, or the last part of its folder."""
    return Path(name).absolute().name if Path(name).is_dir() else name


def subject_of(
    model: nn.Module, preprocess: Any = None, name: str | None = None, device: str | None = None
) -> Subject:
    """Put a model of Transformers or timm under analysis: in evaluation mode, on a GPU if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    anatomy = anatomy_of(model)
    return Subject(name or anatomy.family, model.to(device).eval(), preprocess, anatomy)


@torch.inference_mode()
def read(subject: Subject, inputs: Tensor | Mapping[str, Tensor], readers: Readers, head: bool = False) -> Recording:
    """Run a model once and record what the readers keep.

    Args:
        subject: the model.
        inputs: images `(B, C, H, W)`, or what a tokenizer returns.
        readers: what to keep of each layer.
        head: run the head too; `Recording.embedded` and all layers are the same without.

    Raises:
        ValueError: if the model is in training mode, which makes some models random, or the images do not fit it.
    """
    return _run(subject, inputs, readers, head)[0]


@torch.inference_mode()
def classify(subject: Subject, pixel_values: Tensor, readers: Readers | None = None) -> Tensor:
    """Logits `(B, classes)` of a model with a head, while readers may edit its tokens.

    Raises:
        ValueError: if the model has no classification head.
    """
    output = _run(subject, pixel_values, readers or Readers(), head=True)[1]
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.ndim != 2:
        raise ValueError(f"Expected a model with a classification head, got {type(subject.model).__name__}")
    return logits


def _run(
    subject: Subject, inputs: Tensor | Mapping[str, Tensor], readers: Readers, head: bool
) -> tuple[Recording, Any]:
    if subject.model.training:
        raise ValueError("Expected a model in evaluation mode, got one in training mode: call model.eval() first")
    if isinstance(inputs, Tensor):
        subject.grid(inputs)  # refuses what does not fit
    module: Any = subject.model if head else subject.anatomy.backbone
    try:
        with _fused_attention(subject.model), recording(subject.anatomy, readers) as recorded:
            output = _call(module, subject.anatomy, _on(subject.device, inputs), head)
    except AssertionError as error:  # how timm refuses a size
        raise ValueError(f"Expected inputs that {subject.name!r} takes, got others: {error}") from error
    return recorded, output


def _call(module: Any, anatomy: Anatomy, inputs: Any, head: bool) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if anatomy.family == "timm" and not head:
        features: Any = module.forward_features
        return features(inputs)
    # Transformers' ViT, DeiT, CLIP and SigLIP refuse sizes that they were not trained at unless they are told.
    resizes = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
    return module(inputs, interpolate_pos_encoding=True) if resizes else module(inputs)


def _on(device: torch.device, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: value.to(device) for name, value in inputs.items()}


@contextmanager
def _fused_attention(model: Any) -> Iterator[None]:
    """PyTorch's fused attention, which is where queries and keys are recorded, whatever the model was loaded with."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before in (None, "sdpa") or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def embedded_patches(subject: Subject, recorded: Recording, grid: tuple[int, int]) -> Tensor:
    """Patches right after their embedding, before positions, `(B, rows, columns, D)`, whatever shape they came in."""
    embedded = cast(Tensor, recorded.embedded)
    if embedded.ndim == 3:
        return embedded.unflatten(1, grid)
    return embedded.movedim(1, -1) if tuple(embedded.shape[-2:]) == grid else embedded


@torch.inference_mode()
def normed(subject: Subject, tokens: Tensor) -> Tensor:
    """Tokens `(B, N, D)` of the last block after the final norm, where the model has one for all tokens."""
    norm = subject.anatomy.final_norm
    return tokens if norm is None else norm(tokens)


@dataclass(frozen=True)
class PrefixAttention:
    """Attention of one layer from each prefix token to the patches.

    Attributes:
        layer: index of the layer, from 0.
        token_names: "CLS", "register 1", and so on, one per prefix token.
        maps: softmax probabilities `(B, h, T, rows, columns)`; what is missing to a sum of 1 goes to the prefix.
    """

    layer: int
    token_names: list[str]
    maps: Tensor

    def mean_over_heads(self) -> Tensor:
        """`(B, T, rows, columns)`."""
        return self.maps.mean(dim=1)

    def equal_share(self) -> float:
        """What each of all tokens would get if all got the same."""
        return 1 / (len(self.token_names) + self.maps[0, 0, 0].numel())

    def share_on_patches(self) -> Tensor:
        """Share of each token's attention that goes to patches, not to the prefix, mean over heads, `(B, T)`."""
        return self.mean_over_heads().sum(dim=(-2, -1))


def prefix_attention(model: nn.Module | Subject, pixel_values: Tensor, layer: int = -1) -> PrefixAttention:
    """Run a model and keep what its CLS and registers attend to in one layer; no N x N map is made.

    Args:
        model: any vision model that `foreign` knows, in evaluation mode. One of this family gives the same maps as
            `output_prefix_attentions`.
        pixel_values: `(B, C, H, W)`, as the image processor makes them.
        layer: index of the layer; negative counts from the last.

    Raises:
        ValueError: if the model is in training mode, has no such layer, or has neither CLS nor registers.
    """
    subject = model if isinstance(model, Subject) else Subject("model", model, None, anatomy_of(model))
    layout, count = subject.layout, len(subject.anatomy.blocks)
    if not -count <= layer < count:
        raise ValueError(f"Expected one of the layers from {-count} to {count - 1}, got {layer}")
    if layout.num_prefix == 0:
        raise ValueError("Expected a model with CLS or registers, got one with neither")

    def keep(index: int, call: AttentionCall) -> Tensor | None:
        return call.probabilities(layout.num_prefix) if index == layer % count else None

    attention = read(subject, pixel_values, Readers(attention=keep)).attention[layer]
    maps = layout.attention_to_patches(attention, subject.grid(pixel_values))
    return PrefixAttention(layer % count, list(subject.anatomy.prefix_names), maps)
