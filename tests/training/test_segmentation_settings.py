# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
import pytest

from vitreg_hf.training.segmentation_settings import SegmentationSettings as Settings


def test_without_arguments_scenes_of_digits_are_segmented_from_random_weights():
    settings = Settings()
    assert (settings.tuning, settings.chosen_image_size, settings.output_dir) == ("full", 64, "outputs/digit-scenes")
    assert settings.model_config().image_size == 64
    assert settings.horizontal_flip is False


def test_a_model_is_left_as_it_is_unless_told_otherwise():
    assert Settings(init_from="model").tuning == "linear"
    assert Settings(init_from="model", tuning="full").tuning == "full"
    own = Settings(init_from="model", train_dir="photos/train", class_names=["a", "b"])
    assert own.chosen_image_size is None
    assert own.output_dir == "outputs/photos"
    assert own.horizontal_flip is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuning": "linear"}, "init_from with linear tuning"),
        ({"init_from": "m", "hidden_size": 8}, "shape of the model m"),
        ({"train_dir": "a"}, "class_names with own images"),
        ({"class_names": ["a"]}, "class_names with own images"),
        ({"reduce_labels": True}, "reduce_labels with own images"),
        ({"train_dir": "a", "dataset_name": "b", "class_names": ["c"]}, "one source"),
        ({"validation_dir": "a"}, "train_dir with validation_dir"),
        ({"random_scale": [2.0, 1.0]}, "random_scale with 0 < low <= high"),
        ({"max_train_samples": 0}, "max_train_samples of 1 or more"),
        ({"drop_path_rate": 1.0}, "drop_path_rate in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_class_names_are_read_from_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("wall\n\n road \n")
    assert Settings(train_dir="a", class_names=[str(file)]).names_of_classes() == ["wall", "road"]
    with pytest.raises(ValueError, match="wall twice"):
        Settings(train_dir="a", class_names=["wall", "wall"]).names_of_classes()
