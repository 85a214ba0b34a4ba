import pytest
import torch

from vitreg_hf.model.token_layout import TokenLayout


@pytest.fixture
def layout():
    return TokenLayout(num_cls=1, num_registers=2, num_test_time_registers=1, patch_size=(4, 2))


def test_order_is_cls_registers_patches():
    plain = TokenLayout(num_cls=1, num_registers=2, num_test_time_registers=0, patch_size=(4, 2))
    cls, registers, patches = torch.full((1, 1, 3), 0.0), torch.full((1, 2, 3), 1.0), torch.full((5, 6, 3), 2.0)
    tokens = plain.join(cls, registers, patches)
    assert tokens[:, :, 0].tolist() == [[0, 1, 1, 2, 2, 2, 2, 2, 2]] * 5


def test_views_find_each_kind_and_copy_nothing(layout):
    tokens = torch.arange(10.0).view(1, 10, 1)  # CLS, two registers, one test-time register, 2 x 3 patches
    assert layout.cls_token(tokens).flatten().tolist() == [0]
    assert layout.register_tokens(tokens).flatten().tolist() == [1, 2]
    assert layout.patch_tokens(tokens).flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert layout.patch_map(tokens, (2, 3)).tolist() == [[[[4, 5, 6], [7, 8, 9]]]]
    storage = tokens.untyped_storage().data_ptr()
    for view in (layout.cls_token(tokens), layout.register_tokens(tokens), layout.patch_map(tokens, (2, 3))):
        assert view.untyped_storage().data_ptr() == storage


def test_kinds_that_do_not_exist_are_none():
    bare = TokenLayout(0, 0, 0, (4, 4))
    tokens = torch.randn(2, 6, 3)
    assert bare.cls_token(tokens) is None
    assert bare.register_tokens(tokens) is None
    assert bare.patch_tokens(tokens).shape == (2, 6, 3)


def test_prediction_per_patch_becomes_an_image(layout):
    """The inverse of cutting an image into patches by hand."""
    image = torch.randn(2, 3, 8, 6)
    cut = image.unfold(2, 4, 4).unfold(3, 2, 2)  # (B, C, rows, columns, patch height, patch width)
    assert torch.equal(layout.pixels(cut.permute(0, 1, 4, 5, 2, 3).reshape(2, 24, 2, 3)), image)


def test_marked_patches_become_marked_pixels(layout):
    marked = torch.tensor([[True, False, False, False, False, True]])
    pixels = layout.pixel_mask_of(marked, (2, 3))
    assert pixels.shape == (1, 8, 6)
    assert pixels[0, :4, :2].all()
    assert pixels[0, 4:, 4:].all()
    assert pixels.sum() == 16


def test_a_patch_with_one_real_pixel_takes_part(layout):
    pixel_mask = torch.zeros(1, 8, 6, dtype=torch.long)
    pixel_mask[0, :5, :3] = 1
    patch_mask = layout.patch_mask(pixel_mask)
    assert patch_mask.tolist() == [[True, True, False, True, True, False]]
    assert layout.token_mask(patch_mask).tolist() == [[True] * 4 + patch_mask[0].tolist()]
    assert layout.true_grids(patch_mask, (2, 3)).tolist() == [[2, 2]]


@pytest.mark.parametrize(("size", "missing"), [((8, 6), (0, 0)), ((9, 7), (3, 1)), ((1, 1), (3, 1))])
def test_pixels_missing_to_the_next_patch(layout, size, missing):
    assert layout.missing_pixels(*size) == missing
