# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint becomes a classifier of other classes, sizes and channels, and nothing of it is random but its head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitreg_hf import (
    ViTRegConfig,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegImageProcessor,
    ViTRegModel,
)
from vitreg_hf.training.batch_size import recompute_activations
from vitreg_hf.training.finetuning import (
    freeze,
    load_classifier,
    load_for_finetuning,
    processor_for,
    resized_positions,
    train_mode,
    with_channels,
)

LETTERS = ["a", "b", "c"]


def small_config(**changes: Any) -> ViTRegConfig:
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    options = {"initializer_range": 0.2, "num_register_tokens": 2, "id2label": dict(enumerate(LETTERS))}
    return ViTRegConfig(**{**shape, **options, **changes})


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, ViTRegForImageClassification]:
    """A checkpoint of three classes, and its model."""
    torch.manual_seed(0)
    model = ViTRegForImageClassification(small_config()).eval()
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier", model


def backbone_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier.")}


class TestLabels:
    def test_other_classes_get_a_new_head_and_all_else_stays(self, classifier):
        source, old = classifier
        model = load_for_finetuning(source, ["x", "y", "z"])
        assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
        assert model.config.label2id == {"x": 0, "y": 1, "z": 2}
        torch.testing.assert_close(backbone_of(model), backbone_of(old), rtol=0, atol=0)
        assert not torch.equal(model.classifier.weight, old.classifier.weight)
        assert load_for_finetuning(source, ["x", "y"]).classifier.weight.shape == (2, 16)

    def test_the_head_of_the_same_classes_is_kept(self, classifier):
        source, old = classifier
        torch.testing.assert_close(load_for_finetuning(source, LETTERS).state_dict(), old.state_dict())
        in_another_order = load_for_finetuning(source, LETTERS[::-1])
        assert not torch.equal(in_another_order.classifier.weight, old.classifier.weight)

    def test_another_pooling_wants_another_head(self, classifier):
        assert load_for_finetuning(classifier[0], LETTERS, pooling="cls_mean").classifier.in_features == 32
        same_width = load_for_finetuning(classifier[0], LETTERS, pooling="mean").classifier.weight
        assert not torch.equal(same_width, classifier[1].classifier.weight)

    def test_the_new_head_follows_from_the_seed(self, classifier):
        heads = []
        for _ in range(2):
            torch.manual_seed(3)
            heads.append(load_for_finetuning(classifier[0], ["x", "y"]).classifier.weight)
        assert torch.equal(*heads)

    @pytest.mark.parametrize("names", [[], ["x", "x"]])
    def test_classes_that_cannot_be_told_apart_are_refused(self, names, classifier):
        with pytest.raises(ValueError, match="class names that differ"):
            load_for_finetuning(classifier[0], names)


class TestSources:
    @pytest.mark.parametrize("kind", [ViTRegModel, ViTRegForMaskedImageModeling])
    def test_backbones_and_models_with_other_heads_are_sources(self, kind, tmp_path):
        old = kind(small_config())
        old.save_pretrained(tmp_path)
        model = load_for_finetuning(tmp_path, ["x", "y"])
        assert model.vitreg.embeddings.mask_token is None  # a parameter without gradient would stop DDP
        expected = {name: weight for name, weight in old.base_model.state_dict().items() if "mask_token" not in name}
        torch.testing.assert_close(model.vitreg.state_dict(), expected, rtol=0, atol=0)

    def test_half_precision_is_tuned_in_full(self, tmp_path):
        ViTRegModel(small_config()).to(torch.bfloat16).save_pretrained(tmp_path)
        model = load_for_finetuning(tmp_path, LETTERS)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.dtype in (None, torch.float32)

    def test_other_families_are_refused(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 16}))
        with pytest.raises(ValueError, match="family vitreg, got vit in"):
            load_for_finetuning(tmp_path, LETTERS)

    def test_a_checkpoint_that_lacks_weights_is_refused(self, classifier):
        file = classifier[0] / "model.safetensors"
        weights = load_file(file)
        registers = weights.pop("vitreg.embeddings.register_tokens")
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"every weight of the backbone .* without vitreg.embeddings.register"):
            load_for_finetuning(classifier[0], LETTERS)
        extra = {"vitreg.embeddings.register_tokens": registers, "vitreg.surprise": registers.clone()}
        save_file(weights | extra, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"no other weights .* with vitreg.surprise"):
            load_for_finetuning(classifier[0], LETTERS)

    def test_the_shape_of_a_model_is_not_changed(self, classifier):
        with pytest.raises(ValueError, match="got num_register_tokens"):
            load_for_finetuning(classifier[0], LETTERS, num_register_tokens=4)

    def test_what_only_training_sees_is_changed(self, classifier):
        model = load_for_finetuning(classifier[0], LETTERS, drop_path_rate=0.3, drop_path_schedule="uniform")
        assert model.config.drop_path_rates == [0.3] * 3

    def test_a_head_on_several_layers_is_kept_only_for_what_it_reads(self, tmp_path):
        old = ViTRegForImageClassification(small_config(pooling="cls_mean", num_classifier_layers=2)).eval()
        old.save_pretrained(tmp_path)
        assert torch.equal(load_for_finetuning(tmp_path, LETTERS).classifier.weight, old.classifier.weight)
        for changes, width in [({"pooling": "cls"}, 16), ({"num_classifier_layers": 3}, 64)]:
            model = load_for_finetuning(tmp_path, LETTERS, **changes)
            assert model.classifier.weight.shape == (3, width)


