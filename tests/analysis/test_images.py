"""Image files: found, decoded upright, split by class, and brought to a model's size."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BaseImageProcessor, BatchFeature, CLIPImageProcessor, ViTImageProcessor

from vitreg_hf import ViTRegImageProcessor
from vitreg_hf.analysis.images import (
    as_seen,
    export_dataset,
    find_images,
    image_batches,
    labelled_split,
    open_upright,
    preprocess,
)


def picture(size=(32, 24), mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def write(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(folder / name)
    return folder


def processor(**options):
    return ViTRegImageProcessor(
        **{"size": 32, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], **options}
    )


# Found


def test_images_are_found_below_the_folder_in_order(tmp_path):
    write(tmp_path, "b.png", "a.JPG", "deep/er/c.webp")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    assert found.names() == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert len(found) == 3
    assert (found.labels, found.class_names) == (None, ())


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path / ".cache", "a.png")
    write(tmp_path, "b.png", ".c.png", ".thumbnails/d.png", "e/.f/g.png")
    assert find_images(tmp_path).names() == ["b.png"]
    assert find_images(tmp_path / ".cache").names() == ["a.png"]  # hidden above the root does not matter


def test_one_file_is_a_set_of_one(tmp_path):
    assert find_images(write(tmp_path, "a.png", "b.png") / "a.png").names() == ["a.png"]


def test_folders_are_classes(tmp_path):
    found = find_images(write(tmp_path, "dog/1.png", "cat/1.png", "dog/2.png", "cat/deep/2.png"))
    assert found.class_names == ("cat", "dog")
    assert dict(zip(found.names(), found.labels)) == {
        "cat/1.png": 0, "cat/deep/2.png": 0, "dog/1.png": 1, "dog/2.png": 1,
    }  # fmt: skip


@pytest.mark.parametrize("names", [("dog/1.png", "dog/2.png"), ("dog/1.png", "cat/1.png", "loose.png")])
def test_one_folder_or_loose_files_are_no_classes(tmp_path, names):
    assert find_images(write(tmp_path, *names)).labels is None


def test_the_first_images_are_spread_evenly(tmp_path):
    found = find_images(write(tmp_path, *[f"{'ab'[n // 5]}/{n}.png" for n in range(10)]))
    some = found.first(4)
    assert some.names() == ["a/0.png", "a/3.png", "b/6.png", "b/9.png"]
    assert some.labels == (0, 0, 1, 1)
    assert found.first(None) == found.first(10) == found.first(99) == found
    assert found.first(1).names() == ["a/0.png"]


def test_a_folder_that_is_missing_or_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="got none with an ending that Pillow reads"):
        find_images(tmp_path)


# Decoded


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_images_are_turned_as_their_exif_data_says(tmp_path, orientation, turned):
    image, exif = picture(), PIL.Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(np.asarray(image), turned)  # counter-clockwise
    np.testing.assert_array_equal(np.asarray(open_upright(tmp_path / "a.png")), expected)


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("CMYK", "jpg")]
)
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    image = picture(mode=mode)
    image.save(tmp_path / f"a.{ending}")
    opened = open_upright(tmp_path / f"a.{ending}")
    assert (opened.mode, opened.size) == ("RGB", (32, 24))
    if ending == "png":
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))
    else:
        assert np.asarray(opened).std() > 10


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage):
    write(tmp_path, "good.png", "bad.png")
    content = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes({"cut": content[: len(content) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"readable image, got '.*bad\.png'"):
        open_upright(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"bad\.png"):
        list(image_batches(find_images(tmp_path).files, processor(), 2))


# Brought to a size


def test_batches_hold_every_image_in_order(tmp_path):
    files = find_images(write(tmp_path, *[f"{n}.png" for n in range(5)])).files
    batches = list(image_batches(files, processor(), 2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)]
    for number, pixels in enumerate(torch.cat(batches)):
        torch.testing.assert_close(pixels, preprocess([open_upright(files[number])], processor())[0])


def test_several_sizes_are_refused():
    by_edge = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"to one size, got 32 x \d+, \d+ x 32: give an image size"):
        preprocess([picture((64, 32)), picture((32, 64))], by_edge)
    assert preprocess([picture((64, 32)), picture((32, 64))], by_edge, 48).shape == (2, 3, 48, 48)


class Padding(BaseImageProcessor):
    """Pads half of every image."""

    def __call__(self, image, return_tensors):
        mask = torch.ones(1, 32, 32)
        mask[:, :, 16:] = 0
        return BatchFeature({"pixel_values": torch.zeros(1, 3, 32, 32), "pixel_mask": mask})


def test_padding_is_refused():
    with pytest.raises(ValueError, match="without padding, got a pixel mask with some"):
        preprocess([picture()], Padding())


@pytest.mark.parametrize(
    "one",
    [
        processor(),
        processor(size={"shortest_edge": 40}, crop_size=32),
        ViTImageProcessor(size={"height": 32, "width": 32}),
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ],
    ids=["square", "cropped", "ViT", "CLIP"],
)
def test_an_image_size_takes_the_place_of_the_processors_own(one):
    images = [picture((64, 48)), picture((40, 90))]
    assert preprocess(images, one).shape == (2, 3, 32, 32)
    larger = preprocess(images, one, 48)
    assert (larger.shape, larger.dtype) == ((2, 3, 48, 48), torch.float32)


def test_a_processor_without_a_size_cannot_be_given_one():
    with pytest.raises(ValueError, match="whose size can be set, got function"):
        preprocess([picture()], lambda image, **options: None, 48)


@pytest.mark.parametrize(
    "one", [processor(), CLIPImageProcessor(do_resize=False, do_center_crop=False)], ids=["ViTReg", "CLIP"]
)
def test_normalisation_is_undone_within_one_grey_level(one):
    image = picture((32, 32))
    seen = as_seen(preprocess([image], one), one)
    assert (seen.shape, seen.dtype) == ((1, 32, 32, 3), np.uint8)
    assert np.abs(seen[0].astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_unknown_normalisation_is_stretched_per_image():
    pixels = torch.stack([torch.linspace(-3, 5, 3 * 4).view(3, 2, 2), torch.full((3, 2, 2), 7.0)])
    seen = as_seen(pixels, object())
    assert (seen[0].min(), seen[0].max(), seen[1].max()) == (0, 255, 0)


# Classes


def classes(folder, dogs, cats, start=""):
    names = [f"{start}dog/{n}.png" for n in range(dogs)] + [f"{start}cat/{n}.png" for n in range(cats)]
    return write(folder, *names)


def test_70_percent_of_each_class_are_for_training_and_none_is_in_both(tmp_path):
    images, labels, training = labelled_split(find_images(classes(tmp_path, 20, 10)))
    assert labels.tolist() == list(images.labels)
    assert [int(training[labels == label].sum()) for label in (0, 1)] == [7, 14]  # cats, dogs
    names = np.array(images.names())
    assert set(names[training]).isdisjoint(names[~training])
    assert len(names) == len(set(names)) == 30
    again, other = labelled_split(images)[2], labelled_split(images, seed=1)[2]
    assert torch.equal(training, again)
    assert not torch.equal(training, other)


def test_a_class_of_one_image_is_for_training(tmp_path):
    _, labels, training = labelled_split(find_images(classes(tmp_path, 1, 5)))
    assert training[labels == 1].tolist() == [True]


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_a_given_split_is_kept(tmp_path, test):
    classes(tmp_path, 3, 2, "train/")
    classes(tmp_path, 1, 1, f"{test}/")
    images, labels, training = labelled_split(find_images(tmp_path))
    assert images.class_names == ("cat", "dog")
    assert [name.split("/")[0] for name in images.names()] == ["train"] * 5 + [test] * 2
    assert training.tolist() == [True] * 5 + [False] * 2
    assert [images.class_names[label] for label in labels] == [name.split("/")[1] for name in images.names()]


def test_labels_of_a_given_test_folder_follow_names_and_not_places(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/b/1.png", "test/c/1.png")
    _, labels, training = labelled_split(find_images(tmp_path))
    assert labels[~training].tolist() == [1, 2]


def test_other_classes_in_test_are_refused(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png", "test/z/1.png")
    with pytest.raises(ValueError, match="same folders of classes in train and test"):
        labelled_split(find_images(tmp_path))


def test_images_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one folder per class"):
        labelled_split(find_images(write(tmp_path, "a.png", "b.png")))


# Datasets


@pytest.fixture
def parquet(tmp_path):
    """Folder with a dataset of 4 images in a parquet file, whose labels have names."""
    datasets = pytest.importorskip("datasets")
    label, grade = datasets.ClassLabel(names=["cat", "big/dog"]), datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label, "grade": grade})
    rows = {"image": [picture(seed=n) for n in range(4)], "label": [0, 1, 1, 0], "grade": [3, 3, 4, 5]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


def test_a_dataset_becomes_one_folder_per_class(tmp_path, parquet):
    assert export_dataset(str(parquet), tmp_path / "out", "train") == 4
    found = find_images(tmp_path / "out")
    assert found.names() == ["big_dog/0000001.png", "big_dog/0000002.png", "cat/0000000.png", "cat/0000003.png"]
    np.testing.assert_array_equal(np.asarray(open_upright(found.files[1])), np.asarray(picture(seed=2)))


def test_columns_and_number_can_be_chosen(tmp_path, parquet):
    assert export_dataset(str(parquet), tmp_path / "out", "train", label_column="grade", at_most=3) == 3
    assert find_images(tmp_path / "out").names() == ["3/0000000.png", "3/0000001.png", "4/0000002.png"]


def test_a_folder_of_images_is_a_dataset(tmp_path):
    pytest.importorskip("datasets")
    classes(tmp_path / "in", 2, 1)
    assert export_dataset(str(tmp_path / "in"), tmp_path / "out", "train") == 3
    assert find_images(tmp_path / "out").class_names == ("cat", "dog")


def test_missing_columns_and_full_folders_are_refused(tmp_path, parquet):
    with pytest.raises(ValueError, match=r"columns kind in the dataset .*, got image, label, grade"):
        export_dataset(str(parquet), tmp_path / "out", "train", label_column="kind")
    write(tmp_path / "full", "a.png")
    with pytest.raises(ValueError, match="empty folder"):
        export_dataset(str(parquet), tmp_path / "full", "train")
