"""Checkpoints of trainings: whatever is around the model is taken off, or the file is refused with what to do."""

import itertools

import pytest
import torch
from torch import nn

from vitreg_hf.conversion.convert import convert_checkpoint

from .reference_files import SIZES, SIZES_OF_16, dinov2_file, dinov2_source, dinov3_file, dinov3_source, tokens_of


@pytest.fixture
def teacher(filled):
    return filled(dinov2_source())


@pytest.fixture
def student(filled):
    return filled(dinov2_source())


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def chunked(weights, chunks, depth=4):
    """Blocks in chunks as DINOv2's FSDP trainings keep them: chunks are padded, so that numbers go through."""
    size = depth // chunks
    named = {}
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = name.replace(f"blocks.{number}.", f"blocks.{number // size}.{number}.")
        named[name] = tensor
    return named


def heads_of_dino(prefix=""):
    """Heads of the self-supervised training."""
    names = ("dino_head.mlp.0.weight", "dino_head.last_layer.weight_g", "ibot_head.mlp.0.weight")
    return {prefix + name: torch.randn(8, 8) for name in names}


def state_of_adam(weights):
    moments = {index: {"step": torch.tensor(7.0), "exp_avg": t, "exp_avg_sq": t} for index, t in enumerate(weights)}
    return {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}


def of_evaluation(teacher, student):
    """`eval/training_<n>/teacher_checkpoint.pth` of DINOv2."""
    return {"teacher": {**prefixed(chunked(dinov2_file(teacher), 4), "backbone."), **heads_of_dino()}}


def of_training(teacher, student):
    """A training's own checkpoint, with optimizer, scheduler and iteration."""
    model = {
        **prefixed(dinov2_file(student), "student.backbone."),
        **heads_of_dino("student."),
        **prefixed(dinov2_file(teacher), "teacher.backbone."),
        **heads_of_dino("teacher."),
        "dino_loss.center": torch.zeros(1, 8),
    }
    optimizer = state_of_adam(dinov2_file(student).values())
    return {"model": model, "optimizer": optimizer, "scheduler": {"last_epoch": 3}, "iteration": 7}


def of_dinov1(teacher, student):
    """Student and teacher side by side, the student in DistributedDataParallel."""
    student = prefixed(dinov2_file(student), "module.backbone.")
    return {"student": student, "teacher": prefixed(dinov2_file(teacher), "backbone."), "epoch": 3, "args": None}


def of_average(teacher, student):
    """A model and its average."""
    return {"model": dinov2_file(student), "model_ema": dinov2_file(teacher)}


def of_lightning(teacher, student):
    return {
        "epoch": 3,
        "global_step": 100,
        "state_dict": {
            **prefixed(dinov2_file(teacher), "model.teacher.backbone."),
            **prefixed(dinov2_file(student), "model.student.backbone."),
        },
    }


