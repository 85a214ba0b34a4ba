"""Damaged, hostile and wrong sources: one clear sentence, no code is run, and nothing is written."""

import builtins
import collections
import json
import os
import pickle
import random

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vitreg_hf import ViTRegConfig, ViTRegModel
from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.conversion.stored import open_source

from .reference_files import dinov2_file, dinov2_source


@pytest.fixture
def weights(filled):
    return dinov2_file(filled(dinov2_source(num_hidden_layers=2)))


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def refused(tmp_path):
    """Assert that converting ends in a ValueError with a message, and changes no file."""

    def state():
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    def check(source, message, output="converted", **options):
        before = state()
        with pytest.raises(ValueError, match=message) as caught:
            convert_checkpoint(source, tmp_path / output, **options)
        assert state() == before
        said = str(caught.value)
        assert said.startswith("Expected ")
        assert "weights_only=False" not in said  # what PyTorch advises, which would run the code
        return said

    return check


# Files that are none


def write_png(path):
    Image.new("RGB", (8, 8)).save(path, format="png")


NO_WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("these are no weights\n"),
    "JSON": lambda path: path.write_text('{"a": [1, 2]}'),
    "picture": write_png,
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(1000)),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "tar": lambda path: path.write_bytes(b"x" + bytes(256) + b"ustar\x0000" + bytes(1000)),
    "page that asks to log in": lambda path: path.write_text("<!DOCTYPE html><html>Access denied</html>"),
    "pointer of Git LFS": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
}


@pytest.mark.parametrize("ending", ["pth", "safetensors", "bin"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_file_that_holds_no_weights_is_refused(kind, ending, refused, tmp_path):
    path = tmp_path / f"weights.{ending}"
    NO_WEIGHTS[kind](path)
    said = refused(path, "safetensors|tensors alone")
    assert str(path) in said


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1, 2], "text", None, {"a": {"b": []}}], ids=str)
def test_a_file_without_tensors_is_refused(content, refused, save):
    refused(save(content), r"tensors by name in .*weights\.pth, got none")


def test_a_list_of_tensors_is_refused(refused, save):
    refused(save([torch.ones(2)]), r"tensors by name in .*weights\.pth, got none")


def test_a_tensor_alone_is_refused(refused, save):
    refused(save(torch.ones(2)), "Expected")


def test_paths_that_are_not_there_are_not_taken_for_repositories(refused, tmp_path):
    for path in (tmp_path / "nothing", "checkpoints/of/nobody", "nothing.pth", "nobody/nothing.safetensors"):
        refused(path, "a file, a folder or the id of a repository")


def test_an_empty_folder_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "one file of weights in .*empty, got none")


def test_a_folder_with_several_files_is_refused_unless_one_is_named(weights, refused, save, tmp_path):
    save(weights, "teacher.pth")
    save(weights, "student.pth")
    refused(tmp_path, "got several: student.pth, teacher.pth; name the file")


# Damaged files


def torn(data, seed):
    """A file cut anywhere, and files with some bytes changed."""
    chance = random.Random(seed)
    for _ in range(15):
        yield data[: chance.randrange(len(data))]
    for _ in range(25):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 30))):
            # the beginning and the end say where everything is
            place = chance.choice((chance.randrange(len(data)), chance.randrange(400), -1 - chance.randrange(400)))
            changed[place] = chance.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_a_torn_file_is_refused_in_a_sentence_or_read(kind, tmp_path):
    """Whatever was changed: an error is a ValueError, and what is read has the shapes that it says."""
    small = {f"blocks.{index}.weight": torch.randn(3, 5) for index in range(4)}
    path = tmp_path / f"weights.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(small, path)
    else:
        torch.save(small, path, _use_new_zipfile_serialization=kind == "pth")
    refused = 0
    for data in torn(path.read_bytes(), kind):
        damaged = tmp_path / f"damaged.{kind.split()[-1]}"
        damaged.unlink(missing_ok=True)  # what was read before may be a view of it
        damaged.write_bytes(data)
        try:
            for one in open_source(damaged).tensors.values():
                assert tuple(one.read().shape) == one.shape
        except ValueError as error:
            refused += 1
            assert str(error).startswith("Expected ")  # noqa: PT017 - some damage is in values alone
    assert refused >= 15


