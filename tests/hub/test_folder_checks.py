"""A folder with anything wrong is refused before anything is sent, and told by the name of the file."""

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegConfig,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegImageProcessorPil,
    ViTRegModel,
)
from vitreg_hf.hub.folder_checks import check_folder

ID = "alice/vitreg-pets"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "model"))


def problems_of(folder, model_id=ID):
    """The lines of a refusal, one per problem."""
    with pytest.raises(ValueError, match="Expected a model that can be published") as refused:
        check_folder(folder, model_id)
    return str(refused.value).splitlines()[1:]


def shard(folder):
    model = ViTRegForImageClassification.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def change(name, **fields):
    """Set fields of a JSON file; those given as None are taken out."""

    def breaking(folder):
        saved = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))

    return breaking


def write(name, content):
    def breaking(folder):
        (folder / name).write_bytes(content)

    return breaking


def remove(name):
    return lambda folder: (folder / name).unlink()


def change_weights(changing):
    def breaking(folder):
        tensors = load_file(folder / WEIGHTS)
        changing(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return breaking


def put(key, value):
    return change_weights(lambda tensors: tensors.update({key: value(tensors[key])}))


def with_value(number):
    def changing(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return changing


def cut(name, bytes_left_out):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-bytes_left_out])


def longer_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 20_000_000) + b" " * 20_000_100)


def offsets_beyond_the_end(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def change_index(changing):
    def breaking(folder):
        shard(folder)
        index = json.loads((folder / INDEX).read_text())
        changing(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return breaking


def swap_two(mapped):
    first, *_, last = mapped
    mapped[first], mapped[last] = mapped[last], mapped[first]
    assert mapped[first] != mapped[last]


def without_a_shard(folder):
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_both_layouts(folder):
    whole = (folder / WEIGHTS).read_bytes()
    shard(folder)
    (folder / WEIGHTS).write_bytes(whole)


def edit_card(old, new):
    def breaking(folder):
        text = (folder / "README.md").read_text()
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new))

    return breaking


