# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from vitreg_hf import ViTRegModel
from vitreg_hf.analysis.extract import subject_of
from vitreg_hf.analysis.register_counts import (
    as_markdown,
    compare,
    count_table,
    findings,
    measure_tokens,
    patch_tokens,
)


@pytest.fixture
def measured(make_config):
    """Measures of a model with a number of registers on some noise."""

    def measure(registers, **overrides):
        model = ViTRegModel(make_config(num_register_tokens=registers, **overrides))
        subject = subject_of(model, device="cpu")
        return subject, measure_tokens(subject, [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 32, 32)])

    return measure


def test_registers_are_measured_where_there_are_some(measured):
    assert {name for name in measured(0)[1] if "register" in name} == set()
    assert {name for name in measured(1)[1] if "register" in name} == {"register_norm", "register_norm_spread"}
    assert "register_similarity" in measured(3)[1]


@pytest.mark.parametrize("separate", [False, True])
def test_the_measures_are_those_of_the_last_block(make_config, separate):
    subject = subject_of(ViTRegModel(make_config(separate_cls_norm=separate)), device="cpu")
    if separate:
        torch.nn.init.normal_(subject.model.cls_norm.weight)
    pixels = torch.randn(4, 3, 32, 32)
    norms = []
    subject.model.layers[-1].register_forward_hook(lambda module, inputs, output: norms.append(output))
    normed = subject.model(pixels, return_dict=True)
    last = norms[0]
    patches, registers = last[:, 5:].norm(dim=-1), last[:, 1:5].norm(dim=-1)
    found = measure_tokens(subject, [pixels[:1], pixels[1:]])
    expected = (patches.amax(1) / patches.median(1).values).mean().item()
    assert found["largest_over_median"] == pytest.approx(expected, rel=1e-5)
    assert found["register_norm"] == pytest.approx((registers.mean() / patches.median()).item(), rel=1e-5)
    unit = torch.nn.functional.normalize(normed.register_tokens, dim=-1)
    cosines = (unit @ unit.mT).flatten(1)[:, [1, 2, 3, 6, 7, 11]]
    assert found["register_similarity"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert torch.allclose(patch_tokens(subject, pixels), normed.patch_tokens, atol=1e-5)


def test_a_planted_outlier_is_counted(make_config):
    model = ViTRegModel(make_config(num_register_tokens=0))
    subject = subject_of(model, device="cpu")
    model.layers[-1].register_forward_hook(lambda module, inputs, output: scaled(output))
    found = measure_tokens(subject, [torch.randn(4, 3, 32, 32)])
    assert found["outlier_share"] == pytest.approx(1 / 16)
    assert found["outlier_share_before_last"] == 0
    assert found["largest_over_median"] > 10


def scaled(tokens):
    """The third of 16 patches behind CLS, twenty times as long."""
    return torch.cat([tokens[:, :3], 20 * tokens[:, 3:4], tokens[:, 4:]], dim=1)


def runs(**by_count):
    return {int(count[1:]): [{"accuracy": value} for value in values] for count, values in by_count.items()}


def test_what_differs_is_told_and_what_does_not_is_said():
    compared = compare(runs(R0=[0.90, 0.91, 0.92], R1=[0.905, 0.905, 0.92], R4=[0.95, 0.96, 0.97]))
    changes = compared["accuracy"]["change"]
    assert changes["4"]["verdict"] == "higher"
    assert changes["1"]["verdict"] == "no difference that 3 seeds can tell"
    assert findings(compared, [0, 1, 4]) == [
        "accuracy, against R = 0: R = 1: no difference that 3 seeds can tell; R = 4: higher."
    ]
    table = as_markdown(count_table(compared, [0, 1, 4], 3))
    assert "| 0 | 91 ± 2.5 |" in table
    assert table.count("*") == 1


def test_one_seed_tells_nothing():
    compared = compare(runs(R0=[0.9], R4=[1.0]))
    assert compared["accuracy"]["change"]["4"]["verdict"] == "one seed tells no difference from noise"
    assert "| 4 | 100 |" in as_markdown(count_table(compared, [0, 4], 1))


def test_speeds_are_compared_within_a_seed():
    """The second seed was measured on a machine that was half as fast."""
    speeds = {0: (100.0, 50.0, 100.0), 4: (90.0, 45.0, 90.5)}
    compared = compare({count: [{"images_per_second": one} for one in all_of] for count, all_of in speeds.items()})
    assert compared["images_per_second"]["mean"]["0"]["mean"] == pytest.approx(1)
    assert compared["images_per_second"]["mean"]["4"]["mean"] == pytest.approx(0.9, abs=0.01)
    assert compared["images_per_second"]["change"]["4"]["verdict"] == "lower"


def test_what_the_first_does_not_have_is_not_compared():
    several = {0: [{"accuracy": 1.0}] * 2, 1: [{"accuracy": 1.0, "register_norm": 2.0}] * 2}
    compared = compare(several)
    assert "change" not in compared["register_norm"]
    assert compared["accuracy"]["change"]["1"]["verdict"] == "equal"
    assert "| 0 | 100 | - |" in as_markdown(count_table(compared, [0, 1], 2))


def test_it_is_said_when_there_is_nothing_to_repair():
    def shares(last, before):
        return [{"outlier_share": last, "outlier_share_before_last": before}] * 2

    assert "nothing to repair" in findings(compare({0: shares(0, 0), 4: shares(0, 0)}), [0, 4])[0]
    for with_outliers in (shares(0.02, 0), shares(0, 0.02)):
        assert "nothing to repair" not in findings(compare({0: with_outliers, 4: shares(0, 0)}), [0, 4])[0]