def test_a_truncated_file_of_weights_is_refused(weights, refused, save, tmp_path):
    path = save(weights)
    os.truncate(path, path.stat().st_size // 2)
    refused(path, "tensors alone, got .*damage")
    save_file(weights, tmp_path / "weights.safetensors")
    os.truncate(tmp_path / "weights.safetensors", 10_000)
    refused(tmp_path / "weights.safetensors", "safetensors")


# Code


class Runs:
    """Pickled, it is a call of anything."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("where", ["whole file", "beside the weights", "inside the weights"])
@pytest.mark.parametrize("function", ["system", "exec", "eval"])
def test_code_in_a_pickle_is_refused_and_not_run(function, where, old_format, weights, refused, tmp_path):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()"
    call = Runs(os.system, f"touch {mark}") if function == "system" else Runs(getattr(builtins, function), code)
    content = {"whole file": call, "beside the weights": {"model": weights, "args": call}}
    content["inside the weights"] = {**weights, "norm.weight": call}
    path = tmp_path / "weights.pth"
    torch.save(content[where], path, _use_new_zipfile_serialization=not old_format)
    refused(path, "tensors alone, got .*code or objects")
    assert not mark.exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(refused, tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    refused(tmp_path / "weights.bin", "tensors alone")
    assert not mark.exists()


def test_code_in_a_head_is_refused_and_not_run(weights, refused, save, tmp_path):
    mark = tmp_path / "ran"
    head = save({"weight": Runs(os.system, f"touch {mark}")}, "head.pth")
    refused(save(weights), r"tensors alone, got .*head\.pth", head=head)
    assert not mark.exists()


def test_arguments_of_a_training_are_refused_as_objects(weights, refused, save):
    """An `argparse.Namespace`, say, is no code, but cannot be told from it."""
    refused(save({"model": weights, "args": collections.UserDict()}), "tensors alone, got .*code or objects")


# Weights that are no whole model


def change(**changes):
    return lambda weights: weights.update({name.replace("__", "."): tensor for name, tensor in changes.items()})


DAMAGE = {
    "a missing tensor": (lambda w: w.pop("blocks.1.mlp.fc2.weight"), r"no tensor blocks\.1\.mlp\.fc2\.weight"),
    "a missing bias": (lambda w: w.pop("blocks.1.norm1.bias"), r"no tensor blocks\.1\.norm1\.bias"),
    "a missing bias of a projection": (
        lambda w: w.pop("blocks.0.attn.proj.bias"),
        r"unknown tensors.*blocks\.1\.attn\.proj\.bias",
    ),
    "a missing scale": (lambda w: w.pop("blocks.0.ls1.gamma"), r"unknown tensors.*ls2\.gamma.*blocks\.1\.ls1\.gamma"),
    "a missing norm": (lambda w: (w.pop("norm.weight"), w.pop("norm.bias")), r"no tensor norm\.weight, norm\.bias"),
    "an unknown tensor": (change(extra=torch.ones(2)), "unknown tensors, which would be left unused: extra"),
    "an unknown tensor in a block": (
        change(blocks__1__attn__q_norm__weight=torch.ones(64)),
        r"left unused: blocks\.1\.attn\.q_norm\.weight",
    ),
    "a vector for a matrix": (
        change(blocks__1__attn__proj__weight=torch.ones(128)),
        r"blocks\.1\.attn\.proj\.weight of shape \(128,\)",
    ),
    "a transposed matrix": (
        lambda w: w.update({"blocks.1.mlp.fc1.weight": w["blocks.1.mlp.fc1.weight"].T.contiguous()}),
        r"blocks\.1\.mlp\.fc1\.weight of shape \(128, 512\).*\(512, 128\)",
    ),
    "qkv of two parts": (
        change(blocks__1__attn__qkv__weight=torch.ones(256, 128)),
        r"blocks\.1\.attn\.qkv\.weight of shape \(256, 128\)",
    ),
    "another width in one block": (change(blocks__1__norm1__weight=torch.ones(96)), r"blocks\.1\.norm1\.weight"),
    "a scalar": (change(cls_token=torch.tensor(1.0)), r"cls_token of shape \(\)"),
    "whole numbers": (
        change(blocks__0__norm1__weight=torch.ones(128, dtype=torch.int64)),
        r"blocks\.0\.norm1\.weight of type torch\.int64, expected floating point",
    ),
    "complex numbers": (
        change(norm__bias=torch.ones(128, dtype=torch.complex64)),
        r"norm\.bias of type torch\.complex64",
    ),
    "numbers of eight bits": (
        change(norm__bias=torch.ones(128).to(torch.float8_e4m3fn)),
        r"norm\.bias of type torch\.float8_e4m3fn, expected floating point of 16 bits",
    ),
    "a tensor without values": (
        change(blocks__1__mlp__fc2__bias=torch.empty(128, device="meta")),
        r"blocks\.1\.mlp\.fc2\.bias: a tensor that is .*empty",
    ),
    "one value for all of a matrix": (
        change(blocks__1__mlp__fc1__weight=torch.ones(1, 1).expand(512, 128)),
        r"blocks\.1\.mlp\.fc1\.weight: .*view of fewer values",
    ),
    "a missing block": (
        lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.0.")],
        "numbered through|tensor 'blocks.0",
    ),
    "no blocks": (
        lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.")],
        "blocks that are numbered through in .*, got none",
    ),
    "no CLS": (lambda w: w.pop("cls_token"), "no tensor cls_token"),
    "no positions": (lambda w: w.pop("pos_embed"), "Expected a layout of"),
    "positions of no square": (change(pos_embed=torch.ones(1, 15, 128)), "a square table of positions"),
    "positions of another dimension": (change(pos_embed=torch.ones(17, 128)), "pos_embed"),
    "flat positions": (change(pos_embed=torch.ones(17)), "pos_embed"),
    "a flat projection of patches": (
        change(patch_embed__proj__weight=torch.ones(128, 588)),
        "patch_embed.proj.weight",
    ),
    "flat registers": (change(register_tokens=torch.ones(4)), "register_tokens"),
    "no width": (change(patch_embed__proj__weight=torch.ones(0, 3, 14, 14)), "num_attention_heads for a width of 0"),
    "patches of no pixels": (change(patch_embed__proj__weight=torch.ones(128, 3, 0, 0)), "image_size"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_are_no_whole_model_are_refused(kind, weights, refused, save):
    damage, message = DAMAGE[kind]
    damage(weights)
    refused(save(weights), f"(?s){message}")


def test_all_that_is_wrong_is_said_at_once(weights, refused, save):
    del weights["norm.bias"]
    weights["extra"] = torch.ones(2)
    weights["cls_token"] = torch.ones(3)
    said = refused(save(weights), "the weights of a whole model")
    assert all(name in said for name in ("norm.bias", "extra", "cls_token"))


def test_a_mask_token_of_another_shape_is_refused_where_it_is_kept(weights, refused, save):
    weights["mask_token"] = torch.ones(3, 128)
    refused(save(weights), "(?s)mask_token", use_mask_token=True)


def test_many_problems_are_counted_rather_than_listed(weights, refused, save):
    weights |= {f"more.{index}": torch.ones(1) for index in range(1000)}
    assert len(refused(save(weights), "and 995 more")) < 2000


def test_values_that_are_no_numbers_are_values(weights, save):
    """Whether weights are good is not asked: NaN is converted as it is."""
    weights["norm.weight"][3] = float("nan")
    model = convert_checkpoint(save(weights)).model
    assert model.layernorm.weight.isnan().nonzero().tolist() == [[3]]


# Configs and indices


@pytest.fixture
def folder(tmp_path):
    """A model as Transformers saves it."""
    dinov2_source(num_hidden_layers=2).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_names_of_transformers_without_their_config_are_refused_with_what_is_missing(folder, refused):
    (folder / "config.json").unlink()
    refused(folder, r"files of Transformers need their config\.json beside them")
    refused(folder / "model.safetensors", r"files of Transformers need their config\.json beside them")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON that can be read in .*config.json"),
        ("[1, 2]", "a JSON object in .*config.json, got list"),
        ("", "JSON that can be read"),
        ("[" * 100_000, "JSON that can be read"),
        ('{"model_type": "swin"}', "model_type 'swin'"),
        ('{"model_type": 7}', "model_type 7"),
        ('{"model_type": ["dinov2"]}', "model_type"),
        ('{"model_type": {"a": 1}}', "model_type"),
    ],
    ids=["cut", "list", "empty", "deep", "other", "number", "in a list", "in an object"],
)
def test_a_damaged_or_foreign_config_is_refused(content, message, folder, refused):
    (folder / "config.json").write_text(content)
    refused(folder, message)


def test_a_config_that_is_no_text_is_refused(folder, refused):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "JSON that can be read")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", value) for value in ("wide", -3, 0, 64.5, None, 10**9, [128])),
        *(("num_attention_heads", value) for value in (0, 3, -2, "two", None)),
        *(("patch_size", value) for value in (0, "fourteen", [1, 2, 3])),
        *(("num_hidden_layers", value) for value in (0, 3, 10**9, "many")),
        *(("hidden_act", value) for value in ("no such function", 7)),
        *(("layer_norm_eps", value) for value in ("small", None)),
        *(("image_size", value) for value in (57, "large", 0)),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(field, value, folder, refused):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    refused(folder, "Expected")


@pytest.fixture
def timm_folder(tmp_path):
    """A model as timm saves it."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    (tmp_path / "timm").mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / "model.safetensors")
    return tmp_path / "timm"


def test_a_config_of_timm_with_more_blocks_than_tensors_is_refused_before_they_are_built(timm_folder, refused):
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}}
    (timm_folder / "config.json").write_text(json.dumps(config))
    refused(timm_folder, "weights of 1000000000 blocks")


