# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""ViTReg: a Vision Transformer with register tokens (Darcet et al., arXiv 2309.16588), read top to bottom.

Registers are learned tokens between CLS and the patches. They have no position unless the config says so, take part in
every block in training and in inference, and no head reads them unless its pooling says so.

Shapes: B images, C channels, H x W pixels, P patches on a grid of rows x columns, R registers, N = 1 + R + P tokens,
D channels of the residual stream, h heads of d channels.
"""

import operator
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import ViTRegAttention
from .checkpoint_checks import check_checkpoint
from .configuration_vitreg import ViTRegConfig
from .embeddings import Embedded, ViTRegEmbeddings
from .fusing import FusingMixin
from .inference import are_all_watched, by_pieces, in_cache, is_tracing
from .layers import ViTRegLayer, ViTRegLayerScale
from .outputs import (
    ViTRegBackboneOutput,
    ViTRegImageClassifierOutput,
    ViTRegMaskedImageModelingOutput,
    ViTRegModelOutput,
    ViTRegSemanticSegmenterOutput,
    passed_on,
)
from .packed_model import PackedClassifierMixin, PackedModelMixin
from .position_embedding import Rotation
from .recording import RecordingMixin, aligned, is_watched_inside, selected
from .token_layout import TokenLayout

LayerSelection = bool | int | Sequence[int]


class ViTRegKwargs(TransformersKwargs, total=False):
    """Keyword arguments of every forward pass, besides those of Transformers.

    output_prefix_attentions: return what CLS and registers attend to, for all layers (True) or for the layers listed.
    output_tokens: False leaves out of the last layer what is not read (see `ViTRegModel.forward`).
    """

    output_prefix_attentions: LayerSelection | None
    output_tokens: bool | None


# Models

# Modules of heads, and the keys that a model without them may find in a checkpoint.
_HEAD_KEYS = {name: rf"^{name}\." for name in ("classifier", "decoder", "decode_head", "batch_norm")}


class ViTRegPreTrainedModel(FusingMixin, PreTrainedModel):
    """What all models of the family share: initial weights, and what Transformers needs to know about them."""

    config: ViTRegConfig
    base_model_prefix = "vitreg"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTRegEmbeddings", "ViTRegLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": ViTRegLayer,
        "attentions": ViTRegAttention,
        "prefix_attentions": OutputRecorder(ViTRegAttention, index=2),
    }
    _input_embed_layer = "patch_embeddings"
    # The mask token and other heads are no loss: a head that is missing is still reported as new.
    _keys_to_ignore_on_load_unexpected: set[str] | list[str] | None = [
        r"embeddings\.mask_token$",
        *_HEAD_KEYS.values(),
    ]
    accepts_loss_kwargs = False  # losses are means over the batch, so Trainer divides by the steps it accumulates

    def __init__(self, config: ViTRegConfig, *inputs: Any, **kwargs: Any) -> None:
        config.check_values()  # fields may have been set since the config was made
        super().__init__(config, *inputs, **kwargs)

    def post_init(self) -> None:
        """Finish making the model; what belongs to its own head is never ignored when loading."""
        super().post_init()
        own = {_HEAD_KEYS[name] for name, _ in self.named_children() if name in _HEAD_KEYS}
        ignored = set(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = ignored - own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, ViTRegAttention):
            for bias in (module.bias_k, module.bias_v):
                if bias is not None:
                    init.normal_(bias, mean=0.0, std=self.config.token_initializer_range)
        elif isinstance(module, ViTRegLayerScale):
            init.constant_(module.lambda1, cast(float, self.config.layerscale_value))
        elif isinstance(module, ViTRegEmbeddings):
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, mean=0.0, std=std)
            # Registers must start apart: equal ones get equal gradients and would stay copies of one another.
            for token in (module.cls_token, module.register_tokens):
                if token is not None:
                    init.normal_(token, mean=0.0, std=self.config.token_initializer_range)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load as Transformers does.

        Raises:
            ValueError: for `weights_only=False`, as pickles can run code; for a file of weights that cannot be read,
                has another type of values, or is too small for what the config describes.
        """
        if not weights_only:
            raise ValueError(f"Expected weights_only=True, as a pickle can run code, got {weights_only!r}")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            source = pretrained_model_name_or_path
            raise ValueError(f"Expected readable safetensors files in {source}, got: {error}") from error

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        check_checkpoint(
            model,
            state_dict,
            checkpoint_files,
            load_config.pretrained_model_name_or_path,
            load_config.is_quantized,
            load_config.ignore_mismatched_sizes,
        )
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def _load_and_finalize_distributed_pretrained_model(  # type: ignore[override]  # names what it reads
        self, folder: str, *args: Any, **kwargs: Any
    ) -> Any:
        """The same for what newer versions of Transformers take for shards of a distributed training, by name."""
        files = sorted(str(file) for file in pathlib.Path(folder).glob("*.safetensors"))
        check_checkpoint(self, None, files, folder, ignore_mismatched_sizes=True)  # a shard may hold part of a tensor
        return super()._load_and_finalize_distributed_pretrained_model(folder, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as Transformers does; after `register_for_auto_class`, with code and all Auto classes in the map."""
        if self._auto_class is not None:
            self.config.auto_map = remote_code_map()
        super().save_pretrained(save_directory, *args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay: tokens, positions, biases, norms and LayerScale."""
        tokens = self.token_parameters()
        biases = (".bias_k", ".bias_v")  # of heads
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n in tokens or n.endswith(biases)}

    def token_parameters(self) -> set[str]:
        """Names of the parameters that are tokens or positions: CLS, registers, mask token, position table."""
        base = cast(ViTRegModel, self.base_model)
        tokens = {id(p) for p in base.embeddings.parameters(recurse=False)}
        return {name for name, p in self.named_parameters() if id(p) in tokens}

    def parameter_layers(self) -> dict[str, int]:
        """Depth of every parameter, by name, for learning rates that decay with it.

        Returns:
            0 for the embeddings (patch projection, tokens and positions), i + 1 for block i, and one more than the
            blocks for the final norm and for every module of a head.
        """
        base = cast(ViTRegModel, self.base_model)
        parts = [base.embeddings, *base.layers]
        depths = {id(p): depth for depth, part in enumerate(parts) for p in part.parameters()}
        return {name: depths.get(id(p), len(parts)) for name, p in self.named_parameters()}

    def _check_map(self, reader: str) -> None:
        """Refuse to train what reads a map of patches while patch dropout leaves holes in it."""
        if cast(ViTRegModel, self.base_model).embeddings.leaves_out_patches():
            rate = self.config.patch_dropout_rate
            raise ValueError(f"Expected patch_dropout_rate=0 to train {reader}, which reads every patch, got {rate}")


