"""What is read of every known family, against what the model itself says."""

import pytest
import torch
import transformers as hf

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from vitreg_hf.analysis.extract import Subject, embedded_patches, normed, read, subject_of
from vitreg_hf.analysis.foreign import TEXT_PATHS, VISION_PATHS, anatomy_of
from vitreg_hf.analysis.recorder import Readers

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}
REGISTERS = ("CLS", "register 1", "register 2", "register 3", "register 4")
EVERYTHING = Readers(
    hidden=lambda layer, tokens: tokens,
    attention=lambda layer, call: call.probabilities(),
    attention_update=lambda layer, update: update,
    ffn_update=lambda layer, update: update,
)


def siglip_text():
    return {**SMALL, "vocab_size": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


FAMILIES = {
    "ViTReg": (lambda: ViTRegModel(ViTRegConfig(**VISION, layerscale_value=0.5)), REGISTERS),
    "ViTReg with head": (lambda: ViTRegForImageClassification(ViTRegConfig(**VISION)), REGISTERS),
    "ViTReg without CLS": (
        lambda: ViTRegModel(ViTRegConfig(**VISION, use_cls_token=False, num_register_tokens=1, pooling="mean")),
        ("register 1",),
    ),
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), ("CLS",)),
    "ViT with head": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), ("CLS",)),
    "DeiT": (lambda: hf.DeiTModel(hf.DeiTConfig(**VISION)), ("CLS", "distillation")),
    "Dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)), ("CLS",)),
    "Dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=4)),
        REGISTERS,
    ),
    "DINOv3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, num_register_tokens=4)), REGISTERS),
    "CLIP vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), ("CLS",)),
    "CLIP": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config={**SMALL, "vocab_size": 20}, vision_config=VISION)),
        ("CLS",),
    ),
    "SigLIP vision": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), ()),
    "SigLIP": (
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=siglip_text(), vision_config=VISION)),
        (),
    ),
}
TIMM = {  # name -> (names of the prefix, side of a patch)
    "vit_tiny_patch16_224": (("CLS",), 16),
    "vit_small_patch14_reg4_dinov2": (REGISTERS, 14),
    "vit_small_patch16_dinov3": (REGISTERS, 16),
    "vit_wee_patch16_reg1_gap_256": (("register 1",), 16),
    "deit3_small_patch16_224": (("CLS",), 16),
    "deit_tiny_distilled_patch16_224": (("CLS", "distillation"), 16),
    "vit_base_patch16_siglip_224": ((), 16),
}
_BERT = {**SMALL, "vocab_size": 20, "type_vocab_size": 1, "max_position_embeddings": 16}
_LLAMA = {**SMALL, "vocab_size": 20, "num_key_value_heads": 2, "max_position_embeddings": 16}
TEXT = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_BERT)),
    "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_BERT)),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**_BERT, embedding_size=32)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=20, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=16)
    ),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=20, n_embd=32, n_layer=3, n_head=4, n_positions=16)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**_LLAMA)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**_LLAMA, head_dim=8)),
    "qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**_LLAMA, head_dim=8)),
}
POST_NORM = {  # where the two norms of a block are
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("attention.output.LayerNorm", "output.LayerNorm")),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
}


ANY_SIZE = ("vitreg", "dinov2", "dinov2_with_registers", "dinov3_vit")  # the others are told to resize positions


def own_outputs(model, pixels):
    """What the model without its head returns when it is asked for everything, with eager attention."""
    tower = anatomy_of(model).backbone
    model.set_attn_implementation("eager")
    resize = {} if tower.config.model_type in ANY_SIZE else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        outputs = tower(pixels, output_attentions=True, output_hidden_states=True, **resize)
    model.set_attn_implementation("sdpa")
    return outputs


