# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the ViTReg family: every field, its default, and what follows from the fields."""

from typing import Any, ClassVar, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_arguments import CheckedArguments
from .configuration_checks import (
    COORDINATE_AUGMENTATIONS,
    check_counts,
    check_dtype,
    check_labels,
    check_stages,
    check_switch,
    check_values,
    pair,
)


@strict
class ViTRegConfig(BackboneConfigMixin, CheckedArguments):
    r"""Configuration of a Vision Transformer with register tokens (Darcet et al., arXiv 2309.16588).

    Field names are those of Transformers' ViT where it has them. A wrong type raises the error of strict dataclasses;
    a wrong value, a combination that cannot be built, or a misspelt field in a call raises `ValueError`.

    Args:
        hidden_size (`int`, defaults to 768): width of the residual stream.
        num_hidden_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, *optional*): attention heads per block. Left out, one per 64 channels, or as close
            below that as divides the width.
        intermediate_size (`int`, *optional*): width between the two MLP projections. Left out, four times the width.
        hidden_act (`str`, defaults to `"gelu"`): activation of the MLP; SwiGLU has its own, SiLU.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, defaults to 0.0): dropout on embeddings and on both
            branches' outputs; on attention probabilities.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights and positions.
        token_initializer_range (`float`, defaults to 0.02): standard deviation of the initial CLS and register tokens.
            Must be positive: registers that start equal get equal gradients and train as copies of one.
        layer_norm_eps (`float`, defaults to 1e-6): epsilon of every LayerNorm.
        image_size (`int` or pair, defaults to 224): height and width in pixels that the position table is made for.
            Any other size works at run time.
        patch_size (`int` or pair, defaults to 16): height and width of a patch in pixels.
        num_channels (`int`, defaults to 3): image channels.
        num_register_tokens (`int`, defaults to 4): learned registers; 0 is a plain ViT.
        use_cls_token (`bool`, defaults to `True`): whether there is a CLS token.
        use_mask_token (`bool`, defaults to `False`): whether the embeddings hold a mask token. The head for masked
            image modeling makes one whatever this says.
        pooling (`str`, defaults to `"cls"`): what the classifier reads: `"cls"`, `"mean"` (of patches), `"cls_mean"`
            (both, twice as wide) or `"cls_register_mean"` (CLS and the mean of the registers, twice as wide).
        qkv_bias (`bool`, defaults to `True`): bias on queries, keys and values, unless one of the next three differs.
        query_bias, key_bias, value_bias (`bool`, *optional*): bias of a single projection.
        proj_bias (`bool`, defaults to `True`): bias of the attention output projection.
        mlp_bias (`bool`, defaults to `True`): bias of the MLP projections.
        head_dim (`int`, *optional*): channels per head. Left out, `hidden_size / num_attention_heads`.
        use_swiglu_ffn (`bool`, defaults to `False`): SwiGLU in place of the MLP, `intermediate_size` wide inside.
        layerscale_value (`float`, *optional*): initial value of LayerScale; `None` turns LayerScale off.
        drop_path_rate (`float`, defaults to 0.0): stochastic depth rate (of the last block if the schedule is linear).
        drop_path_schedule (`str`, defaults to `"linear"`): `"linear"` from 0 over depth, or `"uniform"`.
        drop_path_kind (`str`, defaults to `"mask"`): `"mask"` computes every branch and drops it per sample;
            `"subset"`, as in DINOv2, computes it for `max(int(batch * (1 - rate)), 1)` random samples alone, which
            saves about `rate` of the work of a training step. But it rounds the rate up: 0.1 drops a quarter of a
            batch of 4, and a single image is never dropped. So the default is `"mask"`, which is right at any batch
            size, and what configs saved without this field mean. Where attention is recorded, and for padded batches
            with `flex_attention`, `"subset"` drops as `"mask"` does.
        patch_dropout_rate (`float`, defaults to 0.0): share of the patches of each image that training leaves out,
            after positions are added; CLS and registers always stay. There is no `patch_map` then, and heads that read
            it refuse to train.
        pad_to_patch_size (`bool`, defaults to `False`): pad images whose size the patch size does not divide, with
            zeros on the right and at the bottom. Off, such images are refused.
        position_interpolation_mode (`str`, defaults to `"bicubic"`): `"bicubic"` or `"bilinear"`.
        position_interpolation_antialias (`bool`, defaults to `True`): as in the released DINOv2 models with registers.
        position_interpolation_offset (`float`, defaults to 0.0): 0 scales by size; DINOv2 without registers scales by
            the factor `(grid + 0.1) / table grid`, which is 0.1 here.
        output_prefix_attentions (`bool` or list of `int`, defaults to `False`): return what CLS and registers attend
            to, for all layers or for those listed.
        apply_layernorm (`bool`, defaults to `True`): final LayerNorm on the feature maps of the backbone.
        reshape_hidden_states (`bool`, defaults to `True`): backbone features as maps rather than token sequences.
        segmentation_batch_norm (`bool`, defaults to `False`): BatchNorm before the segmentation classifier, as in the
            linear evaluation of DINOv2.
        semantic_loss_ignore_index (`int`, defaults to 255): label that the segmentation loss leaves out.
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"`, a table that is added to the tokens, or
            `"rotary"`: every block rotates the queries and keys of patches by angles of their place, as in DINOv3.
            Then there is no table, and what is said of one below has no effect.
        cls_position_embedding (`bool`, defaults to `True`): whether the table has an entry for CLS; DeiT-III has none.
        register_position_embeddings (`bool`, defaults to `False`): whether it has one per register, as in Virchow2.
        rope_theta (`float`, defaults to 100.0): base of the wavelengths of rotary positions.
        rope_coordinates (`str`, defaults to `"centered"`): `"centered"` has patch centres from -1 to 1 whatever the
            size, and angles of `2 pi` times that (DINOv3); `"grid"` counts patches of `image_size`, whose grid other
            sizes are stretched to (timm, EVA).
        pos_embed_shift, pos_embed_jitter, pos_embed_rescale (`float`, *optional*): augmentation of rotary coordinates
            in training, drawn once per pass: shift by up to so much per axis, scale by up to this factor or its
            inverse per axis, or both axes alike. `None` turns each off.
        patch_bias (`bool`, defaults to `True`): bias of the projection of patches; CLIP has none.
        embedding_norm (`bool`, defaults to `False`): LayerNorm on all tokens before the first block, as in CLIP.
        final_norm (`bool`, defaults to `True`): LayerNorm after the last block; C-RADIO in timm has none.
        pooled_norm (`bool`, defaults to `False`): the final LayerNorm acts on the pooled vector, of pooling `"cls"`
            (CLIP) or `"mean"` (timm), and tokens leave the model without a norm.
        separate_cls_norm (`bool`, defaults to `False`): CLS and registers have a final LayerNorm of their own.
        qk_norm (`bool`, defaults to `False`): LayerNorm on the queries and keys of each head, before any rotation.
        num_classifier_layers (`int`, defaults to 1): with pooling `"cls_mean"`, the classifier reads CLS of that many
            last blocks and the mean of patches of the last: DINOv2's heads on four layers.
        num_test_time_registers (`int`, defaults to 0): tokens behind the registers that hold nothing but what register
            neurons put there (Jiang et al., arXiv 2506.08010); no parameters. See `add_test_time_registers`.
        register_neurons (`list` of `[layer, neuron]`, *optional*): neurons of the MLP whose activations are moved onto
            the test-time registers, in turn; without such registers they are set to 0.
        test_time_register_init (`str`, defaults to `"zero"`): what these tokens hold at first: `"zero"`, the `"mean"`
            of the image's patches, or fixed `"random"` numbers with their root mean square.
        test_time_register_cls (`str`, defaults to `"zero"`): whether register neurons are 0 on CLS too (the paper), or
            CLS is left to `"keep"` them (the authors' code).
        register_neuron_reduction (`str`, defaults to `"max"`): what a register gets: of each neuron the
            `"max"` over other tokens, or the value of `"largest"` magnitude (for SwiGLU, where it may be negative); or
            the largest of all register neurons of the `"layer"` on all tokens (the authors' code).
        attention_bias_kv (`bool`, defaults to `False`): one more key and value per head and block that every token may
            attend to (Sun et al., arXiv 2402.17762), `bias_k` and `bias_v`.

    Example:

    ```python
    >>> from vitreg_hf import ViTRegConfig, ViTRegModel

    >>> config = ViTRegConfig(hidden_size=384, num_register_tokens=4)
    >>> model = ViTRegModel(config)
    ```"""

    model_type = "vitreg"
    # What Trainer does not gather over an evaluation set, besides the logits that metrics are computed from.
    keys_to_ignore_at_inference = [
        *("hidden_states", "attentions", "cls_token", "register_tokens", "patch_tokens", "patch_map"),
        *("prefix_attentions", "patch_mask"),
    ]
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    token_initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    num_register_tokens: int = 4
    use_cls_token: bool = True
    use_mask_token: bool = False
    pooling: str = "cls"
    qkv_bias: bool = True
    query_bias: bool | None = None
    key_bias: bool | None = None
    value_bias: bool | None = None
    proj_bias: bool = True
    mlp_bias: bool = True
    head_dim: int | None = None
    use_swiglu_ffn: bool = False
    layerscale_value: float | int | None = None
    drop_path_rate: float | int = 0.0
    drop_path_schedule: str = "linear"
    drop_path_kind: str = "mask"
    patch_dropout_rate: float | int = 0.0
    pad_to_patch_size: bool = False
    position_interpolation_mode: str = "bicubic"
    position_interpolation_antialias: bool = True
    position_interpolation_offset: float | int = 0.0
    output_prefix_attentions: bool | int | list[int] | tuple[int, ...] = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    segmentation_batch_norm: bool = False
    semantic_loss_ignore_index: int = 255
    position_embedding_type: str = "learned"
    cls_position_embedding: bool = True
    register_position_embeddings: bool = False
    rope_theta: float | int = 100.0
    rope_coordinates: str = "centered"
    pos_embed_shift: float | int | None = None
    pos_embed_jitter: float | int | None = None
    pos_embed_rescale: float | int | None = None
    patch_bias: bool = True
    embedding_norm: bool = False
    final_norm: bool = True
    pooled_norm: bool = False
    separate_cls_norm: bool = False
    qk_norm: bool = False
    num_classifier_layers: int = 1
    num_test_time_registers: int = 0
    register_neurons: list[list[int]] | None = None
    test_time_register_init: str = "zero"
    test_time_register_cls: str = "zero"
    register_neuron_reduction: str = "max"
    attention_bias_kv: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    # Fields of the base class, declared again: newer versions of Transformers leave their types unchecked.
    architectures: list[str] | None = None
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    id2label: dict[int, str] | dict[str, str] | None = None
    label2id: dict[str, int] | dict[str, str] | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        check_counts(self)
        check_labels(self, kwargs.get("num_labels"))
        check_dtype("dtype", self.dtype)
        check_dtype("torch_dtype", kwargs.get("torch_dtype"))
        if self.num_attention_heads is None:
            self.num_attention_heads = _default_heads(self.hidden_size)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.check_values()
        kwargs.pop("stage_names", None)  # follows from the depth
        stages = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        check_stages(self, *stages)
        self.set_output_features_output_indices(*stages)
        self._plan_optional_modules()
        super().__post_init__(**kwargs)

    def _plan_optional_modules(self) -> None:
        """Plans of this config alone, which Transformers reads off the instance."""
        split = {"layers.*.mlp.gate_proj": "colwise"} if self.use_swiglu_ffn else {}
        # a rank would have to know which register neurons, and which heads' biases, are its own
        whole_parts = ("mlp",) * bool(self.register_neurons) + ("attention",) * self.attention_bias_kv
        if self.qk_norm:  # each rank normalises its own heads, so gradients of the one weight add up
            split |= {f"layers.*.attention.{norm}": "replicated_with_grad_allreduce" for norm in ("q_norm", "k_norm")}
        whole = {"cls_norm": "keep_full_weight"} if self.separate_cls_norm else {}
        plan = {**self.base_model_tp_plan, **split}
        plan = {name: how for name, how in plan.items() if not any(f".{part}." in name for part in whole_parts)}
        self.base_model_tp_plan = plan  # type: ignore[misc]
        self.base_model_fsdp_plan = {**self.base_model_fsdp_plan, **whole}  # type: ignore[misc]

    # What follows from the fields

    @property
    def stage_names(self) -> list[str]:
        """Stages of the backbone: the embeddings and every block."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        height, width = pair(self.patch_size)
        return height, width

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of the position table, in patches."""
        (height, width), (patch_height, patch_width) = pair(self.image_size), self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def num_positions(self) -> int:
        """Entries of the position table: of CLS and registers if they have one, and of patches; 0 with rotary ones."""
        if self.position_embedding_type == "rotary":
            return 0
        rows, columns = self.position_grid
        return self.num_cls_positions + self.num_register_positions + rows * columns

    @property
    def num_cls_positions(self) -> int:
        """1 if there is a CLS token that has an entry in the position table, else 0."""
        return int(self.use_cls_token and self.cls_position_embedding)

    @property
    def num_register_positions(self) -> int:
        """Registers that have an entry in the position table: all or none."""
        return self.num_register_tokens if self.register_position_embeddings else 0

    @property
    def augments_coordinates(self) -> bool:
        """Whether training moves the coordinates of rotary positions at random."""
        return any(getattr(self, name) is not None for name in COORDINATE_AUGMENTATIONS)

    @property
    def num_cls_tokens(self) -> int:
        """1 with a CLS token, else 0."""
        return int(self.use_cls_token)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch: CLS, registers and test-time registers."""
        return self.num_cls_tokens + self.num_register_tokens + self.num_test_time_registers

    @property
    def attention_head_dim(self) -> int:
        """Channels per attention head."""
        return self.head_dim or self.hidden_size // cast(int, self.num_attention_heads)

    @property
    def classifier_input_size(self) -> int:
        """Width of what the classifier reads: the hidden size, times the pooled vectors that are joined."""
        joined = {"cls_mean": self.num_classifier_layers + 1, "cls_register_mean": 2}
        return self.hidden_size * joined.get(self.pooling, 1)

    @property
    def drop_path_rates(self) -> list[float]:
        """Stochastic depth rate of each block, first to last."""
        last = self.num_hidden_layers - 1
        if self.drop_path_schedule == "uniform" or last == 0:
            return [float(self.drop_path_rate)] * self.num_hidden_layers
        return [self.drop_path_rate * i / last for i in range(self.num_hidden_layers)]

    # Attention probabilities come with every backend, so nothing ties `output_attentions` to eager attention.

    @property
    def output_attentions(self) -> bool | None:
        """Whether forward passes return attention probabilities by default."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Transformers refuses `output_attentions` outside eager attention; ViTReg returns them everywhere."""
        check_switch("output_attentions", self.output_attentions)

    # Checks

    def check_values(self) -> None:
        """Refuse values and combinations that cannot be built.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        check_values(self)


def _default_heads(hidden_size: int) -> int:
    """One head per 64 channels, as in every published ViT, or the next smaller number that divides the width."""
    return next((heads for heads in range(hidden_size // 64, 1, -1) if hidden_size % heads == 0), 1)


__all__ = ["ViTRegConfig"]