HEAD = "classifier.weight"
BROKEN = {
    "no config": (remove("config.json"), "config.json: Expected the config that save_pretrained writes, got none"),
    "config that is cut off": (cut("config.json", 9), "config.json: Expected JSON that can be read"),
    "config that is a list": (write("config.json", b"[]"), "config.json: Expected a JSON object, got list"),
    "deep config": (write("config.json", b'{"a":' * 100_000), "config.json: Expected JSON that can be read"),
    "config with NaN": (change("config.json", layer_norm_eps=float("nan")), "config.json: .*NaN, which is no number"),
    "config of another family": (change("config.json", model_type="vit"), "config.json: Expected model_type 'vitreg'"),
    "config out of range": (change("config.json", hidden_size=-1), "config.json: Expected hidden_size"),
    "config of a wrong type": (change("config.json", hidden_size="32"), "config.json: .*hidden_size"),
    "no architecture": (change("config.json", architectures=None), "config.json: Expected architectures with one of"),
    "foreign class": (change("config.json", architectures=["ViTModel"]), "config.json: .*got .'ViTModel'."),
    "two classes": (change("config.json", architectures=["ViTRegModel"] * 2), "config.json: Expected architectures"),
    "no weights": (remove(WEIGHTS), "Expected model.safetensors, or .* got neither"),
    "weights that are cut off": (cut(WEIGHTS, 9), "model.safetensors: Expected a complete safetensors file"),
    "empty weights": (write(WEIGHTS, b""), "model.safetensors: Expected a complete safetensors file"),
    "bytes after the weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x"),
        "model.safetensors: Expected a complete safetensors file",
    ),
    "huge header": (longer_header, "model.safetensors: Expected a header of at most 10000000 bytes, got 20000000"),
    "offsets beyond the end": (offsets_beyond_the_end, "model.safetensors: Expected a complete safetensors file"),
    "deeper config than weights": (change("config.json", num_hidden_layers=900), "config.json: .*num_hidden_layers=9"),
    "one layer too many": (
        change("config.json", num_hidden_layers=3),
        r"model.safetensors: .* needs layers\.2\..*more",
    ),
    "one layer too few": (
        change("config.json", num_hidden_layers=1, out_indices=[1], out_features=["stage1"]),
        r"model.safetensors: \S*layers\.1\.\S+ is no parameter of ViTRegFor",
    ),
    "a missing tensor": (change_weights(lambda t: t.pop(HEAD)), "model.safetensors: .* needs classifier.weight, got"),
    "a tensor too many": (
        change_weights(lambda t: t.update(extra=torch.ones(1))),
        "model.safetensors: extra is no parameter",
    ),
    "another shape": (put(HEAD, lambda t: t.T.contiguous()), r"model.safetensors: classifier.weight has the shape"),
    "integers": (put(HEAD, lambda t: t.long()), "model.safetensors: classifier.weight is of type I64"),
    "8-bit floats": (
        put(HEAD, lambda t: t.to(torch.float8_e4m3fn)),
        "model.safetensors: classifier.weight is of type F8",
    ),
    "NaN": (put(HEAD, with_value(torch.nan)), "model.safetensors: classifier.weight holds NaN or infinity"),
    "infinity": (put(HEAD, with_value(-torch.inf)), "model.safetensors: classifier.weight holds NaN or infinity"),
    "infinity in half": (
        put(HEAD, lambda t: with_value(torch.inf)(t.half())),
        "model.safetensors: classifier.weight holds NaN or infinity",
    ),
    "stray weights": (write("old.safetensors", b"x"), "Expected the files of one model, got also old.safe"),
    "both layouts": (with_both_layouts, "Expected model.safetensors or .*index.json, got both"),
    "a missing shard": (
        without_a_shard,
        "Expected the files that .* names, got none of the name model-00002",
    ),
    "index without a map": (
        lambda folder: [shard(folder), change(INDEX, weight_map=None)(folder)],
        "Expected weight_map with the file of every tensor in model.safetensors.index.json",
    ),
    "index out of the folder": (
        change_index(lambda mapped: mapped.update({HEAD: "../model.safetensors"})),
        "Expected names of safetensors files beside it in model.safetensors.index.json, got '../model",
    ),
    "index that swaps": (
        change_index(swap_two),
        "model.safetensors.index.json: the file that it names for .* another",
    ),
    "index that lacks one": (change_index(lambda m: m.pop(HEAD)), "model.safetensors.index.json: .*classifier.weight"),
    "index with one more": (change_index(lambda m: m.update(x=m[HEAD])), "model.safetensors.index.json: .* for x"),
    "no processor": (remove("preprocessor_config.json"), "preprocessor_config.json: .*image processor, .* got none"),
    "wrong processor": (
        change("preprocessor_config.json", image_std=[0, 1, 1]),
        "preprocessor_config.json: expected im",
    ),
    "odd processor": (change("preprocessor_config.json", size="big"), "preprocessor_config.json: "),
    "processor of nobody": (
        change("preprocessor_config.json", image_processor_type="Own", auto_map={"AutoImageProcessor": "own.Own"}),
        "preprocessor_config.json: .*(trust_remote_code|Unrecognized|remote code|custom code)",
    ),
    "placeholders for names": (
        change("config.json", id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}),
        "config.json: Expected a name for every class in id2label, got none for class 0",
    ),
    "one placeholder": (
        change("config.json", id2label={"0": "cat", "1": "dog", "2": "LABEL_2"}),
        "config.json: Expected a name for every class in id2label, got none for class 2",
    ),
    "an empty name": (
        change("config.json", id2label={"0": "cat", "1": " ", "2": "bird"}),
        "config.json: Expected a name for every class in id2label, got none for class 1",
    ),
    "equal names": (
        change("config.json", id2label={"0": "cat", "1": "cat", "2": "bird"}),
        "config.json: Expected different names in id2label",
    ),
    "a gap in the classes": (
        change("config.json", id2label={"0": "cat", "1": "dog", "7": "bird"}),
        r"config.json: Expected id2label with the classes 0, 1, 2 and so on, got \[0, 1, 7\]",
    ),
    "a class without a name": (
        change("config.json", id2label={"0": "cat", "1": "dog"}, label2id={"cat": 0, "dog": 1}),
        r"model.safetensors: classifier.weight has the shape \(3, 32\), expected \(2, 32\)",
    ),
    "names turned around wrongly": (
        change("config.json", label2id={"cat": 1, "dog": 0, "bird": 2}),
        "config.json: Expected label2id to turn id2label around",
    ),
    "array of objects": (
        lambda folder: np.save(folder / "scores.npy", np.array([{}], dtype=object), allow_pickle=True),
        "scores.npy: Expected no pickle beside the model",
    ),
    "results that are cut off": (cut("results.json", 9), "results.json: Expected JSON that can be read"),
    "results with NaN": (change("results.json", extra=float("nan")), "results.json: .*NaN"),
    "picture that is none": (write("curve.png", b"GIF89a"), "curve.png: Expected a PNG picture"),
    "card of a folder": (edit_card(ID, "./model"), "README.md: .*code that loads './model', .* edit it, or delete it"),
    "card with a bad licence": (
        edit_card("license: mit", "license: MIT License"),
        "README.md: .*license .MIT License.",
    ),
    "neither card nor results": (
        lambda folder: [remove("README.md")(folder), remove("results.json")(folder)],
        "README.md: Expected results.json of a training in",
    ),
}
for name in ("weights.bin", "weights.pt", "weights.PTH", "last.ckpt", "data.pkl"):
    BROKEN[name] = (write(name, b"x"), f"{name}: Expected no pickle beside the model, .*: save weights with")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_the_name_of_the_file(folder, case):
    breaking, message = BROKEN[case]
    breaking(folder)
    problems = problems_of(folder)
    matching = [one for one in problems if re.match(f"- (?:{message})", one)]
    assert matching, problems
    assert max(map(len, problems)) < 1500


