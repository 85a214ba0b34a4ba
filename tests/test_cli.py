"""The command line: its options as a snapshot that is changed on purpose, its errors, and every command run once."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.cli import main, parser

PASS = {"--batch-size", "--image-size", "--on-corrupt-image", "--overwrite"}
RULE = {"--cutoff", "--cutoff-value", "--layer"}
OPTIONS = {
    "analyze": {"model", "images", "--no-probes", "--pictured"} | PASS | RULE,
    "compare": {"models", "images", "--pictured"} | PASS | RULE,
    "probe": {"model", "images", "--draws"} | PASS | RULE,
    "discover": {
        "model",
        "annotations",
        "--overwrite",
        "--split",
        "--no-hard",
        "--coco20k",
        "--no-sweep",
        "--resolution",
    }
    | {"--feature", "--layer", "--normalize", "--bias"},
    "ablate": {"model", "images", "--tokens", "--modes"} | PASS | RULE,
    "sinks": {"model", "--overwrite", "--texts", "--batch-size", "--max-length"},
    "dataset": {"name", "--paper", "--config", "--split", "--image-column", "--label-column", "--at-most"},
    "convert": {
        "source",
        "out",
        "--layout",
        "--revision",
        "--head",
        "--architecture",
        "--heads",
        "--eps",
        "--keep-mask-token",
    }
    | {"--dtype", "--verify", "--to", "--overwrite"},
    "registers": {"model", "images", "out", "--method", "--registers", "--top-k", "--top-layer", "--neurons"}
    | {"--num-images", "--cls", "--init", "--pictured"}
    | PASS
    | RULE,
    "card": {"folder", "--model-id", "--license", "--overwrite"},
    "push": {"folder", "repo_id", "--private", "--revision", "--create-pr", "--tag", "--with-code", "--license"}
    | {"--message"},
}
WITHOUT_OUTPUT = {"card", "push", "convert", "registers"}


def test_commands_and_options():
    commands = parser()._subparsers._group_actions[0].choices
    found = {
        name: {action.option_strings[0] if action.option_strings else action.dest for action in command._actions}
        for name, command in commands.items()
    }
    common = {name: {"-h"} if name in WITHOUT_OUTPUT else {"-h", "--output"} for name in OPTIONS}
    assert found == {name: common[name] | options for name, options in OPTIONS.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A classifier with registers and a backbone of Transformers without, saved with image processors."""
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = ViTRegConfig(**small, num_labels=3, initializer_range=0.2, token_initializer_range=0.5)
    ViTRegForImageClassification(config).save_pretrained(folder / "classifier")
    ViTRegModel(ViTRegConfig(**small, num_register_tokens=0)).save_pretrained(folder / "plain")
    foreign = Dinov2WithRegistersConfig(**small, num_register_tokens=2, initializer_range=0.2)
    Dinov2WithRegistersModel(foreign).save_pretrained(folder / "foreign")
    for name in ("classifier", "plain", "foreign"):
        ViTRegImageProcessor(size=32).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of seven images, each class of a colour."""
    folder, generator = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(7):
            pixels = generator.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            PIL.Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def read(folder):
    page = (folder / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page or "<table>" in page
    assert "http" not in page.split("</style>")[1]  # nothing is fetched
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("model", ["classifier", "plain", "foreign"])
def test_analyze(models, photos, tmp_path, capsys, model):
    output = tmp_path / "report"
    assert main(["analyze", str(models / model), str(photos), "--output", str(output), "--pictured", "2"]) == 0
    results = read(output)
    assert results["images"]["measured"] == 21
    assert results["classification"]["CLS"]["accuracy"] > 0.5  # three colours
    assert results["classification"]["classes"] == 3
    told = capsys.readouterr().out
    assert "Artifacts: " in told
    assert str(output / "report.html") in told
    expected = {"norms", "norm_maps", "layers", "positions", "neighbours", "attention", "heads", "average_attention"}
    expected |= {"heads_of_tokens", "cls_mass", "rollout", "components", "objects", "sinks", "channels"}
    assert {file.stem for file in output.glob("*.png")} == expected


def test_compare_says_no_difference_of_a_model_and_itself(models, photos, tmp_path, capsys):
    same = str(models / "classifier")
    assert main(["compare", same, same, str(photos), "--output", str(tmp_path)]) == 0
    results = read(tmp_path)
    assert not any(row["differs"] for row in results["differences"])
    assert ": no difference." in capsys.readouterr().out


def test_compare_tells_what_differs(models, photos, tmp_path, capsys):
    command = ["compare", str(models / "classifier"), str(models / "plain"), str(photos), "--output", str(tmp_path)]
    assert main([*command, "--cutoff", "percentile", "--cutoff-value", "90"]) == 0
    rows = {row["quantity"]: row for row in read(tmp_path)["differences"]}
    assert rows["mass_on_registers"]["plain"]["n"] == 0  # it has none
    assert rows["mass_on_registers"]["differs"] is None
    assert rows["first_token_area"]["differs"]
    told = capsys.readouterr().out
    assert "plain differs from classifier in: " in told
    assert "Not in both models: attention of the first token on registers" in told


def test_compare_takes_several_models(models, photos, tmp_path, capsys):
    three = [str(models / name) for name in ("plain", "classifier", "foreign")]
    assert main(["compare", *three, str(photos), "--output", str(tmp_path), "--pictured", "1"]) == 0
    assert list(read(tmp_path)["models"]) == ["plain", "classifier", "foreign"]
    told = capsys.readouterr().out
    assert "On the same 21 images, compared with plain:\nclassifier" in told
    assert "\nforeign" in told


def test_an_interrupted_comparison_says_that_it_goes_on(models, photos, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitreg_hf.analysis.measure.measure_batch", interrupt)
    plain = str(models / "plain")
    assert main(["compare", plain, plain, str(photos), "--output", str(tmp_path)]) == 130
    assert "what was measured is kept, the same command goes on" in capsys.readouterr().err


def test_probe(models, photos, tmp_path, capsys):
    command = ["probe", str(models / "classifier"), str(photos), "--output", str(tmp_path), "--draws", "2"]
    assert main([*command, "--cutoff", "percentile", "--cutoff-value", "80"]) == 0
    row = read(tmp_path)["sets"]["photos"]
    for kind in ("CLS", "normal", "outlier", "register"):
        assert row[kind]["accuracy"] > 0.5
        assert len(row[kind]["accuracies"]) == (1 if kind == "CLS" else 2)
    assert "photos: CLS " in capsys.readouterr().out


@pytest.mark.parametrize("tokens", ["registers", "outliers", "sink"])
def test_ablate(models, photos, tmp_path, tokens, capsys):
    command = ["ablate", str(models / "classifier"), str(photos), "--output", str(tmp_path), "--tokens", tokens]
    assert main([*command, "--cutoff", "percentile", "--cutoff-value", "80"]) == 0
    results = read(tmp_path)
    assert set(results["modes"]) == {"zero", "mean", "noise", "shuffle"}
    assert results["labels"] is None  # the head has other classes than the folders
    assert "agreement" in results["modes"]["zero"]["ablated"]
    assert "zero: cosine" in capsys.readouterr().out


def test_registers(models, photos, tmp_path, capsys):
    command = ["registers", str(models / "plain"), str(photos), str(tmp_path / "mended"), "--top-k", "2"]
    assert main([*command, "--cutoff", "percentile", "--cutoff-value", "80", "--pictured", "2"]) == 0
    read(tmp_path / "mended" / "report")
    assert ViTRegModel.from_pretrained(tmp_path / "mended").config.num_test_time_registers == 1
    told = capsys.readouterr().out
    assert "2 register neurons of " in told
    assert "accuracy of 10 nearest neighbours" in told


def test_discover(models, tmp_path, capsys):
    root = tmp_path / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    pixels = np.full((40, 48, 3), 200, dtype=np.uint8)
    pixels[8:24, 16:40] = (200, 20, 20)
    PIL.Image.fromarray(pixels).save(root / "JPEGImages" / "000001.jpg")
    box = "<xmin>17</xmin><ymin>9</ymin><xmax>40</xmax><ymax>24</ymax>"
    (root / "Annotations" / "000001.xml").write_text(
        f"<annotation><object><name>car</name><bndbox>{box}</bndbox></object></annotation>"
    )
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n")
    assert main(["discover", str(models / "classifier"), str(root), "--output", str(tmp_path / "out")]) == 0
    results = read(tmp_path / "out")
    assert results["images"] == 1
    assert len(results["settings"]) == 3 * 2 * 11  # features, layers of this model, raw and ten biases
    assert (tmp_path / "out" / "boxes.png").is_file()
    assert "default: CorLoc" in capsys.readouterr().out


def test_dataset_then_find(photos, tmp_path, capsys):
    command = ["dataset", str(photos), "--split", "train", "--output", str(tmp_path / "out"), "--at-most", "9"]
    assert main(command) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 9
    assert "9 images in" in capsys.readouterr().out


def test_a_folder_holds_one_report(models, photos, tmp_path, capsys):
    model = str(models / "classifier")
    assert main(["compare", model, str(models / "plain"), str(photos), "--output", str(tmp_path)]) == 0
    assert main(["analyze", model, str(photos), "--output", str(tmp_path), "--no-probes"]) == 2
    assert "a report of 'compare'" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["report"] == "compare"
    assert main(["analyze", model, str(photos), "--output", str(tmp_path), "--no-probes", "--overwrite"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["report"] == "analyze"
    assert not (tmp_path / "differences.png").exists()


def test_draws_do_not_depend_on_the_batch_size(models, photos, tmp_path):
    drawn = []
    for size in ("3", "20"):
        command = ["probe", str(models / "classifier"), str(photos), "--output", str(tmp_path / size), "--draws", "2"]
        assert main([*command, "--batch-size", size]) == 0
        drawn.append(read(tmp_path / size)["sets"]["photos"]["normal"]["accuracies"])
    assert drawn[0] == drawn[1]


def test_records_that_are_cut_off_name_themselves(models, photos, tmp_path, capsys):
    command = ["analyze", str(models / "classifier"), str(photos), "--output", str(tmp_path), "--no-probes"]
    assert main(command) == 0
    file = tmp_path / "records" / "00000000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main(command) == 2
    assert "Expected whole records, got" in capsys.readouterr().err
    file.unlink()
    assert main(command) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "{models}/classifier", "{tmp}/nowhere"], "which does not exist"),
        (["analyze", "{models}/classifier", "{photos}", "--layer", "9"], "layers 1 to 2, or -2 to -1, got 9"),
        (["analyze", "{models}/classifier", "{photos}", "--cutoff", "fixed"], "a number above 0 for the cutoff rule"),
        (["analyze", "{models}/classifier", "{photos}", "--batch-size", "0"], "batch size of 1 or more, got 0"),
        (
            ["analyze", "{models}/classifier", "{photos}", "--image-size", "33"],
            "8 x 8 divides, got 33 x 33",
        ),
        (["analyze", "{tmp}", "{photos}"], "config.json"),
        (["compare", "{models}/plain", "{photos}"], "Expected 2 to 6 models to compare, got 1"),
        (["sinks", "{models}/classifier", "--texts", "{tmp}/none.txt"], "none.txt"),
        (["sinks", "{models}/classifier", "--texts", "{models}/plain/config.json"], "Expected a text model"),
        (["ablate", "{models}/classifier", "{photos}", "--tokens", "outliers"], "no outlier under this cutoff in 21"),
        (["ablate", "{models}/plain", "{photos}"], "registers"),
        (["probe", "{models}/plain", "{photos}/red"], "one folder per class"),
        (["discover", "{models}/plain", "{photos}"], "got"),
    ],
)
def test_mistakes_end_in_one_sentence(models, photos, tmp_path, capsys, arguments, message):
    filled = [part.format(models=models, photos=photos, tmp=tmp_path) for part in arguments]
    assert main([*filled, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("package", "extra"), [("timm", "convert"), ("timm.layers", "convert"), ("matplotlib", "analysis")]
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(package, extra, capsys, monkeypatch):
    def convert(*_, **__):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("vitreg_hf.conversion.convert.convert_checkpoint", convert)
    assert main(["convert", "source.pth", "nowhere"]) == 2
    assert f"pip install 'vitreg_hf[{extra}]'" in capsys.readouterr().err


def test_it_is_installed_as_a_command():
    shown = subprocess.run(
        [sys.executable, "-m", "vitreg_hf.cli", "--help"], capture_output=True, text=True, check=True
    )
    for name in OPTIONS:
        assert name in shown.stdout
