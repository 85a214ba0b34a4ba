"""Numbers of a state that are read together equal those of `channels`, one by one; a pass those of instruments."""

import pytest
import torch

from vitreg_hf import ViTRegModel
from vitreg_hf.analysis.channels import infinity_norm, kurtosis, massive_activations, sigma_outliers
from vitreg_hf.analysis.extract import read, subject_of
from vitreg_hf.analysis.measure import measure_batch
from vitreg_hf.analysis.recorder import Readers
from vitreg_hf.analysis.sinks import received_attention
from vitreg_hf.analysis.stream_numbers import stream_numbers
from vitreg_hf.analysis.token_norms import patch_norms


def slow_numbers(state):
    """One image at a time, one instrument at a time."""
    found = []
    for one in state.float().split(1):
        place = one.abs().flatten().argmax().item()
        has_ratio = one.abs().median() > 0
        massive, relative = (
            massive_activations(one, absolute=rule).total if has_ratio else 0 for rule in (100.0, 0.0)
        )
        found.append(
            {
                "infinity_norm": infinity_norm(one)[0],
                "kurtosis": kurtosis(one)[0].float(),
                "sigma_outliers": sigma_outliers(one).sum(),
                "massive": torch.tensor(massive),
                "relatively_massive": torch.tensor(relative),
                "peak": torch.tensor(divmod(place, one.shape[2])),
            }
        )
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def states():
    torch.manual_seed(0)
    plain = torch.randn(3, 7, 16)
    shifted = plain + 5
    massive = plain.clone()
    massive[0, 2, 3], massive[0, 4, 3], massive[2, 0, 1] = -3000.0, 2000.0, 900.0  # image 1 has none
    small = 0.01 * massive  # massive by the relative rule alone
    exact = torch.ones(1, 7, 16)
    exact[0, 0, 0], exact[0, 0, 1] = 1000.0, 999.0  # just as large as the rule says, and not
    mostly_zero = torch.zeros(2, 7, 16)
    mostly_zero[:, 0, 0] = 500.0
    return {
        "plain": plain,
        "shifted": shifted,
        "massive": massive,
        "small": small,
        "exact": exact,
        "mostly zero": mostly_zero,
        "half precision": massive.bfloat16(),
    }


@pytest.mark.parametrize("name", states())
def test_read_together_they_equal_one_by_one(name):
    state = states()[name]
    ours, expected = stream_numbers(state), slow_numbers(state)
    assert ours.keys() == expected.keys()
    for number, value in ours.items():  # counts and places are equal, kurtosis up to rounding to float32
        torch.testing.assert_close(value, expected[number], rtol=1e-6, atol=0)


def test_massive_ones_are_found_by_both_rules():
    numbers = {name: stream_numbers(state) for name, state in states().items()}
    assert numbers["massive"]["massive"].tolist() == [2, 0, 1]
    assert (numbers["small"]["massive"].tolist(), numbers["small"]["relatively_massive"].tolist()) == (
        [0, 0, 0],
        [2, 0, 1],
    )
    assert numbers["exact"]["massive"].tolist() == [1]
    assert numbers["massive"]["peak"].tolist()[0] == [2, 3]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_refused(wrong):
    state = torch.randn(2, 3, 4)
    state[1, 2, 3] = wrong
    with pytest.raises(ValueError, match="finite activations"):
        stream_numbers(state)


def test_a_pass_measures_what_the_instruments_say(make_config):
    """`measure_batch` computes attention itself; here PyTorch does, and each number is of its own instrument."""
    subject = subject_of(ViTRegModel(make_config()), device="cpu")
    layout, pixels = subject.layout, torch.randn(3, 3, 32, 48)
    measured = measure_batch(subject, pixels)
    readers = Readers(hidden=lambda _, state: state, attention=lambda _, call: call.probabilities())
    recorded = read(subject, pixels, readers)
    for layer, state in enumerate(recorded.hidden):
        expected = {**slow_numbers(state), "norms": patch_norms(state, layout)}
        expected["prefix_norms"] = layout.prefix_tokens(state).norm(dim=-1)
        for name, value in expected.items():
            torch.testing.assert_close(measured[name][:, layer], value, rtol=1e-5, atol=1e-6)
    received = torch.stack([received_attention(probabilities) for probabilities in recorded.attention], dim=1)
    expected = {"received": received.mean(dim=2), "received_prefix": layout.prefix_of(received)}
    expected["received_patch"] = layout.patches_of(received).amax(dim=-1)
    for name, value in expected.items():
        torch.testing.assert_close(measured[name], value, rtol=1e-5, atol=1e-6)
