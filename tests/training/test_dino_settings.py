# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of self-supervision: defaults, and what is refused before any work."""

import pytest
from transformers import HfArgumentParser

from vitreg_hf.training.dino_settings import DinoSettings


def parsed(*argv: str) -> DinoSettings:
    return HfArgumentParser(DinoSettings).parse_args_into_dataclasses(list(argv))[0]


def test_the_defaults_are_the_digits_demo() -> None:
    settings = parsed()
    assert settings == DinoSettings()
    assert settings.output_dir == "outputs/digits-dino"
    assert settings.horizontal_flip is settings.color_augmentation is False


def test_own_images_are_mirrored_and_coloured_unless_told_otherwise() -> None:
    settings = parsed("--train_dir", "photos/train", "--color_augmentation", "false")
    assert settings.output_dir == "outputs/photos-dino"
    assert settings.horizontal_flip is True
    assert settings.color_augmentation is False


def test_results_say_how_not_what_was_trained() -> None:
    settings = parsed()
    assert settings.hyperparameters()["teacher_momentum"] == settings.teacher_momentum
    assert not {"hidden_size", "train_dir", "output_dir"} & settings.hyperparameters().keys()
    assert settings.model_config().num_register_tokens == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_dir", "a", "--dataset_name", "b"], "one source of images, got dataset_name and train_dir"),
        (["--num_prototypes", "0"], "num_prototypes of 1 or more, got 0"),
        (["--ibot_weight", "-1"], "ibot_weight of 0 or more, got -1.0"),
        (["--teacher_temperature", "0"], "teacher_temperature above 0, got 0.0"),
        (["--teacher_momentum", "1.5"], r"teacher_momentum in \(0, 1\], got 1.5"),
        (["--auto_find_batch_size"], "a chosen batch size, got auto_find_batch_size"),
        (["--optimizer", "lamb"], "the optimizer adamw, got lamb"),
        (["--per_device_train_batch_size", "1"], "2 images per batch or more for koleo_weight, got 1"),
        (["--global_crops_scale", "0.9", "0.5"], "global_crops_scale with 0 < low <= high <= 1"),
        (["--mask_ratio", "0.5", "1"], r"mask_ratio with 0 < low <= high < 1, got \[0.5, 1.0\]"),
        (["--mask_share", "0"], r"mask_share in \(0, 1\], got 0.0"),
        (["--pooling", "mean"], "a model with CLS, got pooling mean"),
        (["--local_crop_size", "20"], r"local_crop_size that patch_size \(8\) divides, got 20"),
    ],
)
def test_settings_that_make_no_sense_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*argv)
