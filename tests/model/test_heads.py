"""Classification, masked image modeling, segmentation and backbone."""

import pytest
import torch
import torch.nn.functional as F
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)

pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))


class TestClassification:
    CASES = {
        "single_label_classification": (5, torch.tensor([1, 4]), F.cross_entropy),
        "multi_label_classification": (5, torch.eye(5)[:2], F.binary_cross_entropy_with_logits),
        "regression": (1, torch.tensor([0.3, -1.0]), lambda logits, y: F.mse_loss(logits[:, 0], y)),
    }

    @pytest.mark.parametrize("problem", CASES)
    @pytest.mark.parametrize("named", [True, False])
    def test_loss_of_each_kind_of_problem(self, make_config, problem, named):
        labels, targets, expected = self.CASES[problem]
        model = ViTRegForImageClassification(
            make_config(num_labels=labels, problem_type=problem if named else None)
        ).eval()
        outputs = model(pixels, labels=targets)
        torch.testing.assert_close(outputs.loss, expected(outputs.logits, targets))
        assert model.config.problem_type == problem

    def test_labels_are_kept_in_the_config(self, make_config, tmp_path):
        names = {0: "cat", 1: "dog"}
        config = make_config(num_labels=2)
        config.id2label, config.label2id = names, {v: k for k, v in names.items()}
        ViTRegForImageClassification(config).save_pretrained(tmp_path)
        assert ViTRegForImageClassification.from_pretrained(tmp_path).config.id2label == names

    def test_a_model_without_labels_returns_what_it_pools(self, make_config):
        model = ViTRegForImageClassification(make_config(num_labels=0)).eval()
        torch.testing.assert_close(model(pixels).logits, model.vitreg(pixels).pooler_output)


class TestMaskedImageModeling:
    def test_masked_patches_become_the_mask_token_with_their_position(self, make_config):
        model = ViTRegForMaskedImageModeling(make_config()).eval()
        with torch.no_grad():
            model.vitreg.embeddings.mask_token.normal_()
        masked = torch.zeros(2, 15, dtype=torch.bool)
        masked[:, [0, 7]] = True
        noisy = pixels.clone()
        noisy[:, :, :8, :8] += 100.0  # patch 0, which is masked
        first = model(pixels, bool_masked_pos=masked).patch_tokens
        torch.testing.assert_close(first, model(noisy, bool_masked_pos=masked).patch_tokens)
        assert not torch.allclose(first, model(pixels).patch_tokens)
        assert not torch.allclose(first[:, 0], first[:, 7])

    def test_loss_is_the_mean_error_of_masked_pixels(self, make_config):
        model = ViTRegForMaskedImageModeling(make_config()).eval()
        masked = torch.rand(2, 15) > 0.5
        outputs = model(pixels, bool_masked_pos=masked)
        assert outputs.reconstruction.shape == pixels.shape
        errors = (outputs.reconstruction - pixels).abs()
        by_patch = errors.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        torch.testing.assert_close(outputs.loss, by_patch[masked].mean())

    def test_the_loss_of_a_half_precision_model_is_finite(self, make_config):
        model = ViTRegForMaskedImageModeling(make_config()).half()
        images = torch.full((16, 3, 128, 128), 30.0, dtype=torch.float16)
        assert model(images, bool_masked_pos=torch.ones(16, 256, dtype=torch.bool)).loss.isfinite()

    def test_without_a_mask_there_is_no_loss(self, make_config):
        assert ViTRegForMaskedImageModeling(make_config())(pixels).loss is None

    def test_padded_images(self, make_config):
        model = ViTRegForMaskedImageModeling(make_config(pad_to_patch_size=True)).eval()
        outputs = model(torch.randn(1, 3, 37, 45), bool_masked_pos=torch.ones(1, 30, dtype=torch.bool))
        assert outputs.reconstruction.shape == (1, 3, 37, 45)
        assert outputs.loss.isfinite()

    def test_it_learns(self, make_config):
        """Constant images, each of another brightness: masked patches can be told from visible ones."""
        torch.manual_seed(1)
        model = ViTRegForMaskedImageModeling(make_config(initializer_range=0.1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(120):
            images = torch.randn(16, 3, 1, 1).expand(-1, -1, 32, 32)
            loss = model(images, bool_masked_pos=torch.rand(16, 16) > 0.5).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    def test_the_token_is_there_whatever_the_config_says(self, make_config):
        model = ViTRegForMaskedImageModeling(make_config(use_mask_token=False))
        assert model.vitreg.embeddings.mask_token is not None
        assert ViTRegModel(model.config).embeddings.mask_token is None
        assert ViTRegModel(make_config(use_mask_token=True)).embeddings.mask_token is not None


class TestSegmentation:
    def test_logits_have_the_resolution_of_patches_and_the_loss_that_of_labels(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config()).eval()
        labels = torch.randint(0, 5, (2, 40, 24))
        labels[:, :7] = 255
        outputs = model(pixels, labels=labels)
        assert outputs.logits.shape == (2, 5, 5, 3)
        upsampled = F.interpolate(outputs.logits, size=(40, 24), mode="bilinear", align_corners=False)
        counted = labels != 255
        expected = F.cross_entropy(upsampled.permute(0, 2, 3, 1)[counted], labels[counted])
        torch.testing.assert_close(outputs.loss, expected)

    def test_another_ignored_label(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config(semantic_loss_ignore_index=0)).eval()
        labels = torch.randint(1, 5, (2, 40, 24))
        with_ignored = torch.cat([labels[:, :20], torch.zeros_like(labels[:, 20:])], dim=1)
        assert model(pixels, labels=with_ignored).loss != model(pixels, labels=labels).loss

    def test_one_label_is_a_binary_mask(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config(num_labels=1)).eval()
        labels = torch.randint(0, 2, (2, 40, 24))
        labels[:, 30:] = 255
        outputs = model(pixels, labels=labels)
        upsampled = F.interpolate(outputs.logits, size=(40, 24), mode="bilinear", align_corners=False)[:, 0]
        counted = labels != 255
        expected = F.binary_cross_entropy_with_logits(upsampled[counted], labels[counted].float())
        torch.testing.assert_close(outputs.loss, expected)

    def test_it_is_linear_on_normed_patches_with_batch_norm_if_asked(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config(segmentation_batch_norm=True)).train()
        outputs = model(pixels)
        patch_map = outputs.patch_map
        mean, variance = patch_map.mean((0, 2, 3), True), patch_map.var((0, 2, 3), unbiased=False, keepdim=True)
        expected = model.decode_head((patch_map - mean) / (variance + 1e-5).sqrt())
        torch.testing.assert_close(outputs.logits, expected, atol=1e-4, rtol=1e-4)
        assert not any("batch_norm" in n for n, _ in ViTRegForSemanticSegmentation(make_config()).named_parameters())

    def test_batch_norm_counts_real_patches_alone(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config(segmentation_batch_norm=True)).train()
        image, padded, mask = torch.randn(1, 3, 32, 16), torch.zeros(1, 3, 32, 64), torch.zeros(1, 32, 64)
        padded[..., :16], mask[..., :16] = image, 1
        alone = model(image).logits
        statistics = model.batch_norm.running_mean.clone()
        model.batch_norm.reset_running_stats()
        together = model(padded, pixel_mask=mask).logits
        torch.testing.assert_close(together[..., :2], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.batch_norm.running_mean, statistics, atol=1e-5, rtol=1e-5)
        together.sum().backward()
        assert model.vitreg.embeddings.register_tokens.grad.isfinite().all()

    @pytest.mark.parametrize("labels", [1, 5])
    def test_a_batch_without_a_counted_label_costs_nothing(self, make_config, labels):
        model = ViTRegForSemanticSegmentation(make_config(num_labels=labels)).eval()
        assert model(pixels, labels=torch.full((2, 40, 24), 255)).loss == 0

    def test_labels_of_any_integer_type(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config()).eval()
        labels = torch.randint(0, 5, (2, 40, 24))
        assert model(pixels, labels=labels.int()).loss == model(pixels, labels=labels).loss

    def test_padding_is_cut_off(self, make_config):
        model = ViTRegForSemanticSegmentation(make_config(pad_to_patch_size=True)).eval()
        labels = torch.randint(0, 5, (1, 37, 45))
        outputs = model(torch.randn(1, 3, 37, 45), labels=labels)
        assert outputs.logits.shape == (1, 5, 37, 45)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))

    def test_labels_of_another_shape_are_refused(self, make_config):
        with pytest.raises(ValueError, match=r"Expected labels of shape \(2, height, width\), got \(2, 5\)"):
            ViTRegForSemanticSegmentation(make_config())(pixels, labels=torch.zeros(2, 5, dtype=torch.long))


