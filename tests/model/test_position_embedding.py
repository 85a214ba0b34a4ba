import pytest
import torch
import torch.nn.functional as F

from vitreg_hf.model.position_embedding import InterpolationRule, PositionInterpolation

GRIDS = [(7, 5), (37, 37), (3, 29), (13, 12), (1, 1), (15, 10)]
RULES = [InterpolationRule(m, a, o) for m in ("bicubic", "bilinear") for a in (False, True) for o in (0.0, 0.1)]


def interpolate_positions(table, grid, rule, true_grids=None):
    return PositionInterpolation(rule, tuple(table.shape[:2]))(table, grid, true_grids)


def reference(table, grid, rule):
    """What the sources do: `F.interpolate` by size, or by scale factor where there is an offset."""
    image = table.permute(2, 0, 1)[None]
    factors = tuple((n + rule.offset) / m for n, m in zip(grid, table.shape[:2], strict=True))
    target = {"scale_factor": factors} if rule.offset else {"size": grid}
    resized = F.interpolate(image, **target, mode=rule.mode, antialias=rule.antialias, align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1)[None]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_same_numbers_as_torch_interpolate(rule, grid):
    table = torch.randn(14, 11, 8)
    torch.testing.assert_close(
        interpolate_positions(table, grid, rule), reference(table, grid, rule), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_table_itself_at_its_own_size(rule):
    table = torch.randn(6, 9, 4)
    torch.testing.assert_close(interpolate_positions(table, (6, 9), rule)[0], table.flatten(0, 1), atol=1e-6, rtol=0)


def test_a_wrong_rule_shows():
    table = torch.randn(14, 14, 8)
    outputs = [interpolate_positions(table, (10, 9), rule) for rule in RULES]
    for i, first in enumerate(outputs):
        for second in outputs[i + 1 :]:
            assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_padded_images_have_the_positions_they_have_alone(rule):
    table = torch.randn(5, 7, 4)
    true_grids = torch.tensor([[6, 3], [4, 8], [5, 7]])
    together = interpolate_positions(table, (6, 8), rule, true_grids).unflatten(1, (6, 8))
    for positions, (rows, columns) in zip(together, true_grids.tolist(), strict=True):
        alone = interpolate_positions(table, (rows, columns), rule)[0].unflatten(0, (rows, columns))
        torch.testing.assert_close(positions[:rows, :columns], alone, atol=1e-6, rtol=0)
    assert together.isfinite().all()


def test_gradients_are_those_of_torch_interpolate():
    rule = InterpolationRule("bicubic", True, 0.0)
    ours, theirs = (torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    weights = torch.randn(1, 99, 4)
    (interpolate_positions(ours, (11, 9), rule) * weights).sum().backward()
    (reference(theirs, (11, 9), rule) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=0)


def test_half_precision_tables_are_resized_in_float32():
    rule, table = InterpolationRule("bicubic", True, 0.0), torch.randn(6, 6, 4).bfloat16()
    resized = interpolate_positions(table, (9, 4), rule)
    assert resized.dtype == torch.bfloat16
    torch.testing.assert_close(resized, interpolate_positions(table.float(), (9, 4), rule).bfloat16())


class TestKeptWeights:
    """Weights of a size are computed once; the table they are applied to may be another at every call."""

    @pytest.fixture
    def interpolation(self):
        return PositionInterpolation(InterpolationRule("bicubic", True, 0.0), (4, 4), max_sizes=3)

    def test_computed_once_per_size(self, interpolation, monkeypatch):
        computed = []
        weights = InterpolationRule.weights
        monkeypatch.setattr(InterpolationRule, "weights", lambda self, *a: computed.append(a) or weights(self, *a))
        for _ in range(3):
            interpolation(torch.randn(4, 4, 2), (6, 5))
        assert len(computed) == 2  # one per axis
        interpolation(torch.randn(4, 4, 2), (6, 5), cached=False)
        assert len(computed) == 4

    def test_every_table_gets_its_own_positions(self, interpolation):
        for _ in range(3):
            table = torch.randn(4, 4, 2)
            expected = reference(table, (6, 5), interpolation.rule)
            torch.testing.assert_close(interpolation(table, (6, 5)), expected, atol=2e-5, rtol=0)

    def test_a_bounded_number_of_sizes(self, interpolation):
        for size in range(5, 12):
            interpolation(torch.randn(4, 4, 2), (size, size))
        assert len(interpolation._kept) == 3

    def test_what_inference_mode_kept_is_not_used_where_gradients_are_recorded(self, interpolation):
        table = torch.randn(4, 4, 2, requires_grad=True)
        with torch.inference_mode():
            interpolation(table, (6, 5))
        interpolation(table, (6, 5)).sum().backward()
        assert table.grad.abs().sum() > 0

    def test_fake_tensors_are_not_kept(self, interpolation):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            interpolation(torch.randn(4, 4, 2), (6, 5))
        assert interpolation(torch.randn(4, 4, 2), (6, 5)).isfinite().all()


def test_autocast_does_not_lower_the_precision():
    interpolation, table = PositionInterpolation(InterpolationRule("bicubic", True, 0.0), (4, 4)), torch.randn(4, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = interpolation(table, (6, 5))
    assert torch.equal(lowered, interpolation(table, (6, 5)))
