"""Images of many sizes in one pass without padding: equal to one image at a time, for outputs and gradients."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from vitreg_hf.model.packing import Packing
from vitreg_hf.model.token_layout import TokenLayout

SIZES = [(32, 32), (16, 40), (8, 8), (32, 32), (40, 16), (32, 32), (16, 40)]  # 16, 10, 1 patches of 8 x 8
VARIANTS = {
    "plain": {},
    "no registers": {"num_register_tokens": 0},
    "no CLS": {"use_cls_token": False, "pooling": "mean"},
    "LayerScale and SwiGLU": {"layerscale_value": 0.3, "use_swiglu_ffn": True},
    "heads of their own size": {"num_attention_heads": 3, "head_dim": 16, "qkv_bias": False},
    "rotary": {"position_embedding_type": "rotary", "qk_norm": True},
    "norms": {"separate_cls_norm": True, "embedding_norm": True},
    "pooled norm": {"pooled_norm": True, "pooling": "mean"},
    "no norm": {"final_norm": False, "num_hidden_layers": 1},
    "one more key": {"attention_bias_kv": True},
    "test-time registers": {
        **{"num_test_time_registers": 2, "register_neurons": [[0, 3], [1, 5], [1, 7]]},
        "test_time_register_init": "mean",
    },
    "any size": {"pad_to_patch_size": True, "patch_size": 12, "image_size": 36},
    "eager": {"attn_implementation": "eager"},
}


def images_of(sizes=SIZES):
    return [torch.randn(3, *size) for size in sizes]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same_gradients(found, expected):
    assert max(gradient.abs().max() for gradient in expected.values() if gradient is not None) > 0.01
    for name, gradient in expected.items():
        close(found[name], gradient)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_equal_to_one_image_at_a_time(make_config, fields):
    model, images = ViTRegModel(make_config(**fields)).train(), images_of()
    together, alone = model.forward_packed(images), [model(image[None]) for image in images]
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        for value, expected in zip(one.to_tuple(), other.to_tuple(), strict=True):
            close(value, expected)
    weights = [torch.randn_like(output.last_hidden_state) for output in alone]
    losses = [
        sum((output.last_hidden_state * weight).mean() for output, weight in zip(outputs, weights, strict=True))
        for outputs in (together, alone)
    ]
    same_gradients(*(gradients(model, loss) for loss in losses))


POOLINGS = [
    *({"pooling": pooling} for pooling in ("cls", "mean", "cls_mean", "cls_register_mean")),
    {"pooling": "cls_mean", "num_classifier_layers": 2, "separate_cls_norm": True},
    {"pooled_norm": True},
]


@pytest.mark.parametrize("output_tokens", [None, False])
@pytest.mark.parametrize("fields", POOLINGS, ids=str)
def test_logits_and_loss_are_those_of_one_image_at_a_time(make_config, fields, output_tokens):
    model, images = ViTRegForImageClassification(make_config(**fields)).train(), images_of()
    labels = torch.arange(len(images)) % 5
    together = model(pixel_values=images, labels=labels, output_tokens=output_tokens)
    alone = [model(image[None], labels=label[None]) for image, label in zip(images, labels, strict=True)]
    close(together.logits, torch.cat([output.logits for output in alone]))
    mean = torch.stack([output.loss for output in alone]).mean()
    close(together.loss, mean)
    close(together.cls_token, torch.cat([output.cls_token for output in alone]))
    if together.register_tokens is not None:
        close(together.register_tokens, torch.cat([output.register_tokens for output in alone]))
    same_gradients(gradients(model, together.loss), gradients(model, mean))


@torch.no_grad()
def test_only_what_the_pooling_reads_is_computed(make_config):
    model, images, seen = ViTRegModel(make_config()).eval(), images_of(), []
    model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    whole = model.forward_packed(images)
    alone = model.forward_packed(images, output_tokens=False)
    assert seen == [sum(output.last_hidden_state.shape[1] for output in whole), len(images)]
    for one, other in zip(alone, whole, strict=True):
        close(one.pooler_output, other.pooler_output)
        assert one.last_hidden_state is one.patch_tokens is None


@torch.no_grad()
def test_masks_beside_none(make_config):
    model, images = ViTRegModel(make_config(use_mask_token=True)).eval(), images_of()
    torch.nn.init.normal_(model.embeddings.mask_token)
    masks = [torch.rand(16) < 0.5, None, torch.tensor([True]), None, torch.rand(10) < 0.5, torch.rand(16) < 0.5, None]
    for output, image, mask in zip(model.forward_packed(images, masks), images, masks, strict=True):
        expected = model(image[None], bool_masked_pos=None if mask is None else mask[None])
        close(output.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_images_of_one_size_attend_in_one_call(make_config, monkeypatch):
    model, calls = ViTRegModel(make_config(num_hidden_layers=1)).eval(), []
    attention = model.layers[0].attention
    attend = attention._attend
    monkeypatch.setattr(
        attention, "_attend", lambda query, *a, **k: calls.append(query.shape) or attend(query, *a, **k)
    )
    model.forward_packed(images_of())
    assert [(images, tokens - 5) for images, _, tokens, _ in calls] == [(3, 16), (2, 10), (1, 1), (1, 10)]


class TestFlexAttention:
    @torch.no_grad()
    @pytest.mark.parametrize("output_tokens", [None, False])
    def test_equal_to_sdpa(self, make_config, output_tokens):
        model, images = ViTRegForImageClassification(make_config()).eval(), images_of([*SIZES, (128, 96)])
        expected = model(images).logits
        model.set_attn_implementation("flex_attention")
        close(model(images, output_tokens=output_tokens).logits, expected)

    @pytest.mark.parametrize("count", [None, 5])
    def test_its_mask_is_of_tokens_of_the_same_image(self, count):
        packing = Packing([(3, 50), (1, 7), (2, 290), (1, 128)], torch.device("cpu"))
        queries = packing.first(count)
        mask, _ = packing.kernel_arguments("flex_attention", queries)
        of_keys = torch.tensor([i for i, n in enumerate([50, 50, 50, 7, 290, 290, 128]) for _ in range(n)])
        of_queries = of_keys if count is None else torch.arange(7).repeat_interleave(5)
        expected = of_queries[:, None] == of_keys
        assert torch.equal(create_mask(mask.mask_mod, 1, 1, *expected.shape, device="cpu")[0, 0], expected)
        blocks = mask.to_dense()[0, 0].bool()
        for row, own in enumerate(expected.split(128)):
            shared = [bool(block.any()) for block in own.split(128, dim=1)]
            assert blocks[row].tolist() == shared  # and no more than these are computed


UNIFORM = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "num_hidden_layers": 1}


def block_by_image(layer, states, kept, factor):
    """One image at a time: each branch, scaled up, for those that are kept of it."""
    branches = [
        lambda x: layer.layer_scale1(layer.attention(layer.norm1(x))[0]),
        lambda x: layer.layer_scale2(layer.mlp(layer.norm2(x))),
    ]
    for branch, images in zip(branches, kept, strict=True):
        states = [state + factor * branch(state) if i in images else state for i, state in enumerate(states)]
    return states


@pytest.mark.parametrize("fields", [{}, {"position_embedding_type": "rotary"}], ids=["table", "rotary"])
def test_subsets_are_drawn_from_all_images(make_config, fields):
    """Where each size comes once, subsets of each would drop nothing."""
    config = make_config(drop_path_kind="subset", **UNIFORM, **fields)
    model = ViTRegModel(config).train()
    sizes, seen = [(8, 8 * (i + 1)) for i in range(5)], []
    images = images_of(sizes)
    model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    torch.manual_seed(4)
    kept = [set(torch.randperm(5)[:2].tolist()) for _ in range(2)]
    assert kept[0] != kept[1]
    torch.manual_seed(4)
    together = model.forward_packed(images)
    assert seen == [sum(5 + 1 + image for image in kept[1])]
    alone = []
    for number, image in enumerate(images):
        embedded = model.embeddings(image[None])
        state = embedded.tokens
        layer, rotations = model.layers[0], [] if embedded.rotation is None else [embedded.rotation]
        if number in kept[0]:
            state = state + 2.5 * layer.attention(layer.norm1(state), rotations=rotations)[0]
        if number in kept[1]:
            state = state + 2.5 * layer.mlp(layer.norm2(state))
        alone.append(model.layernorm(state))
    for one, other in zip(together, alone, strict=True):
        close(one.last_hidden_state, other)
    losses = [sum(x.square().mean() for x in xs) for xs in ([o.last_hidden_state for o in together], alone)]
    same_gradients(*(gradients(model, loss) for loss in losses))


@pytest.mark.parametrize("output_tokens", [None, False])
def test_masks_of_stochastic_depth_are_of_whole_images(make_config, output_tokens, monkeypatch):
    """With `output_tokens=False` subsets drop as masks do."""
    kind = "mask" if output_tokens is None else "subset"
    model, images = ViTRegModel(make_config(drop_path_kind=kind, **UNIFORM)).train(), images_of(SIZES[:4])
    kept = iter([torch.tensor([1.0, 0, 1, 0])[:, None], torch.tensor([0.0, 0, 1, 1])[:, None]])
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda tensor, share: tensor.copy_(next(kept)))
    together = model.forward_packed(images, output_tokens=output_tokens)
    states = [model.embeddings(image[None]).tokens for image in images]
    order = [0, 3, 1, 2]  # of the sequence, by size
    kept_by_place = [{order[0], order[2]}, {order[2], order[3]}]
    alone = block_by_image(model.layers[0], states, kept_by_place, 2.0)
    for one, other in zip(together, alone, strict=True):
        close(one.pooler_output, model.layernorm(other)[:, 0])


@pytest.mark.parametrize("kind", ["mask", "subset"])
def test_gradient_checkpointing_repeats_what_was_dropped(make_config, kind):
    fields = {"drop_path_rate": 0.5, "drop_path_schedule": "uniform", "hidden_dropout_prob": 0.1}
    model = ViTRegForImageClassification(make_config(drop_path_kind=kind, **fields)).train()
    images, labels, found = images_of(), torch.arange(7) % 5, []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(1)
        found.append(gradients(model, model(images, labels=labels).loss))
    same_gradients(found[1], found[0])


def test_patch_dropout_of_each_image(make_config, monkeypatch):
    def last(layout, patches, count, mask):
        return torch.arange(patches.shape[1])[-count:].expand(len(patches), -1)

    monkeypatch.setattr(TokenLayout, "random_patches", last)
    model, images = ViTRegModel(make_config(patch_dropout_rate=0.5)).train(), images_of()
    for output, image in zip(model.forward_packed(images), images, strict=True):
        expected = model(image[None])
        close(output.patch_tokens, expected.patch_tokens)
        assert output.patch_map is None


@torch.no_grad()
def test_compiles_for_given_sizes(make_config):
    model, images = ViTRegForImageClassification(make_config(num_hidden_layers=1)).eval(), images_of(SIZES[:4])
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: model(list(given)).logits, fullgraph=True, backend="aot_eager")
    close(compiled(*images), model(images).logits)


# In a training


def test_gradients_under_ddp_are_those_without(make_config):
    model, images = ViTRegForImageClassification(make_config()).train(), images_of()
    labels = torch.arange(7) % 5
    expected = gradients(model, model(images, labels=labels).loss)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        same_gradients(gradients(model, wrapped(pixel_values=images, labels=labels).loss), expected)
    finally:
        torch.distributed.destroy_process_group()


def collate(samples):
    """Labels first: Trainer counts the samples of a batch by its first tensor."""
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"labels": labels, "pixel_values": [sample["pixel_values"] for sample in samples]}


class PackedTrainer(Trainer):
    """Trainer's own count of operations asks a list for `numel`."""

    def floating_point_ops(self, inputs):
        return 0