class TestSize:
    @pytest.mark.parametrize("size", [16, 48, 56])
    @pytest.mark.parametrize(
        "rule", [{}, {"position_interpolation_antialias": False, "position_interpolation_offset": 0.1}]
    )
    def test_positions_are_those_of_the_model_at_that_size(self, size, rule, tmp_path):
        old = ViTRegForImageClassification(small_config(**rule)).eval()
        old.save_pretrained(tmp_path)
        model = load_for_finetuning(tmp_path, LETTERS, image_size=size).eval()
        assert model.config.image_size == size
        assert model.vitreg.embeddings.position_embeddings.shape[1] == 1 + (size // 8) ** 2
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, old(images).logits, rtol=1e-5, atol=1e-6)

    def test_the_own_size_keeps_the_table_itself(self, classifier):
        model = classifier[1].vitreg
        assert resized_positions(model, (4, 4)) is model.embeddings.position_embeddings

    @pytest.mark.parametrize(
        "shape",
        [
            {"position_embedding_type": "rotary"},
            {"register_position_embeddings": True},
            {"cls_position_embedding": False, "register_position_embeddings": True},
            {"cls_position_embedding": False, "patch_bias": False, "embedding_norm": True},
        ],
    )
    def test_positions_of_every_kind_go_along(self, shape, tmp_path):
        old = ViTRegForImageClassification(small_config(**shape)).eval()
        old.save_pretrained(tmp_path)
        model, images = load_for_finetuning(tmp_path, LETTERS, image_size=48).eval(), torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, old(images).logits, rtol=1e-5, atol=1e-6)

    def test_rotary_positions_that_count_patches_of_one_size_keep_it(self, tmp_path):
        rotary = {"position_embedding_type": "rotary", "rope_coordinates": "grid"}
        ViTRegModel(small_config(**rotary)).save_pretrained(tmp_path)
        assert load_for_finetuning(tmp_path, LETTERS).config.image_size == 32
        with pytest.raises(ValueError, match=r"Expected the image size of the checkpoint, 32, .* got one of 6 x 6"):
            load_for_finetuning(tmp_path, LETTERS, image_size=48)


class TestChannels:
    @pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6])
    def test_grey_images_look_the_same_in_any_number_of_channels(self, channels, classifier):
        source, old = classifier
        model = load_for_finetuning(source, LETTERS, num_channels=channels).eval()
        grey = torch.randn(2, 1, 32, 32)
        with torch.no_grad():
            new, expected = model(grey.expand(-1, channels, -1, -1)).logits, old(grey.expand(-1, 3, -1, -1)).logits
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-5)

    def test_one_channel_sums_and_more_repeat(self):
        weight = torch.randn(5, 3, 2, 2)
        torch.testing.assert_close(with_channels(weight, 1), weight.sum(1, keepdim=True))
        torch.testing.assert_close(with_channels(weight, 6), torch.cat([weight, weight], dim=1) / 2)
        four = with_channels(weight, 4)
        torch.testing.assert_close(
            four, torch.stack([weight[:, 0] / 2, weight[:, 1], weight[:, 2], weight[:, 0] / 2], 1)
        )
        with pytest.raises(ValueError, match="1 channel or more"):
            with_channels(weight, 0)


class TestProcessor:
    def test_mean_std_and_filter_are_those_of_the_checkpoint(self, tmp_path):
        saved = ViTRegImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3)
        saved.save_pretrained(tmp_path)
        whole = processor_for(tmp_path, small_config(image_size=48), crops=False, eval_crop_ratio=1.0)
        assert (list(whole.image_mean), whole.resample, whole.do_center_crop) == ([0.1, 0.2, 0.3], 3, False)
        assert dict(whole.size) == {"height": 48, "width": 48}
        grey = processor_for(tmp_path, small_config(num_channels=1), crops=True, eval_crop_ratio=0.5)
        assert (list(grey.image_mean), list(grey.image_std)) == ([pytest.approx(0.2)], [pytest.approx(0.5)])
        assert (grey.size["shortest_edge"], grey.crop_size["height"]) == (64, 32)

    def test_without_one_the_defaults_of_the_family_are_taken(self, tmp_path):
        for source in (None, tmp_path):
            processor = processor_for(source, small_config(), crops=False, eval_crop_ratio=1.0)
            assert list(processor.image_mean) == list(ViTRegImageProcessor().image_mean)
            two = processor_for(source, small_config(num_channels=2), crops=False, eval_crop_ratio=1.0)
            assert list(two.image_std) == [0.5, 0.5]