def close(actual, expected):
    """Equal within 1e-6 of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))


def assert_updates_add_up(recorded):
    blocks = zip(recorded.hidden, recorded.attention_updates, recorded.ffn_updates, recorded.hidden[1:])
    for before, attention, ffn, after in blocks:
        close(before + attention + ffn, after)


def test_every_family_is_tested():
    assert {anatomy_of(make()).family for make, _ in FAMILIES.values()} == set(VISION_PATHS)
    assert set(TEXT) == set(TEXT_PATHS)


# Vision models of Transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_model_of_transformers(family):
    make, names = FAMILIES[family]
    model, pixels = make().eval(), torch.randn(2, 3, 32, 48)
    subject = subject_of(model, device="cpu")
    outputs, recorded = own_outputs(model, pixels), read(subject, pixels, EVERYTHING)
    assert len(recorded.attention) == len(outputs.attentions) == 3
    for own, ours in zip(outputs.attentions, recorded.attention):
        close(ours, own)
    for own, ours in zip(outputs.hidden_states[:-1], recorded.hidden[:-1], strict=True):
        close(ours, own)
    close(normed(subject, recorded.hidden[-1]), outputs.last_hidden_state)
    assert_updates_add_up(recorded)

    layout = subject.layout
    assert subject.anatomy.prefix_names == names
    assert (layout.num_prefix, layout.num_cls) == (len(names), sum("register" not in name for name in names))
    assert recorded.hidden[0].shape == (2, len(names) + 24, 32)
    assert embedded_patches(subject, recorded, subject.grid(pixels)).shape == (2, 4, 6, 32)


@pytest.mark.parametrize("family", ["ViTReg", "Dinov2", "CLIP vision", "SigLIP vision"])
def test_embedded_patches_are_the_convolution_in_row_major_order(family):
    model, pixels = FAMILIES[family][0]().eval(), torch.randn(1, 3, 16, 24)
    subject = subject_of(model, device="cpu")
    convolution = next(part for part in subject.anatomy.patch_embedding.modules() if isinstance(part, torch.nn.Conv2d))
    embedded = embedded_patches(subject, read(subject, pixels, Readers()), (2, 3))
    for row in range(2):
        for column in range(3):
            patch = pixels[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            expected = (convolution.weight * patch).sum(dim=(1, 2, 3))
            expected = expected if convolution.bias is None else expected + convolution.bias
            torch.testing.assert_close(embedded[0, row, column], expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_and_its_backbone_are_described_alike():
    model = FAMILIES["ViTReg with head"][0]()
    alone, inside = anatomy_of(model.base_model), anatomy_of(model)
    assert alone.backbone is inside.backbone is model.base_model
    assert alone.blocks == inside.blocks
    both = FAMILIES["CLIP"][0]()
    assert anatomy_of(both).backbone is both.vision_model


# timm


def timm_model(name, patch=16):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=2, img_size=(2 * patch, 3 * patch)).eval()
    for block in model.blocks:  # logits of about 1, so that a wrong map shows
        block.attn.qkv.weight.data.normal_(0, block.attn.qkv.in_features**-0.5)
    return model


@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm(name):
    names, patch = TIMM[name]
    model = timm_model(name, patch)
    pixels = torch.randn(2, 3, 2 * patch, 3 * patch)
    subject = subject_of(model, device="cpu")
    recorded = read(subject, pixels, EVERYTHING)
    for own, ours in zip(unfused_attention(model, pixels), recorded.attention, strict=True):
        close(ours, own)
    with torch.no_grad():
        own_states = model.forward_intermediates(pixels, norm=False, output_fmt="NLC", intermediates_only=True)
        own_tokens = model.forward_features(pixels)
    for own, ours in zip(own_states, recorded.hidden[1:], strict=True):
        close(subject.layout.patch_tokens(ours), own)
    close(normed(subject, recorded.hidden[-1]), own_tokens)
    assert_updates_add_up(recorded)

    assert subject.anatomy.prefix_names == names
    assert recorded.hidden[0].shape[1] == len(names) + 6
    embedded = embedded_patches(subject, recorded, (2, 3))
    close(embedded, conv_of(model, pixels))


def conv_of(model, pixels):
    with torch.no_grad():
        return model.patch_embed.proj(pixels).movedim(1, -1)


def unfused_attention(model, pixels):
    """timm's own probabilities, which its slow path hands to dropout."""
    kept, handles = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output)))
    with torch.no_grad():
        model.forward_features(pixels)
    for block, handle in zip(model.blocks, handles):
        block.attn.fused_attn = True
        handle.remove()
    return kept