def test_trainer_takes_lists(make_config, tmp_path):
    model, images = ViTRegForImageClassification(make_config()), images_of()
    data = [{"pixel_values": image, "labels": number % 5} for number, image in enumerate(images)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2},
        **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1},
    )
    trainer = PackedTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float(np.mean(np.argmax(p.predictions, axis=1) == p.label_ids))},
    )
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        labels = torch.arange(7) % 5
        expected = model.eval()(images, labels=labels)
    assert metrics["eval_accuracy"] == pytest.approx((expected.logits.argmax(-1) == labels).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], {}, "Expected images, or groups of images, and a mask or None for each, got 0, 0"),
        ([torch.randn(1, 3, 32, 32)], {}, r"Expected a list of images as tensors .*, got \[\(1, 3, 32, 32\)\]"),
        ([np.zeros((3, 32, 32))], {}, "got .*ndarray"),
        ([torch.randn(3, 32, 32), torch.randn(3, 30, 32)], {}, "got 30 x 32"),
        ([torch.randn(4, 32, 32)], {}, "Expected pixel_values of shape"),
        ([torch.randn(3, 32, 32)], {"pixel_mask": torch.ones(1, 32, 32)}, "Expected no pixel_mask for a list"),
        ([torch.randn(3, 32, 32)], {"output_attentions": True}, r"got a list, \['output_attentions'\]"),
    ],
)
def test_wrong_lists_are_refused(make_config, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        ViTRegForImageClassification(make_config())(images, **arguments)


def test_an_argument_that_nothing_reads_is_refused(make_config):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        ViTRegForImageClassification(make_config())(images_of(), colour="red")


@pytest.mark.parametrize(
    "kind", [ViTRegModel, ViTRegBackbone, ViTRegForMaskedImageModeling, ViTRegForSemanticSegmentation]
)
def test_outputs_of_one_size_want_a_tensor(make_config, kind):
    with pytest.raises(ValueError, match="got list: images of many sizes go through forward_packed"):
        kind(make_config())(images_of())


def test_flex_attention_has_no_backward_on_cpu_and_says_so(make_config):
    model = ViTRegModel(make_config(attn_implementation="flex_attention"))
    with pytest.raises(ValueError, match="Expected a GPU or no gradient for attn_implementation='flex_attention'"):
        model.forward_packed(images_of())