WRAPPED = {
    "blocks in one chunk": lambda teacher, _: chunked(dinov2_file(teacher), 1),
    "blocks in four chunks": lambda teacher, _: chunked(dinov2_file(teacher), 4),
    "DataParallel": lambda teacher, _: prefixed(dinov2_file(teacher), "module."),
    "torch.compile": lambda teacher, _: prefixed(dinov2_file(teacher), "_orig_mod."),
    "compiled in DataParallel": lambda teacher, _: prefixed(dinov2_file(teacher), "module._orig_mod."),
    "FSDP around every block": lambda teacher, _: {
        "_fsdp_wrapped_module." + name.replace("attn.", "attn._fsdp_wrapped_module."): tensor
        for name, tensor in chunked(dinov2_file(teacher), 2).items()
    },
    "activation checkpointing": lambda teacher, _: {
        name.replace(".norm1", "._checkpoint_wrapped_module.norm1"): tensor
        for name, tensor in dinov2_file(teacher).items()
    },
    "teacher for evaluation": of_evaluation,
    "whole training": of_training,
    "DINO": of_dinov1,
    "model and average": of_average,
    "Lightning": of_lightning,
    "in a dictionary": lambda teacher, _: {"model": dinov2_file(teacher)},
    "in two dictionaries": lambda teacher, _: {"checkpoint": {"state_dict": dinov2_file(teacher)}},
    "beside numbers and texts": lambda teacher, _: {
        "state_dict": dinov2_file(teacher),
        "epoch": 3,
        "arch": "vit_small",
        "lr": 0.1,
        "best": None,
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_model_inside_is_converted(kind, teacher, student, save_source, assert_same_outputs):
    path = save_source(WRAPPED[kind](teacher, student), file="checkpoint.pth")
    converted = convert_checkpoint(path)
    assert converted.report.layout == "dinov2"
    assert len(converted.report.notes) >= 1
    assert_same_outputs(tokens_of(teacher), converted.model, SIZES[1:], images=1)


@pytest.mark.parametrize("order", list(itertools.permutations(["student", "teacher", "model_ema", "gram_teacher"], 3)))
def test_the_teacher_is_taken_in_whatever_order_they_are_saved(order, filled, save_source):
    """DINOv3 saves {"model": ...} with all of them, student first."""
    files = {name: dinov3_file(filled(dinov3_source(num_hidden_layers=1))) for name in order}
    model = {}
    for name, weights in files.items():
        model |= prefixed(weights, f"{name}.backbone.") | heads_of_dino(f"{name}.")
    converted = convert_checkpoint(save_source({"model": model, "iteration": 7}, file="checkpoint.pth"))
    wanted = next(name for name in ("teacher", "model_ema", "student") if name in order)
    assert torch.equal(converted.model.embeddings.cls_token, files[wanted]["cls_token"])
    assert any(f"model.{wanted}.backbone." in note for note in converted.report.notes)


def test_dinov3_in_a_training_file(filled, save_source, assert_same_outputs):
    source, other = filled(dinov3_source(), std=0.1), filled(dinov3_source())
    model = {**prefixed(dinov3_file(other), "student.backbone."), **prefixed(dinov3_file(source), "teacher.backbone.")}
    converted = convert_checkpoint(save_source({"model": model}, file="checkpoint.pth"))
    assert converted.report.layout == "dinov3"
    assert_same_outputs(tokens_of(source), converted.model, SIZES_OF_16[1:], images=1)


def test_what_is_left_out_is_named_with_its_reason(teacher, student, save_source):
    report = convert_checkpoint(save_source(of_training(teacher, student), file="checkpoint.pth")).report
    for name, reason in (
        ("model.student.backbone.blocks.0.norm1.weight", "student"),
        ("model.teacher.dino_head.mlp.0.weight", "self-supervised"),
        ("model.dino_loss.center", "loss"),
        ("optimizer.state.0.exp_avg", "optimizer"),
        ("mask_token", "masked patches"),
    ):
        assert reason in report.dropped[name], name
    assert "left out" in str(report)
    used = {row.foreign for row in report.rows}
    assert used | {"mask_token"} == dinov2_file(teacher).keys()


def test_a_linear_classifier_keeps_its_head(teacher, save_source):
    head = {"weight": torch.randn(7, 256), "bias": torch.randn(7)}
    file = {**prefixed(dinov2_file(teacher), "module.backbone."), **prefixed(head, "module.linear_head.")}
    converted = convert_checkpoint(save_source({"model": file}, file="lc.pth"))
    assert converted.reading.has_head
    assert torch.equal(converted.model.classifier.weight, head["weight"])


def test_a_student_alone_is_converted(student, save_source, assert_same_outputs):
    path = save_source({"student": prefixed(dinov2_file(student), "backbone.")}, file="checkpoint.pth")
    assert_same_outputs(tokens_of(student), convert_checkpoint(path).model, SIZES[2:])


# Refused


def test_chunks_that_are_numbered_anew_are_refused(teacher, save_source):
    """Which block is which would be a guess."""
    file = {}
    for name, tensor in dinov2_file(teacher).items():
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = name.replace(f"blocks.{number}.", f"blocks.{number // 2}.{number % 2}.")
        file[name] = tensor
    with pytest.raises(ValueError, match="numbered through their chunks, got numbers that start anew"):
        convert_checkpoint(save_source(file, file="chunks.pth"))


def test_a_missing_chunk_is_refused(teacher, save_source):
    file = {name: t for name, t in chunked(dinov2_file(teacher), 4).items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match="blocks that are numbered through"):
        convert_checkpoint(save_source(file, file="chunks.pth"))


def test_parameters_that_fsdp_flattened_are_refused_with_what_to_do(save_source):
    name = "model.student.backbone._fsdp_wrapped_module._flat_param"
    file = {"model": {name.removeprefix("model."): torch.randn(100)}, "iteration": 3}
    with pytest.raises(ValueError, match=r"flattened.*FULL_STATE_DICT.*teacher_checkpoint\.pth"):
        convert_checkpoint(save_source(file, file="model_final.rank_0.pth"))


@pytest.mark.parametrize(
    "names",
    [
        ("a.", "b."),
        ("a.backbone.", "b.backbone."),
        ("model.a.backbone.", "model.b.backbone."),
        ("x.teacher.", "y.teacher."),
    ],
    ids=str,
)
def test_of_two_models_none_of_which_is_preferred_none_is_taken(names, teacher, student, save_source):
    file = {**prefixed(dinov2_file(teacher), names[0]), **prefixed(dinov2_file(student), names[1])}
    with pytest.raises(ValueError, match=rf"one model, got several, under '{names[0]}', '{names[1]}'"):
        convert_checkpoint(save_source(file, file="two.pth"))


def test_two_models_of_the_same_names_under_wrappers_are_refused(teacher, student, save_source):
    file = {**dinov2_file(teacher), **prefixed(dinov2_file(student), "module.")}
    with pytest.raises(ValueError, match="several whose names are the same without their wrappers"):
        convert_checkpoint(save_source(file, file="two.pth"))


def test_two_tensors_of_one_name_are_refused(teacher, student, save_source):
    """One of them as `a.b`, the other as `b` in a dictionary `a`."""
    file = {**prefixed(dinov2_file(teacher), "model."), "model": dinov2_file(student)}
    with pytest.raises(ValueError, match=r"one tensor of a name, got several called 'model\.cls_token'"):
        convert_checkpoint(save_source(file, file="two.pth"))


def test_a_training_file_without_a_backbone_is_refused(save_source):
    with pytest.raises(ValueError, match="Expected a layout of"):
        convert_checkpoint(save_source({"teacher": heads_of_dino()}, file="heads.pth"))


def test_a_whole_module_is_refused_and_not_run(save_source):
    """As `torch.save(model)` writes it; it cannot be read without running code."""
    path = save_source({"model": nn.Linear(2, 2)}, file="module.pth")
    with pytest.raises(ValueError, match=r"tensors alone, got .*code or objects"):
        convert_checkpoint(path)