def test_a_model_of_timm_in_the_wrapper_of_transformers():
    pytest.importorskip("timm")
    arguments = {"depth": 2, "img_size": (32, 48)}
    config = hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, do_pooling=False)
    model, pixels = hf.TimmWrapperModel(config).eval(), torch.randn(1, 3, 32, 48)
    subject = subject_of(model, device="cpu")
    assert (subject.anatomy.family, subject.anatomy.prefix_names) == ("timm", ("CLS",))
    recorded = read(subject, pixels, EVERYTHING)
    for own, ours in zip(unfused_attention(model.timm_model, pixels), recorded.attention, strict=True):
        close(ours, own)
    with torch.no_grad():
        close(normed(subject, recorded.hidden[-1]), model(pixels).last_hidden_state)


@pytest.mark.parametrize("name", ["vit_pwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"])
def test_parallel_blocks_and_differential_attention_are_refused(name):
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="parallel blocks and differential attention have no single attention map"):
        anatomy_of(timm.create_model(name, depth=1, img_size=32))


def test_timm_without_fused_attention_is_refused():
    model = timm_model("vit_tiny_patch16_224")
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match="TIMM_FUSED_ATTN=0: unset it"):
        anatomy_of(model)


def test_a_pooling_head_does_not_add_a_layer():
    recorded = read(subject_of(timm_model("vit_base_patch16_siglip_224")), torch.randn(1, 3, 32, 48), EVERYTHING, True)
    assert len(recorded.attention) == 2


# Text


@pytest.mark.parametrize("family", TEXT)
def test_a_text_model(family):
    model = TEXT[family]().eval()
    subject = subject_of(model, device="cpu")
    inputs = {"input_ids": torch.randint(3, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs["attention_mask"][1, 4:] = 0
    recorded = read(subject, inputs, EVERYTHING)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    for own, ours in zip(outputs.attentions, recorded.attention, strict=True):
        close(ours, own)
    for own, ours in zip(outputs.hidden_states[:-1], recorded.hidden[:-1], strict=True):
        close(ours, own)
    close(normed(subject, recorded.hidden[-1]), outputs.last_hidden_state)
    assert recorded.attention[0][1, :, :, 4:].max() == 0  # padding
    above = recorded.attention[0][0].triu(1).max()
    assert subject.anatomy.causal == bool(above == 0)
    if family in POST_NORM:
        assert_post_norm(subject, recorded, *POST_NORM[family])
    else:
        assert_updates_add_up(recorded)


@torch.no_grad()
def assert_post_norm(subject: Subject, recorded, first: str, second: str):
    for index, block in enumerate(subject.anatomy.blocks):
        middle = block.get_submodule(first)(recorded.hidden[index] + recorded.attention_updates[index])
        after = block.get_submodule(second)(middle + recorded.ffn_updates[index])
        close(after, recorded.hidden[index + 1])


def test_a_text_model_has_no_layout():
    subject = subject_of(TEXT["bert"](), device="cpu")
    assert subject.anatomy.prefix_names == ()
    with pytest.raises(ValueError, match="Expected a vision model, got a text model of the family 'bert'"):
        _ = subject.layout


# Refused


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"known family \(vitreg, .*timm ViTs, bert.*\), got 'resnet'"):
        anatomy_of(hf.ResNetModel(hf.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)))
    with pytest.raises(ValueError, match="got 'Linear'"):
        anatomy_of(torch.nn.Linear(2, 2))


def test_images_that_the_patch_does_not_divide_are_refused():
    subject = subject_of(FAMILIES["ViT"][0]().eval(), device="cpu")
    with pytest.raises(ValueError, match="patch size 8 x 8 divides, got 32 x 36"):
        read(subject, torch.randn(1, 3, 32, 36), Readers())