class TestTuning:
    def trained(self, model: torch.nn.Module) -> set[str]:
        return {".".join(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}

    def test_what_is_tuned_is_what_was_asked_for(self, classifier):
        model = classifier[1]
        freeze(model, "linear")
        assert self.trained(model) == {"classifier.weight", "classifier.bias"}
        freeze(model, "partial", 2)
        parts = {"vitreg.layers.1", "vitreg.layers.2", "vitreg.layernorm.weight", "vitreg.layernorm.bias"}
        assert self.trained(model) == parts | {"classifier.weight", "classifier.bias"}
        freeze(model, "full")
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_registers_are_tuned_alone_or_with_the_last_blocks(self, classifier):
        model, head = classifier[1], {"classifier.weight", "classifier.bias"}
        freeze(model, "registers", head_is_new=False)
        assert self.trained(model) == {"vitreg.embeddings.register_tokens"}
        freeze(model, "registers")
        assert self.trained(model) == {"vitreg.embeddings.register_tokens"} | head
        freeze(model, "registers_partial", 1, head_is_new=False)
        top = {"vitreg.layers.2", "vitreg.layernorm.weight", "vitreg.layernorm.bias"}
        assert self.trained(model) == {"vitreg.embeddings.register_tokens"} | top | head

    def test_registers_that_are_not_there_are_not_tuned(self):
        model = ViTRegForImageClassification(small_config(num_register_tokens=0))
        for tuning in ("registers", "registers_partial"):
            with pytest.raises(ValueError, match="model with registers to tune them, got one without: add_registers"):
                freeze(model, tuning, 1)

    def test_a_head_is_new_for_other_classes_or_another_pooling(self, classifier):
        assert not load_classifier(classifier[0], LETTERS).head_is_new
        assert load_classifier(classifier[0], LETTERS[::-1]).head_is_new
        assert load_classifier(classifier[0], LETTERS, pooling="mean").head_is_new

    @pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
    def test_both_final_norms_are_tuned(self, pooling):
        model = ViTRegForImageClassification(small_config(separate_cls_norm=True, pooling=pooling))
        freeze(model, "partial", 1)
        assert {"vitreg.layernorm.weight", "vitreg.cls_norm.weight"} <= self.trained(model)
        model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("layers", [0, 4])
    @pytest.mark.parametrize("tuning", ["partial", "registers_partial"])
    def test_blocks_that_are_not_there_are_not_tuned(self, tuning, layers, classifier):
        with pytest.raises(ValueError, match="num_tuned_layers of 1 to 3"):
            freeze(classifier[1], tuning, layers)

    def test_everything_that_is_tuned_gets_a_gradient(self, classifier):
        """DDP waits for the gradient of every parameter that wants one."""
        model, images = classifier[1], torch.randn(2, 3, 32, 32)
        ways = [("linear", 0), ("partial", 1), ("full", 0), ("registers", 0), ("registers_partial", 1)]
        for tuning, layers in ways:
            model.zero_grad()
            freeze(model, tuning, layers)
            model(images, labels=torch.tensor([0, 1])).loss.backward()
            assert {n for n, p in model.named_parameters() if p.grad is not None} == {
                n for n, p in model.named_parameters() if p.requires_grad
            }

    def test_what_is_frozen_computes_as_in_evaluation(self, classifier):
        model = load_for_finetuning(classifier[0], LETTERS, drop_path_rate=0.5, hidden_dropout_prob=0.5)
        images = torch.randn(4, 3, 32, 32)
        freeze(model, "linear")
        train_mode(model, "linear")
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, model(images).logits, rtol=0, atol=0)
            freeze(model, "partial", 1)
            train_mode(model, "partial")
            assert [layer.training for layer in model.vitreg.layers] == [False, False, True]
            first, second = (model(images, output_hidden_states=True).hidden_states for _ in range(2))
            torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)
            assert not torch.equal(first[3], second[3])
        train_mode(model, "full")
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize(("tuning", "layers"), [("registers", 0), ("registers_partial", 1)])
    def test_registers_learn_through_blocks_that_compute_as_in_evaluation(self, tuning, layers, classifier):
        noise = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5, "patch_dropout_rate": 0.5}
        model, images = load_for_finetuning(classifier[0], LETTERS, **noise), torch.randn(4, 3, 32, 32)
        freeze(model, tuning, layers)
        train_mode(model, tuning)
        first, second = (model(images, output_hidden_states=True).hidden_states for _ in range(2))
        torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)
        assert torch.equal(first[3], second[3]) == (tuning == "registers")

    def test_frozen_blocks_recompute_activations_where_gradients_pass(self, classifier):
        model, images = load_for_finetuning(classifier[0], LETTERS), torch.randn(2, 3, 32, 32)
        freeze(model, "registers")
        passes, gradients = [], []
        model.vitreg.layers[0].norm1.register_forward_hook(lambda *_: passes.append(1))
        for recompute in (False, True):
            if recompute:
                recompute_activations(model)
            train_mode(model, "registers")
            model.zero_grad()
            model(images, labels=torch.tensor([0, 1])).loss.backward()
            gradients.append(model.vitreg.embeddings.register_tokens.grad.clone())
        assert len(passes) == 1 + 2
        torch.testing.assert_close(*gradients)
