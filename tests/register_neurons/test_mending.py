"""`vitreg registers` from a folder to a folder: what it writes, what stands in it, and what it refuses or leaves."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from vitreg_hf import (
    RegisterNeurons,
    ViTRegForImageClassification,
    ViTRegModel,
    add_test_time_registers,
    find_register_neurons,
)
from vitreg_hf.analysis.images import find_images, image_batches, labelled_split
from vitreg_hf.cli import main
from vitreg_hf.conversion.back import export_checkpoint
from vitreg_hf.hub.folder_checks import check_folder
from vitreg_hf.register_neurons import mending
from vitreg_hf.register_neurons.mending import MendSettings, mend
from vitreg_hf.register_neurons.planted import planted_network, planted_neurons, processor_for, write_images

FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "registers.json"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A planted model and its image processor, as a training leaves them."""
    return saved(planted_network(), tmp_path_factory.mktemp("source") / "planted")


def saved(model, folder):
    model.save_pretrained(folder)
    processor_for(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty images in two classes, none of them in the last two."""
    return write_images(
        tmp_path_factory.mktemp("photos") / "photos", planted_network(), 20, without=2, classes=2
    ).folder


@pytest.fixture(scope="module")
def whole(source, photos, tmp_path_factory):
    """The folder that one complete run leaves; its report is for all tests that change nothing in it."""
    out = tmp_path_factory.mktemp("mended") / "out"
    assert main(["registers", str(source), str(photos), str(out), "--pictured", "2"]) == 0
    return out


@pytest.fixture
def quick(monkeypatch):
    """Without the comparison and its pictures."""
    monkeypatch.setattr(mending, "compare", lambda *_: {"models": ["a", "b"], "differences": []})
    monkeypatch.setattr(mending, "_draw", lambda *_: None)


@pytest.fixture
def unpainted(monkeypatch):
    """With pictures that are put together but not painted, which takes longer than all the rest."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"a picture"))


def content(folder):
    return json.loads((folder / "registers.json").read_text())


def change(folder, quantity):
    [row] = [row for row in content(folder)["changes"] if row["quantity"] == quantity]
    return row


# A whole run


def test_it_leaves_a_model_a_search_and_a_report(whole):
    assert {path.name for path in whole.iterdir()} == {*FILES, "register_neurons.json", "report"}
    report = {path.name for path in (whole / "report").iterdir()}
    assert {"report.html", "results.json", "before_after.png", "neurons.png", "records-a", "records-b"} <= report
    for path in (whole / "report").glob("*.png"):
        with PIL.Image.open(path) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 20


def test_it_prints_the_neurons_the_changes_and_where_all_is(source, photos, tmp_path, capsys, quick):
    assert main(["registers", str(source), str(photos), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "5 register neurons of 300 ranked" in told
    assert "<- chosen" in told
    assert "patches above the norm" in told
    for path in ("out", "out/report/before_after.png", "out/report/report.html"):
        assert str(tmp_path / path) in told


def test_the_saved_model_is_the_one_mended_by_hand(source, photos, whole):
    model, processor = ViTRegModel.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
    found = find_register_neurons(model, photos, processor, progress=False)
    assert RegisterNeurons.load(whole / "register_neurons.json") == found
    assert set(found) == set(planted_neurons(model.config))
    loaded = AutoModel.from_pretrained(whole).eval()
    assert loaded.config.register_neurons == [list(pair) for pair in found]
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        by_hand = add_test_time_registers(model, found).eval()(pixels).last_hidden_state
        assert torch.equal(loaded(pixels).last_hidden_state, by_hand)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, whole))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_numbers_are_those_of_a_direct_computation(source, photos, whole):
    results = content(whole)
    assert (results["source"], results["method"], results["num_registers"]) == (str(source), "test-time", 1)
    assert mending.search_of(results) == RegisterNeurons.load(whole / "register_neurons.json")
    files = find_images(photos)
    pixels = torch.cat(list(image_batches(files.files, AutoImageProcessor.from_pretrained(source), 20)))
    with torch.no_grad():
        models = [ViTRegModel.from_pretrained(folder).eval() for folder in (source, whole)]
        said = [model(pixels, output_hidden_states=True, output_prefix_attentions=True) for model in models]
    norms = [one.hidden_states[-1][:, -36:].norm(dim=-1) for one in said]
    threshold = results["search"]["threshold"]
    for quantity, expected in {
        "outlier_share": [100 * (one > threshold).float().mean().item() for one in norms],
        "largest_norm": [one.max().item() for one in norms],
        "pooled_cosine": [1.0, torch.cosine_similarity(*(one.pooler_output for one in said), dim=1).mean().item()],
    }.items():
        row = change(whole, quantity)
        assert [row["before"], row["after"]] == pytest.approx(expected, rel=1e-4), quantity
    mass = change(whole, "mass_on_registers")
    assert mass["before"] is None
    assert mass["after"] == pytest.approx(100 * said[1].prefix_attentions[-1][:, :, 0, 1].mean().item(), rel=1e-4)
    assert change(whole, "outlier_share")["before"] > 10
    assert change(whole, "outlier_share")["after"] == 0
    assert change(whole, "mass_on_registers")["after"] > 50
    _, labels, training = labelled_split(files)
    for when, one in zip(("before", "after"), said, strict=True):
        right = by_neighbours(one.pooler_output, labels, training)
        assert change(whole, "knn_accuracy")[when] == pytest.approx(100 * right)


def by_neighbours(pooled, labels, training):
    """Share of images that the ten nearest of the training images vote right about."""
    unit = torch.nn.functional.normalize(pooled, dim=-1)
    similar, nearest = (unit[~training] @ unit[training].T).topk(10, dim=1)
    votes = torch.zeros(len(nearest), 2).scatter_add_(1, labels[training][nearest], (similar / 0.07).exp())
    return (votes.argmax(1) == labels[~training]).float().mean().item()


def test_it_can_be_published_as_it_is(whole):
    checked = check_folder(whole)
    assert checked.config["num_test_time_registers"] == 1
    assert [path.name for path in checked.pictures] == []


def test_its_pictures_hold_what_the_models_say(whole):
    report = (whole / "report" / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') >= 4
    assert "http" not in report.split("</style>")[1]
    names = json.loads((whole / "report" / "results.json").read_text())["models"]
    assert list(names) == ["planted", "planted + test-time"]


# Options


@pytest.mark.parametrize("registers", [1, 2])
def test_a_number_of_registers_cls_and_a_beginning_can_be_told(registers, source, photos, tmp_path, quick):
    command = ["registers", str(source), str(photos), str(tmp_path), "--registers", str(registers), "--top-k", "5"]
    assert main([*command, "--cls", "keep", "--init", "random", "--num-images", "6", "--top-layer", "5"]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_test_time_registers"] == registers
    assert (config["test_time_register_cls"], config["test_time_register_init"]) == ("keep", "random")
    found = RegisterNeurons.load(tmp_path / "register_neurons.json")
    assert (found.images, found.top_layer, found.trials) == (6, 5, ())


def test_a_bias_of_attention(source, photos, tmp_path, unpainted):
    command = ["registers", str(source), str(photos), str(tmp_path), "--method", "attention-bias", "--top-k", "5"]
    assert main([*command, "--pictured", "1"]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_bias_kv"]
    assert config["num_test_time_registers"] == 0
    assert change(tmp_path, "outlier_share")["after"] == 0
    assert change(tmp_path, "pooled_cosine")["after"] > 0.9
    assert not (tmp_path / "report" / "neurons.png").exists()  # nothing was tried
    model = ViTRegModel.from_pretrained(tmp_path)
    assert model.layers[5].attention.bias_k.norm() > 0


def test_learned_registers_are_added_where_there_is_no_outlier_too(photos, tmp_path, capsys, unpainted):
    source = saved(planted_network(planted=False), tmp_path / "clean")
    command = ["registers", str(source), str(photos), str(tmp_path / "out"), "--pictured", "1"]
    assert main(command) == 2
    assert "this model needs no registers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--method", "added", "--registers", "3"]) == 0
    assert not (tmp_path / "out" / "register_neurons.json").exists()
    assert content(tmp_path / "out")["search"] is None
    assert ViTRegModel.from_pretrained(tmp_path / "out").config.num_register_tokens == 3
    assert change(tmp_path / "out", "pooled_cosine")["after"] > 0.99


def test_neurons_of_an_earlier_search_are_used_again(source, photos, whole, tmp_path, monkeypatch, unpainted):
    """Also fewer or more of them than were tried, and with the state and the cutoff of that search."""
    monkeypatch.setattr(mending, "find_register_neurons", lambda *_, **__: pytest.fail("searched again"))
    command = ["registers", str(source), str(photos), str(tmp_path / "same"), "--pictured", "1"]
    assert main([*command, "--neurons", str(whole / "register_neurons.json")]) == 0
    pairs = [
        json.loads((folder / "config.json").read_text())["register_neurons"] for folder in (whole, tmp_path / "same")
    ]
    assert pairs[0] == pairs[1]
    assert content(tmp_path / "same")["changes"] == content(whole)["changes"]
    seven = ["--neurons", str(whole / "register_neurons.json"), "--top-k", "7", "--overwrite"]
    assert main([*command, *seven]) == 0  # a number that was not tried
    assert len(RegisterNeurons.load(tmp_path / "same" / "register_neurons.json")) == 7


def test_norms_are_judged_in_the_state_of_the_search(source, photos, whole, tmp_path, quick):
    found = RegisterNeurons.load(whole / "register_neurons.json")
    model, files = ViTRegModel.from_pretrained(source).eval(), find_images(photos)
    pixels = torch.cat(list(image_batches(files.files, AutoImageProcessor.from_pretrained(source), 20)))
    with torch.no_grad():
        norms = model(pixels, output_hidden_states=True).hidden_states[4][:, 1:].norm(dim=-1)
    RegisterNeurons(**{**vars(found), "state": 4, "threshold": 11.0}).save(tmp_path / "earlier.json")
    command = [
        "registers",
        str(source),
        str(photos),
        str(tmp_path / "out"),
        "--neurons",
        str(tmp_path / "earlier.json"),
    ]
    assert main(command) == 0
    row = change(tmp_path / "out", "outlier_share")
    assert row["before"] == pytest.approx(100 * (norms > 11).float().mean().item(), rel=1e-4)


def test_a_classifier_keeps_its_head(photos, tmp_path, quick):
    labels = {0: "red", 1: "green"}
    model = planted_network(ViTRegForImageClassification, id2label=labels, label2id={"red": 0, "green": 1})
    saved(model, tmp_path / "source")
    assert main(["registers", str(tmp_path / "source"), str(photos), str(tmp_path / "out"), "--top-k", "5"]) == 0
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert loaded.config.id2label == labels
    assert loaded.config.num_test_time_registers == 1


def test_models_without_cls_are_drawn_without_its_attention(photos, tmp_path, unpainted):
    source = saved(planted_network(use_cls_token=False, pooling="mean"), tmp_path / "source")
    command = ["registers", str(source), str(photos), str(tmp_path / "out"), "--top-k", "5", "--pictured", "1"]
    assert main(command) == 0
    assert (tmp_path / "out" / "report" / "before_after.png").is_file()
    assert change(tmp_path / "out", "outlier_share")["after"] == 0


def test_folders_of_train_and_test_keep_their_labels(photos, source, tmp_path, quick):
    """Files come sorted by path, test before train, and the classifier of neighbours trains on train."""
    for number, file in enumerate(find_images(photos).files):
        target = tmp_path / "images" / ("test" if number % 3 == 0 else "train") / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    results = mend(str(source), tmp_path / "images", tmp_path / "out", MendSettings(top_k=5))
    [row] = [row for row in results["changes"] if row["quantity"] == "knn_accuracy"]
    files = find_images(tmp_path / "images").files
    pixels = torch.cat(list(image_batches(files, AutoImageProcessor.from_pretrained(source), 20)))
    with torch.no_grad():
        pooled = ViTRegModel.from_pretrained(source).eval()(pixels).pooler_output
    training = torch.tensor(["train" in file.parts for file in files])
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    assert row["before"] == pytest.approx(100 * by_neighbours(pooled, labels, training))


def test_corrupt_images_stop_it_or_are_left_out(source, photos, tmp_path, capsys, unpainted):
    shutil.copytree(photos, tmp_path / "images")
    broken = tmp_path / "images" / "class 0" / "000.png"
    broken.write_bytes(broken.read_bytes()[:100])
    command = ["registers", str(source), str(tmp_path / "images"), str(tmp_path / "out"), "--top-k", "5"]
    assert main(command) == 2
    assert "000.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--on-corrupt-image", "skip", "--pictured", "2"]) == 0
    assert RegisterNeurons.load(tmp_path / "out" / "register_neurons.json").images == 19
    assert "000.png" in (tmp_path / "out" / "report" / "results.json").read_text()


