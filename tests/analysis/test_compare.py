"""Models side by side: what was planted in one and taken away in others is told of the right model, and no more."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from vitreg_hf import ViTRegConfig, ViTRegModel
from vitreg_hf.analysis import compare_pictures, differences as differences_module, measure as measure_module
from vitreg_hf.analysis.analyze import AnalyzeSettings
from vitreg_hf.analysis.compare import compare, compare_models, lead
from vitreg_hf.analysis.differences import COMPARED, distinct, fewest_images
from vitreg_hf.analysis.extract import subject_of
from vitreg_hf.analysis.figures import canvas
from vitreg_hf.analysis.images import find_images
from vitreg_hf.analysis.measure import Pass, measure_batch
from vitreg_hf.register_neurons.adding import add_attention_bias, add_test_time_registers

from .conftest import GRID, HEADS, HEIGHT, LAYERS, PATCH, WIDTH, planted_model, write_images

IMAGES, WITHOUT = 30, 3  # so many in all, and without any blue patch
NAMES = ["original", "silent", "test-time"]
SETTINGS = AnalyzeSettings(how=Pass(batch_size=IMAGES), pictured=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    generator, masks = np.random.default_rng(3), np.zeros((IMAGES, GRID, GRID), dtype=bool)
    for mask in masks[:-WITHOUT]:
        row, column = generator.integers(0, GRID - 1, 2)
        mask[row : row + 2, column : column + 2] = True
    folder = tmp_path_factory.mktemp("compared") / "images"
    write_images(folder, masks)
    return folder


@pytest.fixture(scope="module")
def models(planted):
    """With artifacts; without; and with a test-time register that gets what wrote them."""
    processor = planted().preprocess
    moved = add_test_time_registers(planted_model(), [(1, 0)])
    made = [planted().model, planted(planted=False).model, moved]
    return [subject_of(model, processor, name, "cpu") for model, name in zip(made, NAMES, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(canvas, "_DOTS_PER_INCH", 40)  # fast
        yield


@pytest.fixture(scope="module")
def report(models, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return compare_models(models, images, folder, SETTINGS), folder


def rows_of(results, name):
    return {row["quantity"]: row for row in results["differences"] if name in row}


# Known answers


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_was_planted_is_missing_in_each_of_the_others(report, name):
    share = 25 * (IMAGES - WITHOUT) / IMAGES  # 4 of 16 patches, in % of the patches of an image
    row = rows_of(report[0], name)["outlier_share"]
    assert row["original"]["mean"] == pytest.approx(share)
    assert row[name]["mean"] == 0
    assert row["difference"]["mean"] == pytest.approx(-share)
    assert row["difference"]["n"] == IMAGES
    assert row["difference"]["high"] < 0
    assert row["differs"]
    assert rows_of(report[0], name)["largest_over_median"]["difference"]["mean"] < -3  # written: up to 60, median 5
    assert HEIGHT == 60


def test_attention_on_registers_is_that_of_the_model_itself(report, models, images):
    pixels = (
        models[0]
        .preprocess([PIL.Image.open(file) for file in sorted(images.iterdir())], return_tensors="pt")
        .pixel_values
    )
    literal = {}
    for subject in models:
        with torch.no_grad():
            last = subject.model(pixels, output_attentions=True).attentions[-1]  # (images, h, N, N)
        registers = last[:, :, 0, 1 : last.shape[-1] - GRID**2]
        literal[subject.name] = 100 * registers.sum(-1).mean(1).numpy()
    assert literal["test-time"][:-WITHOUT].min() > 90 > 20 > literal["silent"].max()
    for name in NAMES[1:]:
        row = rows_of(report[0], name)["mass_on_registers"]
        assert row[name]["mean"] == pytest.approx(literal[name].mean(), rel=1e-4)
        assert row["difference"]["mean"] == pytest.approx((literal[name] - literal["original"]).mean(), rel=1e-4)


def test_what_only_the_first_has_is_no_difference_of_the_others(report):
    for name in NAMES[1:]:
        row = rows_of(report[0], name)["received_by_outliers"]
        assert row["original"]["n"] == IMAGES - WITHOUT
        assert (row[name]["n"], row["difference"]["n"], row["differs"]) == (0, 0, None)


def test_all_comparisons_share_their_errors(report, models, images, tmp_path, monkeypatch):
    asked = []
    real = differences_module.difference_interval
    monkeypatch.setattr(
        differences_module, "difference_interval", lambda a, b, c: asked.append(round(1 - c, 9)) or real(a, b, c)
    )
    two = compare(models[0], models[2], images, tmp_path / "two", SETTINGS)
    assert asked == [0.05 / 5] * len(COMPARED)
    compare_models([*models, models[0]], images, tmp_path / "four", SETTINGS)
    assert set(asked[len(COMPARED) :]) == {round(0.05 / 15, 9)}
    narrow, wide = rows_of(two, "test-time"), rows_of(report[0], "test-time")
    for key in ("outlier_share", "largest_over_median", "mass_on_registers", "first_token_area"):
        assert narrow[key]["test-time"] == wide[key]["test-time"]  # a mean does not know who else is compared
        a, b = narrow[key]["difference"], wide[key]["difference"]
        assert a["mean"] == b["mean"]
        assert b["low"] <= a["low"] < a["high"] <= b["high"]


@pytest.mark.parametrize(("count", "told"), [(24, False), (25, True)])
def test_more_models_take_more_images(models, images, tmp_path, count, told):
    assert [fewest_images(models) for models in (2, 3, 6)] == [20, 25, 40]
    results = compare_models(models, find_images(images).first(count), tmp_path, SETTINGS)
    assert [row["differs"] for row in results["differences"][:2]] == ([True, True] if told else [None, None])
    assert ("Too few images (under 25) have: patches above the model's own cutoff;" in lead(results)) is not told


# What is written


def test_results_of_two_models_are_as_readers_know_them(models, images, tmp_path):
    results = compare(models[0], models[2], images, tmp_path, SETTINGS)
    assert list(results) == ["report", "models", "images", "grids", "differences", "summaries"]
    assert list(results["models"]) == list(results["summaries"]) == ["original", "test-time"]
    keys = ["quantity", "name", "unit", "original", "test-time", "difference", "differs"]
    assert [list(row) for row in results["differences"]] == [keys] * len(COMPARED)
    assert [row["quantity"] for row in results["differences"]] == list(COMPARED)
    assert lead(results).startswith(f"On the same {IMAGES} images, test-time differs from original in: patches above")
    assert {file.name for file in tmp_path.iterdir() if file.is_dir()} == {"records-a", "records-b"}


def test_a_third_model_adds_entries(report):
    results, folder = report
    assert list(results["models"]) == list(results["summaries"]) == NAMES
    assert results["grids"] == [[GRID, GRID]] * 3
    assert [row["quantity"] for row in results["differences"]] == 2 * list(COMPARED)
    assert ["silent" in row for row in results["differences"]] == [True] * 5 + [False] * 5
    assert json.loads((folder / "results.json").read_text())["models"] == results["models"]
    assert {file.name for file in folder.iterdir() if file.is_dir()} == {"records-a", "records-b", "records-c"}


def test_the_finding_has_a_line_per_model(report):
    told = lead(report[0]).split("\n")
    assert told[0] == f"On the same {IMAGES} images, compared with original:"
    share = "patches above the model's own cutoff (-22.5 % of an image's patches);"
    assert told[1].startswith(f"silent differs in: {share}")
    assert told[2].startswith(f"test-time differs in: {share}")
    assert "attention of the first token on registers (+" in told[2]
    assert told[2].endswith("Not in both models: attention that an outlier gets.")


def test_a_copy_among_three_has_no_difference(models, images, tmp_path):
    results = compare_models([models[0], models[1], models[0]], images, tmp_path, SETTINGS)
    assert list(results["models"]) == ["original (first)", "silent", "original (third)"]
    assert lead(results).split("\n")[2] == "original (third): no difference."


def test_the_page_shows_all_models(report):
    folder = report[1]
    page = (folder / "report.html").read_text()
    assert "<h1>original, silent and test-time</h1>" in page
    for name in NAMES[1:]:
        assert f"<th>{name} minus original</th>" in page
    assert page.count("data:image/png") == 6
    pictures = {"differences", "norms", "layers", "channels", "maps", "attention"}
    assert {file.stem for file in folder.glob("*.png")} == pictures


def test_maps_of_all_models_are_on_one_scale(models, images, tmp_path, monkeypatch):
    """A model without CLS and registers has norms, but no token whose attention could be drawn."""
    bare = ViTRegConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, image_size=PATCH * GRID, patch_size=PATCH,
        num_register_tokens=0, use_cls_token=False, pooling="mean",
    )  # fmt: skip
    keys = torch.full((LAYERS, HEADS, WIDTH // HEADS), 0.5)
    biased = subject_of(add_attention_bias(models[2].model, keys, keys), models[0].preprocess, "biased", "cpu")
    patches_alone = subject_of(ViTRegModel(bare), models[0].preprocess, "patches alone", "cpu")
    sheets, real = {}, compare_pictures.maps.map_sheet

    def keep(columns, seen, path, **told):
        sheets[path.stem] = (columns, told)
        real(columns, seen, path, **told)

    monkeypatch.setattr(compare_pictures.maps, "map_sheet", keep)
    results = compare_models([models[0], models[2], biased, patches_alone], images, tmp_path, SETTINGS)
    columns, told = sheets["maps"]
    headings = [f"{name}, up to {one[1].max():.1f}" for name, one in zip(results["models"], columns, strict=True)]
    assert [heading for heading, _, _ in columns] == headings
    assert told["limits"] == (0.0, 5.0)
    assert "5 or more" in told["label"]
    assert columns[0][1].max() > 5 > 2 > columns[1][1].max()
    columns, _ = sheets["attention"]
    headings, on_patches = zip(*(name.rsplit("\n", 1) for name, _, _ in columns), strict=True)
    assert headings == ("CLS, original", "CLS, test-time", "CLS, biased")
    shares = [int(text.split()[0]) for text in on_patches]
    assert shares[0] > 95 > 10 > shares[1]
    even = [one.sum() / len(one) / tokens for (_, one, _), tokens in zip(columns, (19, 20, 19), strict=True)]
    assert [round(100 * share) for share in even] == shares
    assert not {"first_token_area", "mass_on_registers"} & rows_of(results, "patches alone").keys()
    page = (tmp_path / "report.html").read_text()
    assert "not in both" in page


# Going on


def test_an_interruption_in_the_third_model_loses_only_that(models, images, tmp_path, monkeypatch, report):
    run = []

    def stop_at(name):
        def measure(subject, pixels):
            if subject.name == name:
                raise KeyboardInterrupt
            run.append(subject.name)
            return measure_batch(subject, pixels)

        monkeypatch.setattr(measure_module, "measure_batch", measure)

    stop_at("test-time")
    with pytest.raises(KeyboardInterrupt):
        compare_models(models, images, tmp_path, SETTINGS)
    assert run == NAMES[:2]
    stop_at(None)
    compare_models(models, images, tmp_path, SETTINGS)
    assert (tmp_path / "results.json").read_text() == (report[1] / "results.json").read_text()
    assert run == NAMES
    assert compare_models([*models, replace(models[1], name="new")], images, tmp_path, SETTINGS)
    assert run == [*NAMES, "new"]  # a further model takes up what was measured of the others


def test_other_register_neurons_are_another_model(models, images, tmp_path):
    """Weights are the same; what is computed is not."""
    still = add_test_time_registers(planted_model(), [(1, 5)])  # writes nothing
    other = subject_of(still, models[0].preprocess, "test-time", "cpu")
    compare(models[0], models[2], images, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"records of the same weights in .*records-b"):
        compare(models[0], other, images, tmp_path, SETTINGS)


# Names and mistakes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a"], ["a (first)", "a (second)"]),
        (["a", "b", "a"], ["a (first)", "b", "a (third)"]),
        (["a", "a", "a (first)"], ["a (first)", "a (second)", "a (first) (third)"]),
        (["unit", "difference", "b"], ["unit (first)", "difference (second)", "b"]),
        (list("aaaaaa"), [f"a ({n})" for n in ("first", "second", "third", "fourth", "fifth", "sixth")]),
    ],
)
def test_every_model_has_a_name_of_its_own(names, expected):
    assert distinct(names) == expected


@pytest.mark.parametrize("count", [0, 1, 7])
def test_other_numbers_of_models_are_refused_before_any_is_loaded(images, tmp_path, count):
    with pytest.raises(ValueError, match=f"Expected 2 to 6 models to compare, got {count}"):
        compare_models(["/no/such/model"] * count, images, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_six_models_are_drawn(models, images, tmp_path):
    results = compare_models(models * 2, find_images(images).first(4), tmp_path, SETTINGS)
    assert len(results["models"]) == 6
    assert len(results["differences"]) == 5 * len(COMPARED)


def test_models_of_different_images_are_refused():
    seen = ([0, 1], [0, 1], [0, 2])
    some = [SimpleNamespace(records=SimpleNamespace(measured_images=lambda one=one: np.array(one))) for one in seen]
    with pytest.raises(ValueError, match="same readable images for all models"):
        differences_module.differences(some)
