# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of a training: defaults, and what is refused before any work."""

import pytest
from transformers import HfArgumentParser

from vitreg_hf.training.classification_settings import (
    DATA_SETTINGS,
    MODEL_SETTINGS,
    TUNING_SETTINGS,
    ImageClassificationSettings,
)
from vitreg_hf.training.settings import FILE_SETTINGS, HUB_SETTINGS


def parsed(*argv: str) -> ImageClassificationSettings:
    return HfArgumentParser(ImageClassificationSettings).parse_args_into_dataclasses(list(argv))[0]


def test_the_defaults_are_the_digits_demo() -> None:
    settings = parsed()
    assert settings == ImageClassificationSettings()
    assert settings.source_name() == "digits"
    assert settings.crop_scale is None
    assert settings.horizontal_flip is False


def test_own_images_are_cropped_and_flipped_unless_told_otherwise() -> None:
    settings = parsed("--train_dir", "photos")
    assert settings.crop_scale == (0.08, 1.0)
    assert settings.horizontal_flip is True
    settings = parsed("--train_dir", "photos", "--random_resized_crop", "false", "--horizontal_flip", "false")
    assert settings.crop_scale is None
    assert settings.horizontal_flip is False


def test_a_bare_switch_turns_augmentation_on() -> None:
    settings = parsed("--horizontal_flip", "--random_resized_crop", "--random_resized_crop_scale", "0.5", "0.9")
    assert settings.horizontal_flip is True
    assert settings.crop_scale == (0.5, 0.9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_dir", "a", "--dataset_name", "b"], "one source of images, got dataset_name and train_dir"),
        (["--validation_dir", "a"], "train_dir with validation_dir, got validation_dir alone"),
        (["--validation_file", "a"], "train_file with validation_file"),
        (["--dataset_config_name", "a"], "dataset_name with dataset_config_name"),
        (["--num_train_epochs", "0"], "num_train_epochs of 1 or more, got 0"),
        (["--early_stopping_patience", "0"], "early_stopping_patience of 1 or more, got 0"),
        (["--weight_decay", "-1"], "weight_decay of 0 or more, got -1.0"),
        (["--warmup_ratio", "1"], r"warmup_ratio in \[0, 1\), got 1.0"),
        (["--learning_rate", "0"], "learning_rate above 0, got 0.0"),
        (["--ema_decay", "1"], r"ema_decay in \(0, 1\), got 1.0"),
        (["--random_resized_crop_scale", "0.9", "0.5"], "low <= high <= 1"),
        (["--random_resized_crop_scale", "0.9"], "low <= high <= 1"),
        (["--seed", "-1"], "seed of 0 or more"),
        (["--save_total_limit", "0"], "save_total_limit of 1 or more, got 0"),
        (["--save_steps", "-1"], "save_steps of 0 or more, got -1"),
        (["--logging_steps", "0"], "logging_steps of 1 or more, got 0"),
        (["--layer_decay", "0"], r"layer_decay in \(0, 1\], got 0.0"),
        (["--loss_spike_factor", "0.5"], "loss_spike_factor of 0 or above 1, got 0.5"),
        (["--warmup_learning_rate", "0.1"], r"warmup_learning_rate of learning_rate \(0.002\) or less, got 0.1"),
        (["--repeated_augmentation", "0"], "repeated_augmentation of 1 or more, got 0"),
        (["--loss", "bce"], "label_smoothing_factor of 0 with the loss bce, got 0.1"),
        (["--num_channels", "1", "--three_augment", "true"], "3 channels for RandAugment, 3-Augment and colour"),
        (["--tuning", "linear"], "init_from with a tuning other than full, got linear of random weights"),
        (["--init_from", "m", "--hidden_size", "8"], "the shape of the model m, got hidden_size with init_from"),
        (["--add_registers", "4"], "init_from with add_registers, got none: num_register_tokens"),
        (["--init_from", "m", "--add_registers", "-1"], "add_registers of 0 or more, got -1"),
        (["--init_from", "m", "--add_registers", "4", "--tuning", "linear"], "that trains registers .* got linear"),
        (["--init_from", "m", "--add_registers", "4", "--tuning", "lora"], "that trains registers .* got lora"),
        (["--train_shards", "a"], "validation_shards with train_shards: a stream holds out no images, got none"),
        (["--validation_shards", "a"], "train_shards with validation_shards, got validation_shards alone"),
        (["--train_shards", "a", "--validation_shards", "b", "--train_dir", "c"], "train_dir and train_shards"),
        (["--streaming"], "dataset_name with streaming, got none"),
        (["--class_names_file", "a"], "streaming or train_shards with class_names_file, got class_names_file alone"),
        (["--dataset_name", "a", "--streaming", "--max_train_samples", "5"], "all images of a stream, got max_train"),
        (["--dataset_name", "a", "--streaming", "--repeated_augmentation", "3"], "of 1 with a stream, got 3"),
        (
            ["--dataset_name", "a", "--streaming", "--check_images"],
            "before the training to check_images, got a stream",
        ),
        (["--max_skipped_share", "2"], r"max_skipped_share in \[0, 1\], got 2.0"),
        (["--hub_revision", "dev"], "push_to_hub with hub_revision, got hub_revision alone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*argv)


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected image_size to be a multiple of patch_size"):
        parsed("--patch_size", "7").model_config()


def test_layerscale_can_be_turned_off() -> None:
    assert parsed().model_config().layerscale_value == 1.0
    assert parsed("--layerscale_value", "0").model_config().layerscale_value is None


@pytest.mark.parametrize("argv", [[], ["--init_from", "model"]])
def test_every_setting_has_one_home_in_the_results(argv: list[str]) -> None:
    settings = parsed(*argv)
    groups = [{*MODEL_SETTINGS}, {*DATA_SETTINGS}, {*FILE_SETTINGS}, {*HUB_SETTINGS}, {*settings.hyperparameters()}]
    if not argv:
        groups.append({*TUNING_SETTINGS})
    assert sum(len(group) for group in groups) == len(set().union(*groups))
    assert set().union(*groups) == set(vars(settings))


def test_what_a_resumed_training_must_share_is_what_it_computes() -> None:
    settings = parsed()
    fixed = settings.fixed(processes=2)
    assert fixed["processes"] == 2
    assert {"learning_rate", "seed", "mixup_alpha", "max_train_samples", "num_train_epochs"} <= fixed.keys()
    free = {
        "output_dir",
        "save_steps",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "logging_steps",
        "report_to",
    }
    assert not free & fixed.keys()
    assert fixed.keys() - {"processes"} <= vars(settings).keys()


def test_workers_of_a_stream_decide_what_comes_when() -> None:
    stream = parsed("--dataset_name", "a", "--streaming", "--dataloader_num_workers", "3").fixed()
    assert (stream["dataloader_num_workers"], stream["shuffle_buffer_size"]) == (3, 1000)
    assert "max_skipped_share" not in stream  # a training that ended there may go on with a higher one


def test_names_of_sources() -> None:
    for shards in ("data/photos/train-{000..146}.tar", "data/photos/train", "data/photos/train/*.parquet"):
        assert parsed("--train_shards", shards, "--validation_shards", "b").source_name() == "photos"
    assert parsed("--train_shards", "data/photos.v2", "--validation_shards", "b").source_name() == "photos.v2"
    assert parsed("--dataset_name", "someone/beans").source_name() == "beans"
    assert parsed("--train_dir", "data/photos.v2/").source_name() == "photos.v2"
    assert parsed("--train_file", "data/photos.parquet").source_name() == "photos"
    assert parsed("--train_dir", "data/photos/train").source_name() == "photos"


def test_the_output_folder_is_named_for_the_data():
    assert parsed().output_dir == "outputs/digits"
    assert parsed("--train_dir", "data/photos/train").output_dir == "outputs/photos"
    assert parsed("--output_dir", "here").output_dir == "here"