# Folders


def test_a_folder_that_holds_a_model_is_refused_before_work(source, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mending, "load_to_mend", lambda *_: pytest.fail("work has begun"))
    shutil.copytree(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(["registers", str(source), str(photos), str(tmp_path / "out")]) == 2
    assert "which holds one (overwrite=True, or --overwrite, replaces it)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_overwriting_leaves_nothing_of_the_former(source, photos, tmp_path, quick):
    command = ["registers", str(source), str(photos), str(tmp_path)]
    assert main([*command, "--top-k", "5"]) == 0
    (tmp_path / "conversion.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*command, "--method", "added", "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {*FILES, "notes.txt"}
    assert not {path.name for path in tmp_path.iterdir()} & {
        *("register_neurons.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        "conversion.json",
    }
    assert ViTRegModel.from_pretrained(tmp_path).config.num_register_tokens == 1


def test_overwriting_measures_the_new_model(source, photos, tmp_path, unpainted):
    """Whose weights are those of the former: records of it must not be taken for its own."""
    command = ["registers", str(source), str(photos), str(tmp_path), "--pictured", "1", "--top-k"]
    assert main([*command, "1"]) == 0
    one = change(tmp_path, "mass_on_registers")["after"]
    assert main([*command, "5", "--overwrite"]) == 0
    five = change(tmp_path, "mass_on_registers")["after"]
    assert one < 30 < 50 < five


@pytest.mark.parametrize("step", ["model.safetensors", "preprocessor_config.json", "registers.json"])
def test_what_is_interrupted_leaves_no_half_model(step, source, photos, tmp_path, monkeypatch, quick, capsys):
    """Neither alone nor beside one that was there: what has no config does not load."""
    added = ["registers", str(source), str(photos), str(tmp_path), "--method", "added"]
    command = [*added[:-2], "--top-k", "5"]
    assert main(added) == 0
    replace = mending.os.replace

    def interrupted(old, new):
        if str(new).endswith(step) and new.parent == tmp_path:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(mending.os, "replace", interrupted)
        assert main([*command, "--overwrite"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / ".unfinished").exists()
    assert main(command) == 0  # goes on without being told to overwrite
    assert ViTRegModel.from_pretrained(tmp_path).config.num_test_time_registers == 1


def test_an_interruption_between_report_and_model_leaves_no_model(source, photos, tmp_path, monkeypatch, unpainted):
    def interrupted(*_):
        raise KeyboardInterrupt

    command = ["registers", str(source), str(photos), str(tmp_path), "--top-k", "5", "--pictured", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(mending, "_save", interrupted)
        assert main(command) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "register_neurons.json", "report"}


def test_a_full_disk_leaves_no_model(source, photos, tmp_path, monkeypatch, quick, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ViTRegModel, "save_pretrained", full)
    assert main(["registers", str(source), str(photos), str(tmp_path / "out"), "--top-k", "5"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


def test_a_foreign_model_is_converted_on_the_fly(photos, tmp_path, quick):
    fields = {"layerscale_value": 1.0, "position_interpolation_antialias": False, "position_interpolation_offset": 0.0}
    model = planted_network(intermediate_size=384, **fields)
    saved(model, tmp_path / "own")
    export_checkpoint(tmp_path / "own", tmp_path / "foreign", layout="transformers_dinov2")
    results = mend(str(tmp_path / "foreign"), photos, tmp_path / "out", MendSettings())
    assert set(mending.search_of(results)) == set(planted_neurons(model.config))
    assert results["source"] == str(tmp_path / "foreign")
    assert ViTRegModel.from_pretrained(tmp_path / "out").config.num_test_time_registers == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--registers", "0"], "one register or more, got 0"),
        (["--registers", "2", "--method", "attention-bias"], "Expected one register, got 2"),
        (["--top-k", "0"], "1 to 300 register neurons, got 0"),
        (["--top-layer", "6"], "top_layer of 0 to 5, got 6"),
        (["--layer", "9"], "layers 1 to 6"),
        (["--cutoff", "fixed"], "a number above 0"),
        (["--cutoff", "fixed", "--cutoff-value", "1e9"], "this model needs no registers"),
        (["--num-images", "0"], "one image or more"),
        (["--image-size", "50"], "8 x 8 divides"),
        (["--neurons", "{tmp}/none.json"], "Expected a file of register neurons"),
        (["--neurons", "{tmp}/damaged.json"], "Expected a file of register neurons"),
        (["--neurons", "{tmp}/other.json"], "register_neurons"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_nothing(arguments, message, source, photos, whole, tmp_path, capsys):
    (tmp_path / "damaged.json").write_text("{")
    found = RegisterNeurons.load(whole / "register_neurons.json")
    wide = [{**vars(one), "neuron": 5000} for one in found.ranking]
    (tmp_path / "other.json").write_text(json.dumps({**found.to_dict(), "ranking": wide}))
    filled = [part.format(tmp=tmp_path) for part in arguments]
    assert main(["registers", str(source), str(photos), str(tmp_path / "out"), *filled]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none_are_told(photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{}")
    for source in (tmp_path / "empty", tmp_path / "text.json", tmp_path / "nowhere" / "at" / "all"):
        assert main(["registers", str(source), str(photos), str(tmp_path / "out")]) in (1, 2)
        assert "vitreg registers: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "added", "--top-k", "5"],
        ["--method", "added", "--cls", "keep"],
        ["--method", "added", "--neurons", "x"],
    ],
)
def test_options_that_added_registers_do_not_read_are_refused(options, source, photos, tmp_path, capsys):
    assert main(["registers", str(source), str(photos), str(tmp_path / "out"), *options]) == 2
    assert "which moves no neurons" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--top-layer", "2"], ["--cutoff", "fixed", "--cutoff-value", "9"]])
def test_a_search_is_not_judged_by_another_rule(options, source, photos, tmp_path, capsys):
    command = ["registers", str(source), str(photos), str(tmp_path / "out"), "--neurons", "file.json", *options]
    assert main(command) == 2
    assert "whose search had its own" in capsys.readouterr().err


def test_added_registers_are_judged_by_the_rule_that_is_told(source, photos, tmp_path, quick):
    told = ["--method", "added", "--cutoff", "fixed", "--cutoff-value", "123"]
    assert main(["registers", str(source), str(photos), str(tmp_path), *told]) == 0
    assert change(tmp_path, "outlier_share")["name"] == "patches above the norm 123"