class TestBackbone:
    def test_stages_are_hidden_states_as_maps(self, make_config):
        backbone = ViTRegBackbone(make_config(out_features=["stem", "stage2", "stage3"])).eval()
        outputs = backbone(pixels, output_hidden_states=True)
        assert [m.shape for m in outputs.feature_maps] == [(2, 32, 5, 3)] * 3
        for feature_map, index in zip(outputs.feature_maps, [0, 2, 3], strict=True):
            normed = backbone.layernorm(outputs.hidden_states[index])
            torch.testing.assert_close(feature_map, backbone.layout.patch_map(normed, (5, 3)))
        assert backbone.channels == [32, 32, 32]

    def test_without_norm_or_as_sequences(self, make_config):
        config = make_config(out_indices=[1], apply_layernorm=False, reshape_hidden_states=False)
        outputs = ViTRegBackbone(config).eval()(pixels, output_hidden_states=True)
        assert torch.equal(outputs.feature_maps[0], outputs.hidden_states[1])

    def test_stages_follow_another_depth(self, make_config, tmp_path):
        ViTRegBackbone(make_config()).save_pretrained(tmp_path)
        shallow = ViTRegBackbone.from_pretrained(tmp_path, num_hidden_layers=2).eval()
        assert shallow.out_features == ["stage2"]
        assert len(shallow(pixels).feature_maps) == 1
        chosen = ViTRegBackbone.from_pretrained(tmp_path, num_hidden_layers=2, out_indices=[1]).eval()
        assert chosen.out_features == ["stage1"]
        config = make_config(out_features=["stage3"])
        config.num_hidden_layers = 2
        with pytest.raises(ValueError, match="out_features must be a subset"):
            ViTRegBackbone(config)

    def test_hidden_states_only_when_asked(self, make_config):
        assert ViTRegBackbone(make_config()).eval()(pixels).hidden_states is None

    def test_works_inside_upernet_and_trains(self, make_config):
        backbone_config = make_config(num_hidden_layers=4, out_indices=[1, 2, 3, 4], image_size=64)
        config = UperNetConfig(
            backbone_config=backbone_config,
            hidden_size=16,
            auxiliary_channels=8,
            auxiliary_in_channels=32,
            num_labels=4,
        )
        model = UperNetForSemanticSegmentation(config)
        images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
        outputs = model(images, labels=labels)
        assert outputs.logits.shape == (2, 4, 64, 64)
        outputs.loss.backward()
        assert model.backbone.embeddings.register_tokens.grad.abs().sum() > 0