def test_a_block_of_a_number_beyond_all_tensors_is_refused(timm_folder, refused):
    (timm_folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    save_file(
        {"blocks.999999999.x": torch.ones(1), "patch_embed.proj.weight": torch.ones(64, 3, 16, 16)},
        timm_folder / "model.safetensors",
    )
    refused(timm_folder, "weights of 1000000000 blocks")


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": 7},
        {"architecture": ["vit_tiny_patch16_224"]},
        {"architecture": "os.system"},
        {"architecture": "vit_tiny_patch16_224", "model_args": {"patch_size": 0}},
        {"architecture": "vit_tiny_patch16_224", "model_args": {"norm_layer": "os.system"}},
        {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": "two"}},
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": [1]},
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": 7}},
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": 3}},
    ],
    ids=str,
)
def test_a_config_of_timm_of_wrong_types_is_refused(config, timm_folder, refused):
    (timm_folder / "config.json").write_text(json.dumps(config))
    refused(timm_folder, "Expected (a config|an architecture|arguments)")


INDICES = {
    "a missing file": ({"a": "model-00001-of-00002.safetensors"}, "the file 'model-00001-of-00002.safetensors'"),
    "a path outside": ({"a": "../secret.safetensors"}, r"the file '\.\./secret\.safetensors'"),
    "an absolute path": ({"a": "/etc/passwd"}, "the file '/etc/passwd'"),
    "the folder itself": ({"a": "."}, r"the file '\.'"),
    "a number": ({"a": 7}, "the file '7'"),
    "nothing": ({}, "weight_map with the file of every tensor"),
    "a list": (["a"], "weight_map with the file of every tensor"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_of_other_files_is_refused(kind, folder, refused):
    mapped, message = INDICES[kind]
    save_file({"a": torch.ones(1)}, folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
    refused(folder, message)


def test_an_index_of_a_tensor_that_no_shard_has_is_refused(folder, refused):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": "model.safetensors"}}))
    refused(folder, "tensors that model.safetensors.index.json names, got none called 'gone'")


# What was asked for


def test_an_unknown_layout_is_refused_with_those_there_are(weights, refused, save):
    refused(save(weights), "a layout of dinov2_with_registers, .*dinov2.*got 'dinov9'", layout="dinov9")


@pytest.mark.parametrize("layout", ["dinov3", "open_clip", "timm", "vit", "transformers_dinov2", "clip"])
def test_another_layout_than_that_of_the_file_is_refused(layout, weights, refused, save):
    refused(save(weights), "Expected", layout=layout)


def test_a_checkpoint_of_this_family_is_refused(refused, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ViTRegModel(ViTRegConfig(**sizes)).save_pretrained(tmp_path / "own")
    refused(tmp_path / "own", "another family, got .*own, which is of ViTReg already")


def test_an_unknown_layout_of_weights_is_refused_with_what_they_look_like(refused, save):
    refused(save({"encoder.conv1.weight": torch.ones(2)}), r"with tensors such as encoder\.conv1\.weight")


@pytest.mark.parametrize("heads", [3, 256, -2, 0.5])
def test_heads_that_do_not_divide_the_width_are_refused(heads, weights, refused, save):
    refused(save(weights), "num_attention_heads", num_attention_heads=heads)


HEADS = {
    "too narrow": (
        {"weight": torch.ones(7, 128), "bias": torch.ones(7)},
        "of 256 or more .* got one of 128",
    ),
    "of another width": ({"weight": torch.ones(7, 300), "bias": torch.ones(7)}, "a multiple of 128, got one of 300"),
    "of more layers than there are": (
        {"weight": torch.ones(7, 5 * 128), "bias": torch.ones(7)},
        r"num_classifier_layers to be at most num_hidden_layers \(2\), got 4",
    ),
    "without a bias": ({"weight": torch.ones(7, 256)}, "weight and bias of a linear head"),
    "of other names": (
        {"fc.weight": torch.ones(7, 256), "fc.bias": torch.ones(7)},
        "weight and bias of a linear head",
    ),
    "with more": (
        {"weight": torch.ones(7, 256), "bias": torch.ones(7), "scale": torch.ones(7)},
        "weight and bias of a linear head",
    ),
    "of a bias of another length": ({"weight": torch.ones(7, 256), "bias": torch.ones(8)}, "linear_head.bias"),
    "flat": ({"weight": torch.ones(256), "bias": torch.ones(7)}, "linear_head.weight"),
    "of no classes": ({"weight": torch.ones(0, 256), "bias": torch.ones(0)}, "Expected"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_do_not_fit_are_refused(kind, weights, refused, save):
    head, message = HEADS[kind]
    refused(save(weights), message, head=save(head, "head.pth"))


def test_a_missing_head_is_refused(weights, refused, save, tmp_path):
    refused(save(weights), r"gone\.pth", head=tmp_path / "gone.pth")


def test_a_folder_that_is_there_is_not_replaced_unasked(weights, refused, save, tmp_path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes.txt").write_text("precious")
    refused(save(weights), "a new folder, got .*converted, which is there")


def test_a_file_in_place_of_the_folder_is_not_replaced(weights, refused, save, tmp_path):
    (tmp_path / "converted").write_text("precious")
    for overwrite in (False, True):
        refused(save(weights), "a new folder, got .*converted, which is a file", overwrite=overwrite)


def test_where_to_save_is_checked_before_the_source_is_opened(refused, tmp_path):
    """A source on the Hub can be gigabytes."""
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes.txt").write_text("precious")
    refused("nobody/nothing", "a new folder, got .*converted")