class ViTRegModel(PackedModelMixin, RecordingMixin, ViTRegPreTrainedModel):
    """The backbone without a head."""

    def __init__(self, config: ViTRegConfig, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.layout = TokenLayout.from_config(config)
        self.embeddings = ViTRegEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([ViTRegLayer(config, rate, i) for i, rate in enumerate(config.drop_path_rates)])
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layernorm = nn.LayerNorm(width, eps=eps) if config.final_norm else nn.Identity()
        self.cls_norm = nn.LayerNorm(width, eps=eps) if config.separate_cls_norm else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_prefix_attentions: LayerSelection | None = None,
        output_tokens: bool | None = None,
        **kwargs: Any,
    ) -> ViTRegModelOutput:
        """Run the backbone (section 2.2 of the paper).

        Args:
            pixel_values: `(B, C, H, W)`, any H and W that the patch size divides (see `pad_to_patch_size`).
            bool_masked_pos: `(B, P)`, True where a patch is replaced by the mask token.
            pixel_mask: `(B, H, W)`, 1 for real pixels, when images of several sizes were padded on the right and at
                the bottom. Padding is attended to by nothing, and every image has the positions that it has alone.
            output_attentions: return `attentions`, one `(B, h, N, N)` per layer: probabilities before dropout,
                whatever the backend. Holds N x N maps; `output_prefix_attentions` is the cheap way.
            output_hidden_states: return `hidden_states`, embeddings and every block's output, before the final norm.
            output_prefix_attentions: return `prefix_attentions`, for all layers or for those listed.
            output_tokens: False computes of the last layer what the pooling of the config reads, unless hidden states
                or attention are asked for: with pooling `cls` that of CLS alone, which takes from the other tokens
                through the weights (see `pooled_attention.py`). Outputs are equal but for rounding; tokens that were
                not computed are None, `last_hidden_state` among them.

        Returns:
            `ViTRegModelOutput`.

        Raises:
            ValueError: if an input does not fit the config, with what was expected and what came.
            TypeError: for an argument that nothing reads.
        """
        kwargs = self._read(kwargs)
        if pixel_values is None:
            raise ValueError("Expected pixel_values of shape (batch, channels, height, width), got None")
        prefix_layers = self._prefix_layers(output_prefix_attentions)
        wanted = {
            "output_attentions": self._or_config("output_attentions", output_attentions),
            "output_hidden_states": self._or_config("output_hidden_states", output_hidden_states),
            "output_prefix_attentions": prefix_layers,
        }
        whole = output_tokens is not False or any(wanted.values())
        if not whole and (at_once := self._images_at_once(pixel_values)) is not None:
            run = partial(ViTRegModel.forward, self, output_tokens=False, return_dict=True)
            return ViTRegModelOutput(**by_pieces(run, (pixel_values, bool_masked_pos, pixel_mask), at_once))
        embedded = self.embeddings(pixel_values, bool_masked_pos=bool_masked_pos, pixel_mask=pixel_mask)
        patch_mask = embedded.patch_mask
        token_mask = None if patch_mask is None else self.layout.token_mask(patch_mask)
        num_tokens = None if whole else self._num_tokens_read(token_mask)
        encoded = self._run_layers(
            embedded.tokens, token_mask, _rotations([embedded]), num_tokens, **wanted, return_dict=True, **kwargs
        )
        tokens = self.normed(cast(Tensor, encoded.last_hidden_state))
        return ViTRegModelOutput(
            pooler_output=self._pooled(tokens, patch_mask),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            prefix_attentions=aligned(encoded.get("prefix_attentions"), prefix_layers, len(self.layers)),
            patch_mask=patch_mask,
            **self._by_name(tokens, embedded.grid, num_tokens),
        )

    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, D)` of a block as they leave the model: after the final norm, or two with a separate one for
        CLS and registers; as they are if the norm is for the pooled vector."""
        if self.config.pooled_norm:
            return tokens
        if self.cls_norm is None:
            return self.layernorm(tokens)
        prefix, patches = self.layout.prefix_tokens(tokens), self.layout.patch_tokens(tokens)
        return self.layout.with_prefix(self.cls_norm(prefix), self.layernorm(patches))

    def normed_cls(self, tokens: Tensor) -> Tensor:
        """CLS `(B, D)` of the tokens of a block, after the final norm."""
        norm = self.layernorm if self.cls_norm is None else self.cls_norm
        return norm(cast(Tensor, self.layout.cls_token(tokens)))

    def _by_name(self, tokens: Tensor, grid: tuple[int, int] | None, count: int | None = None) -> dict[str, Any]:
        """The fields of the output that are views of the tokens `(B, N, D)` of the last layer, or of its first few."""
        if count is not None:
            registers = self.layout.register_tokens(tokens) if count > self.layout.num_cls else None
            return {"cls_token": self.layout.cls_token(tokens), "register_tokens": registers}
        return {
            "last_hidden_state": tokens,
            "cls_token": self.layout.cls_token(tokens),
            "register_tokens": self.layout.register_tokens(tokens),
            "patch_tokens": self.layout.patch_tokens(tokens),
            "patch_map": None if grid is None else self.layout.patch_map(tokens, grid),
        }

    def _num_tokens_read(self, token_mask: Tensor | None) -> int | None:
        """How many tokens, which are the first, the last layer has to be computed for; None for all.

        Register neurons read all of them, and the masks of some backends are not cut to a part of the queries.
        """
        masks = token_mask is None or self.config._attn_implementation in ("eager", "sdpa")
        last = cast(ViTRegLayer, self.layers[-1])
        return self.layout.num_pooled(self.config.pooling) if masks and last.mlp.register_neurons is None else None

    def _images_at_once(self, pixel_values: Tensor) -> int | None:
        """How many images of a batch are better computed at once than all, where that makes no difference but in time
        and memory: on a CPU, without gradients, for outputs that are small, unseen by hooks. None for all."""
        divides = pixel_values.device.type == "cpu" and pixel_values.ndim == 4 and not self._is_seen()
        if not divides or self._num_tokens_read(None) is None:
            return None
        batch_size, _, height, width = pixel_values.shape
        num_tokens = self.layout.num_tokens(height, width)
        element = self.embeddings.patch_embeddings.projection.weight.element_size()
        at_once = in_cache(batch_size, num_tokens, cast(int, self.config.intermediate_size) * element)
        return at_once if at_once < batch_size else None

    def _is_seen(self) -> bool:
        """Whether somebody learns how often a block ran: gradients, random draws, a compiler or a hook."""
        alone = not (self.training or torch.is_grad_enabled() or is_tracing())
        return not alone or are_all_watched() or is_watched_inside(self)

    @capture_outputs(tie_last_hidden_states=False)
    def _run_layers(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        rotations: tuple[Rotation, ...],
        num_tokens: int | None,
        output_attentions: bool,
        output_hidden_states: bool,  # read by the decorator
        output_prefix_attentions: set[int],
        **kwargs: Any,
    ) -> BaseModelOutput:
        attention_mask = None
        if token_mask is not None:  # else flex attention would get a mask that masks nothing
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask
            )
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                attention_mask,
                token_mask=token_mask,
                rotations=rotations,
                output_attentions=output_attentions,
                output_prefix_attentions=index in output_prefix_attentions,
                num_queries=num_tokens if index == last else None,
                **kwargs,
            )
        return BaseModelOutput(last_hidden_state=cast(torch.FloatTensor, hidden_states))

    def _pooled(self, tokens: Tensor, patch_mask: Tensor | None) -> Tensor:
        """One vector per image, `(B, D)`: the mean of patches if the pooling is `mean`, else CLS."""
        if self.config.pooling == "mean":
            pooled = mean_of_patches(self.layout.patch_tokens(tokens), patch_mask)
        else:
            pooled = cast(Tensor, self.layout.cls_token(tokens))
        return self.layernorm(pooled) if self.config.pooled_norm else pooled

    def _or_config(self, name: str, value: Any) -> Any:
        return getattr(self.config, name) if value is None else value

    def _prefix_layers(self, asked: LayerSelection | None) -> set[int]:
        """Indices of the layers whose prefix attention is wanted."""
        asked = self._or_config("output_prefix_attentions", asked)
        layers = selected(asked, len(self.layers), "output_prefix_attentions")
        if layers and self.layout.num_prefix == 0:
            raise ValueError("Expected a model with CLS or registers for output_prefix_attentions, got neither")
        return layers

    def _read(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that something reads; those that nothing reads are refused, unless they are None."""
        unread = kwargs.keys() - TransformersKwargs.__annotations__.keys()
        for name in unread:
            if kwargs[name] is not None:
                hint = ": positions always adapt to the image" if name == "interpolate_pos_encoding" else ""
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}{hint}")
        return {name: value for name, value in kwargs.items() if name not in unread}

    def get_intermediate_layers(
        self,
        pixel_values: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens of some layers, with the semantics of DINOv2's method of this name.

        Args:
            pixel_values: `(B, C, H, W)`.
            n: the last `n` layers, or the indices of layers (0 is the first block).
            reshape: return maps `(B, D, rows, columns)` rather than sequences `(B, P, D)`.
            return_class_token: return pairs of patches and CLS `(B, D)`.
            norm: apply the final norm to each.

        Returns:
            One tensor, or one pair, per layer, in layer order.

        Raises:
            ValueError: if a layer does not exist, or CLS is asked of a model without.
        """
        count = len(self.layers)
        wanted = sorted(n) if isinstance(n, Sequence) else list(range(count - operator.index(n), count))
        if not wanted or not all(0 <= layer < count for layer in wanted):
            raise ValueError(f"Expected n to be 1 to {count} or layers of 0 to {count - 1}, got {n}")
        if return_class_token and not self.layout.num_cls:
            raise ValueError("Expected a model with a CLS token for return_class_token=True, got one without")
        if reshape:
            self._check_map("on maps of intermediate layers")
        outputs = self(pixel_values, output_hidden_states=True, return_dict=True)
        states = [outputs.hidden_states[layer + 1] for layer in wanted]
        states = [self.normed(state) for state in states] if norm else states
        if reshape:
            patches = [self.layout.patch_map(s, tuple(outputs.patch_map.shape[-2:])) for s in states]
        else:
            patches = [self.layout.patch_tokens(s) for s in states]
        if not return_class_token:
            return tuple(patches)
        return tuple((patch, cast(Tensor, self.layout.cls_token(s))) for patch, s in zip(patches, states, strict=True))


def _rotations(embedded: Sequence[Embedded]) -> tuple[Rotation, ...]:
    """What rotary positions do to the tokens of each group; empty with a position table."""
    return tuple(group.rotation for group in embedded if group.rotation is not None)


def mean_of_patches(patches: Tensor, patch_mask: Tensor | None) -> Tensor:
    """Mean over patches, `(B, P, D)` to `(B, D)`, leaving out those that `patch_mask` `(B, P)` marks as padding."""
    if patch_mask is None:
        return patches.mean(dim=1)
    weights = patch_mask[..., None].float()
    return ((patches * weights).sum(dim=1) / weights.sum(dim=1)).to(patches.dtype)


# Heads


class ViTRegForImageClassification(PackedClassifierMixin, ViTRegPreTrainedModel):
    """Linear classifier (one label, several labels, or regression, as Transformers decides) on pooled tokens."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vitreg = ViTRegModel(config)
        width, labels = config.classifier_input_size, config.num_labels
        self.classifier = nn.Linear(width, labels) if labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        **kwargs: Unpack[ViTRegKwargs],
    ) -> ViTRegImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values, pixel_mask: as in `ViTRegModel.forward`. Or a list of images `(C, H, W)` of many sizes, which
                are classified together without padding (see `ViTRegModel.forward_packed`); attention and states are
                not recorded then, and of the tokens there are CLS and registers.
            labels: class indices `(B,)`, or one number per label `(B, labels)` for several labels or for regression.

        Returns:
            `ViTRegImageClassifierOutput` with `logits` `(B, labels)`.
        """
        if isinstance(pixel_values, list | tuple):
            return self._classify_packed(pixel_values, labels, pixel_mask, **kwargs)
        classify = self._classify if self.config.num_classifier_layers == 1 else self._classify_by_layers
        return classify(cast(Tensor | None, pixel_values), labels, pixel_mask, **kwargs)

    def _classify(
        self, pixel_values: Tensor | None, labels: Tensor | None, pixel_mask: Tensor | None, **kwargs: Any
    ) -> ViTRegImageClassifierOutput:
        outputs = self.vitreg(pixel_values, pixel_mask=pixel_mask, return_dict=True, **kwargs)
        logits = self.classifier(self._classifier_input(outputs))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ViTRegImageClassifierOutput(loss=loss, logits=logits, **passed_on(outputs))

    # The same with hidden states, which the caller gets only if it asked for them.
    _classify_by_layers = filter_output_hidden_states(_classify)

    def _classifier_input(self, outputs: ViTRegModelOutput) -> Tensor:
        if self.config.pooling == "cls_mean":
            second = mean_of_patches(cast(Tensor, outputs.patch_tokens), outputs.patch_mask)
            earlier = (outputs.hidden_states or ())[-self.config.num_classifier_layers : -1]
            cls_tokens = [*map(self.vitreg.normed_cls, earlier), cast(Tensor, outputs.cls_token)]
            return torch.cat([*cls_tokens, second], dim=-1)
        if self.config.pooling == "cls_register_mean":
            second = cast(Tensor, outputs.register_tokens).mean(dim=1)
        else:
            return cast(Tensor, outputs.pooler_output)
        return torch.cat([cast(Tensor, outputs.cls_token), second], dim=-1)


class ViTRegForMaskedImageModeling(ViTRegPreTrainedModel):
    """Predicts the pixels of masked patches with one linear layer, as SimMIM does (Xie et al., arXiv 2111.09886)."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__(config)
        self.vitreg = ViTRegModel(config, use_mask_token=True)
        patch_height, patch_width = config.patch_height_width
        self.decoder = nn.Conv2d(config.hidden_size, config.num_channels * patch_height * patch_width, kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        **kwargs: Unpack[ViTRegKwargs],
    ) -> ViTRegMaskedImageModelingOutput:
        """Reconstruct images.

        Args:
            pixel_values, pixel_mask: as in `ViTRegModel.forward`.
            bool_masked_pos: `(B, P)`, True where a patch is masked; left out, nothing is and there is no loss.

        Returns:
            `ViTRegMaskedImageModelingOutput` with `reconstruction` `(B, C, H, W)` and the mean absolute error of
            masked values as `loss`.
        """
        self._check_map("masked image modeling")
        kwargs["output_tokens"] = True  # all of them are read
        outputs = self.vitreg(pixel_values, bool_masked_pos, pixel_mask, return_dict=True, **kwargs)
        images, layout = cast(Tensor, pixel_values), self.vitreg.layout
        height, width = images.shape[-2:]  # without what pad_to_patch_size added
        reconstruction = layout.pixels(self.decoder(outputs.patch_map))[..., :height, :width]
        loss = None
        if bool_masked_pos is not None:
            grid = cast(tuple[int, int], tuple(outputs.patch_map.shape[-2:]))
            masked = layout.pixel_mask_of(bool_masked_pos.bool(), grid)[:, :height, :width]
            masked = masked if pixel_mask is None else masked & pixel_mask.bool()
            error = (images.float() - reconstruction.float()).abs() * masked[:, None]  # a sum overflows half precision
            loss = error.sum() / (masked.sum() * images.shape[1]).clamp(min=1)
        return ViTRegMaskedImageModelingOutput(loss=loss, reconstruction=reconstruction, **passed_on(outputs))


class ViTRegForSemanticSegmentation(ViTRegPreTrainedModel):
    """One linear layer on patch tokens, optionally behind BatchNorm: the linear segmentation evaluation of DINOv2."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__(config)
        self.vitreg = ViTRegModel(config)
        with_norm = config.segmentation_batch_norm
        self.batch_norm = nn.BatchNorm2d(config.hidden_size) if with_norm else nn.Identity()
        self.decode_head = nn.Conv2d(config.hidden_size, cast(int, config.num_labels), kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        **kwargs: Unpack[ViTRegKwargs],
    ) -> ViTRegSemanticSegmenterOutput:
        """Segment images.

        Args:
            pixel_values, pixel_mask: as in `ViTRegModel.forward`.
            labels: class of every pixel, `(B, H, W)`; `semantic_loss_ignore_index` marks pixels without one.

        Returns:
            `ViTRegSemanticSegmenterOutput`. By Transformers' convention `logits` `(B, labels, rows, columns)` have the
            resolution of the patch grid; the loss and the processor's `post_process_semantic_segmentation` upsample
            them. With `pad_to_patch_size` they have that of the image, `(B, labels, H, W)`: only here is it known what
            was padded.
        """
        self._check_map("semantic segmentation")
        kwargs["output_tokens"] = True  # all of them are read
        outputs = self.vitreg(pixel_values, pixel_mask=pixel_mask, return_dict=True, **kwargs)
        logits = self.decode_head(self._normed(outputs))
        if self.config.pad_to_patch_size:
            logits = self._without_padding(logits, *cast(Tensor, pixel_values).shape[-2:])
        loss = None if labels is None else self._loss(logits, labels)
        return ViTRegSemanticSegmenterOutput(loss=loss, logits=logits, **passed_on(outputs))

    def _normed(self, outputs: ViTRegModelOutput) -> Tensor:
        """The patch map after BatchNorm, whose statistics in training are those of real patches alone."""
        patch_map, patch_mask = cast(Tensor, outputs.patch_map), outputs.patch_mask
        if patch_mask is None or not self.training:
            return self.batch_norm(patch_map)
        on_grid = patch_mask.unflatten(1, patch_map.shape[-2:])
        real = patch_map.movedim(1, -1)[on_grid]  # (real patches, D)
        normed = torch.zeros_like(patch_map.movedim(1, -1))
        normed[on_grid] = self.batch_norm(real.T[None, :, :, None])[0, :, :, 0].T
        return normed.movedim(-1, 1)

    def _without_padding(self, logits: Tensor, height: int, width: int) -> Tensor:
        missing_rows, missing_columns = self.vitreg.layout.missing_pixels(height, width)
        padded = (height + missing_rows, width + missing_columns)
        return F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
            raise ValueError(f"Expected labels of shape ({logits.shape[0]}, height, width), got {tuple(labels.shape)}")
        upsampled = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        counted = labels != self.config.semantic_loss_ignore_index
        if self.config.num_labels != 1:
            losses = F.cross_entropy(upsampled, labels.long().where(counted, 0), reduction="none")
        else:
            losses = F.binary_cross_entropy_with_logits(upsampled[:, 0], labels.to(upsampled.dtype), reduction="none")
        return losses.where(counted, 0).sum() / counted.sum().clamp(min=1)


class ViTRegBackbone(BackboneMixin, ViTRegModel):
    """Feature maps of chosen stages (`out_features`, `out_indices`), for frameworks such as UperNet."""

    def __init__(self, config: ViTRegConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Unpack[ViTRegKwargs]
    ) -> ViTRegBackboneOutput:
        """Extract feature maps.

        Args:
            pixel_values, pixel_mask: as in `ViTRegModel.forward`.

        Returns:
            `ViTRegBackboneOutput` with one `feature_maps` entry per stage: `(B, D, rows, columns)`, or all tokens
            `(B, N, D)` with `reshape_hidden_states=False`; after the final norm with `apply_layernorm=True`.
        """
        if self.config.reshape_hidden_states:
            self._check_map("with maps of a backbone")
        kwargs["output_tokens"] = True  # all of them are read
        outputs = ViTRegModel.forward(self, pixel_values, pixel_mask=pixel_mask, return_dict=True, **kwargs)
        states = [state for stage, state in zip(self.stage_names, outputs.hidden_states) if stage in self.out_features]
        states = [self.normed(state) for state in states] if self.config.apply_layernorm else states
        if self.config.reshape_hidden_states:
            grid = tuple(outputs.patch_map.shape[-2:])
            states = [self.layout.patch_map(state, grid) for state in states]
        return ViTRegBackboneOutput(feature_maps=tuple(states), **passed_on(outputs))


# Which class each Auto class finds. It stands here, not in the registration, because the files of this folder also
# travel beside weights as remote code, where the map has to name all of them.
AUTO_MODELS: dict[str, type[ViTRegPreTrainedModel]] = {
    "AutoModel": ViTRegModel,
    "AutoModelForImageClassification": ViTRegForImageClassification,
    "AutoModelForMaskedImageModeling": ViTRegForMaskedImageModeling,
    "AutoModelForSemanticSegmentation": ViTRegForSemanticSegmentation,
    "AutoBackbone": ViTRegBackbone,
}


def remote_code_map() -> dict[str, str]:
    """Auto class -> `file.Class`, for every Auto class that a saved model of the family can be loaded with."""
    classes: dict[str, type] = {"AutoConfig": ViTRegConfig, **AUTO_MODELS}
    return {auto: f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}" for auto, cls in classes.items()}


__all__ = [
    "AUTO_MODELS",
    "ViTRegBackbone",
    "ViTRegForImageClassification",
    "ViTRegForMaskedImageModeling",
    "ViTRegForSemanticSegmentation",
    "ViTRegModel",
    "ViTRegPreTrainedModel",
]