def test_all_problems_are_told_at_once(folder):
    change("config.json", id2label={"0": "LABEL_0", "1": "a", "2": "b"})(folder)
    put(HEAD, with_value(torch.nan))(folder)
    write("a.bin", b"x")(folder)
    remove("preprocessor_config.json")(folder)
    assert {one.split(":")[0] for one in problems_of(folder)} == {
        *("- config.json", f"- {WEIGHTS}", "- a.bin", "- preprocessor_config.json")
    }


def test_a_path_that_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="Expected the folder of a trained model"):
        check_folder(tmp_path / "none")


def test_what_is_found_in_a_good_folder(folder):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.bin").write_bytes(b"x")
    np.save(folder / "scores.npy", np.ones(3))
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "results.json").write_text("{}")
    found = check_folder(folder, ID)
    assert found.labels == ("cat", "dog", "bird")
    assert [one.name for one in found.weights.all] == [WEIGHTS]
    assert found.results == (folder / "results.json", folder / "artifacts" / "results.json")
    assert found.pictures == (folder / "training_curve.png",)
    assert not found.has_code


def test_shards_are_found_with_their_index(folder):
    shard(folder)
    names = [one.name for one in check_folder(folder, ID).weights.all]
    assert names[-1] == INDEX
    assert names[:-1] == sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_fine(folder, dtype):
    change_weights(lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))(folder)
    (folder / "results.json").unlink()  # which are those of the weights before
    assert check_folder(folder)


def test_results_of_other_weights_are_refused(folder):
    (folder / "training_args.bin").write_bytes(b"what Transformers' Trainer leaves is no weight file")
    assert check_folder(folder, ID)
    change_weights(lambda tensors: tensors.update({key: 2 * t for key, t in tensors.items()}))(folder)
    with pytest.raises(ValueError, match=r"results\.json: Expected the results of these weights, got those of others"):
        check_folder(folder, ID)


def save_segmenter(folder):
    names = {"id2label": {0: "sky", 1: "sea"}, "label2id": {"sky": 0, "sea": 1}}
    ViTRegForSemanticSegmentation(ViTRegConfig(**SMALL, **names, segmentation_batch_norm=True)).save_pretrained(folder)


OTHERS = {
    "backbone": lambda folder: ViTRegModel(ViTRegConfig(**SMALL)).save_pretrained(folder),
    "feature maps": lambda folder: ViTRegBackbone(ViTRegConfig(**SMALL)).save_pretrained(folder),
    "mask token": lambda folder: ViTRegModel(ViTRegConfig(**SMALL), use_mask_token=True).save_pretrained(folder),
    "masked images": lambda folder: ViTRegForMaskedImageModeling(ViTRegConfig(**SMALL)).save_pretrained(folder),
    "segmenter": save_segmenter,
    "regression": lambda folder: ViTRegForImageClassification(
        ViTRegConfig(**SMALL, num_labels=1, problem_type="regression")
    ).save_pretrained(folder),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_class_of_the_family_passes(tmp_path, kind):
    OTHERS[kind](tmp_path)
    ViTRegImageProcessorPil(size=32).save_pretrained(tmp_path)
    found = check_folder(tmp_path)  # without an id, the card is not looked at
    assert found.labels == (("sky", "sea") if kind == "segmenter" else ("LABEL_0",) if kind == "regression" else ())


def test_weights_of_a_backbone_may_carry_the_prefix_of_models_with_a_head(tmp_path):
    ViTRegModel(ViTRegConfig(**SMALL)).save_pretrained(tmp_path)
    ViTRegImageProcessorPil(size=32).save_pretrained(tmp_path)
    change_weights(lambda t: [t.update({f"vitreg.{key}": t.pop(key)}) for key in list(t)])(tmp_path)
    assert check_folder(tmp_path)


def test_a_processor_of_transformers_is_fine(folder):
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    assert check_folder(folder, ID).processor["image_processor_type"].startswith("ViTImageProcessor")


def test_code_in_the_folder_is_not_run(folder):
    (folder / "own.py").write_text("raise SystemExit('this code ran')")
    reference = {"AutoImageProcessor": "own.Own"}
    change("preprocessor_config.json", image_processor_type="Own", auto_map=reference)(folder)
    change("config.json", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})(folder)
    assert [one for one in problems_of(folder) if one.startswith("- preprocessor_config.json")]


def test_a_missing_card_is_no_problem_where_it_can_be_rendered(folder):
    (folder / "README.md").unlink()
    assert check_folder(folder, ID)
    assert not (folder / "README.md").exists()


def test_the_folder_stays_as_it_is(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check_folder(folder, "somebody/else")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_finiteness_needs_little_memory_beside_the_tensor(monkeypatch):
    """Looked at in parts, whose masks are much smaller than the tensor."""
    from vitreg_hf.hub import weight_files

    largest, isfinite = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda part: [largest.append(part.numel()), isfinite(part)][1])
    monkeypatch.setattr(weight_files, "_ELEMENTS", 100)
    tensor = torch.ones(7, 99)
    assert weight_files._is_finite(tensor)
    tensor[-1, -1] = torch.nan
    assert not weight_files._is_finite(tensor)
    assert max(largest) == 100
