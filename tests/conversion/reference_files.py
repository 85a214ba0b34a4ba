"""State dicts laid out as the reference implementations of DINOv2 and DINOv3 save them, of models of Transformers.

Written out from the names in facebookresearch/dinov2 and facebookresearch/dinov3; no table of the package is used.
"""

import torch
import transformers as hf

SIZES = ((56, 56), (98, 98), (42, 84))  # the table's own, a larger one, one that is not square
SIZES_OF_16 = ((64, 64), (112, 112), (48, 96))
_SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}  # 64 channels per head, as published


def dinov2_source(registers=4, **fields):
    """A DINOv2 of Transformers with random weights, small, with patches of 14 pixels."""
    fields = {**_SMALL, "image_size": 56, "patch_size": 14, **fields}
    if registers:
        config = hf.Dinov2WithRegistersConfig(num_register_tokens=registers, **fields)
        return hf.Dinov2WithRegistersModel(config).eval()
    return hf.Dinov2Model(hf.Dinov2Config(**fields)).eval()


def dinov3_source(registers=4, **fields):
    """A DINOv3 of Transformers with random weights, small, with patches of 16 pixels."""
    fields = {**_SMALL, "image_size": 64, "patch_size": 16, "intermediate_size": 192, **fields}
    if fields.get("use_gated_mlp"):
        fields["hidden_act"] = "silu"
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=registers, **fields)).eval()


def dinov2_file(source):
    """The state dict of DINOv2's `DinoVisionTransformer` with the weights of a model of Transformers."""
    weights = source.state_dict()
    file = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
        "mask_token": weights["embeddings.mask_token"],
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    if "embeddings.register_tokens" in weights:
        file["register_tokens"] = weights["embeddings.register_tokens"]
    for index in range(source.config.num_hidden_layers):
        old, new = f"encoder.layer.{index}", f"blocks.{index}"
        _add_block(file, weights, old, new)
        for ending in ("weight", "bias"):
            names = [f"{old}.attention.{name}_proj.{ending}" for name in "qkv"]
            file[f"{new}.attn.qkv.{ending}"] = torch.cat([weights[name] for name in names])
            if source.config.use_swiglu_ffn:
                names = [f"{old}.mlp.{name}_proj.{ending}" for name in ("gate", "up")]
                file[f"{new}.mlp.w12.{ending}"] = torch.cat([weights[name] for name in names])
                file[f"{new}.mlp.w3.{ending}"] = weights[f"{old}.mlp.down_proj.{ending}"]
            else:
                file[f"{new}.mlp.fc1.{ending}"] = weights[f"{old}.mlp.fc1.{ending}"]
                file[f"{new}.mlp.fc2.{ending}"] = weights[f"{old}.mlp.fc2.{ending}"]
    return file


def dinov3_file(source):
    """The state dict of DINOv3's `DinoVisionTransformer`; the bias of keys is random, and masked."""
    weights, config = source.state_dict(), source.config
    width = config.hidden_size
    count = width // config.num_attention_heads // 4
    file = {
        "cls_token": weights["embeddings.cls_token"],
        "mask_token": weights["embeddings.mask_token"][0],
        "rope_embed.periods": torch.tensor([config.rope_theta ** (index / count) for index in range(count)]),
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.bias"],
        "norm.weight": weights["norm.weight"],
        "norm.bias": weights["norm.bias"],
    }
    if config.num_register_tokens:
        file["storage_tokens"] = weights["embeddings.register_tokens"]
    for index in range(config.num_hidden_layers):
        old, new = f"model.layer.{index}", f"blocks.{index}"
        _add_block(file, weights, old, new)
        file[f"{new}.attn.qkv.weight"] = torch.cat([weights[f"{old}.attention.{name}_proj.weight"] for name in "qkv"])
        if config.query_bias:
            queries, values = (weights[f"{old}.attention.{name}_proj.bias"] for name in "qv")
            file[f"{new}.attn.qkv.bias"] = torch.cat([queries, torch.randn(width), values])
            file[f"{new}.attn.qkv.bias_mask"] = torch.ones(3 * width)
            file[f"{new}.attn.qkv.bias_mask"][width : 2 * width] = 0
        names = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
        if not config.use_gated_mlp:
            names = {"fc1": "up_proj", "fc2": "down_proj"}
        for theirs, ours in names.items():
            for ending in ("weight", "bias"):
                file[f"{new}.mlp.{theirs}.{ending}"] = weights[f"{old}.mlp.{ours}.{ending}"]
    return file


def _add_block(file, weights, old, new):
    """What blocks of both have under the same names."""
    for ending in ("weight", "bias"):
        file[f"{new}.norm1.{ending}"] = weights[f"{old}.norm1.{ending}"]
        file[f"{new}.norm2.{ending}"] = weights[f"{old}.norm2.{ending}"]
        file[f"{new}.attn.proj.{ending}"] = weights[f"{old}.attention.o_proj.{ending}"]
    for number in (1, 2):
        file[f"{new}.ls{number}.gamma"] = weights[f"{old}.layer_scale{number}.lambda1"]


def tokens_of(source):
    """What a model of Transformers says of images, by the names of the comparison."""
    registers = getattr(source.config, "num_register_tokens", 0)

    def run(pixels):
        out = source(pixels, output_hidden_states=True)
        tokens = out.last_hidden_state
        return {
            "hidden_states": out.hidden_states,
            "last_hidden_state": tokens,
            "cls": tokens[:, 0],
            "registers": tokens[:, 1 : 1 + registers] if registers else None,
            "patches": tokens[:, 1 + registers :],
        }

    return run
