"""Image sizes at run time, padding, and every wrong input with its message."""

import pytest
import torch

from vitreg_hf import ViTRegForImageClassification, ViTRegForMaskedImageModeling, ViTRegModel


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (40, 24), (72, 8)])
def test_any_size_that_the_patch_size_divides(make_config, size):
    outputs = ViTRegModel(make_config()).eval()(torch.randn(2, 3, *size))
    assert outputs.patch_map.shape == (2, 32, size[0] // 8, size[1] // 8)


def test_pairs_for_image_and_patch_size(make_config):
    model = ViTRegModel(make_config(image_size=(32, 48), patch_size=(8, 4))).eval()
    assert model.embeddings.position_embeddings.shape == (1, 1 + 4 * 12, 32)
    assert model(torch.randn(1, 3, 16, 20)).patch_map.shape == (1, 32, 2, 5)


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(make_config, channels):
    assert (
        ViTRegModel(make_config(num_channels=channels))(torch.randn(1, channels, 32, 32)).patch_tokens.shape[1] == 16
    )


def test_a_size_that_the_patch_size_does_not_divide_is_an_error(make_config):
    with pytest.raises(
        ValueError, match=r"image size that the patch size 8 x 8 divides, got 37 x 45.*pad_to_patch_size"
    ):
        ViTRegModel(make_config())(torch.randn(1, 3, 37, 45))


def test_padding_to_the_patch_size_adds_zeros_at_right_and_bottom(make_config):
    padding = ViTRegModel(make_config(pad_to_patch_size=True)).eval()
    plain = ViTRegModel(make_config()).eval()
    plain.load_state_dict(padding.state_dict())
    pixels = torch.randn(1, 3, 37, 45)
    by_hand = torch.zeros(1, 3, 40, 48)
    by_hand[..., :37, :45] = pixels
    torch.testing.assert_close(padding(pixels).last_hidden_state, plain(by_hand).last_hidden_state)


WRONG_INPUTS = [
    ((None,), {}, ValueError, "Expected pixel_values of shape .*got None"),
    (
        (torch.zeros(1, 1, 32, 32),),
        {},
        ValueError,
        r"Expected pixel_values of shape \(batch, 3, .*got \(1, 1, 32, 32\)",
    ),
    ((torch.zeros(3, 32, 32),), {}, ValueError, r"Expected pixel_values of shape .*got \(3, 32, 32\)"),
    (
        (torch.zeros(2, 3, 32, 32),),
        {"pixel_mask": torch.ones(2, 16, 32)},
        ValueError,
        r"Expected pixel_mask of shape \(2, 32, 32\), got \(2, 16, 32\)",
    ),
    (
        (torch.zeros(1, 3, 32, 32),),
        {"pixel_mask": torch.eye(32)[None]},
        ValueError,
        "Expected pixel_mask to mark one rectangle at the top left",
    ),
    (
        (torch.zeros(1, 3, 32, 32),),
        {"bool_masked_pos": torch.ones(1, 16)},
        ValueError,
        "Expected use_mask_token=True in the config for bool_masked_pos, got False",
    ),
    (
        (torch.zeros(1, 3, 32, 32),),
        {"output_prefix_attentions": [3]},
        ValueError,
        r"Expected layers from -3 to 2 in output_prefix_attentions, got \[3\]",
    ),
    ((torch.zeros(1, 3, 32, 32),), {"output_atentions": True}, TypeError, "unexpected keyword.*'output_atentions'"),
    (
        (torch.zeros(1, 3, 32, 32),),
        {"interpolate_pos_encoding": True},
        TypeError,
        "'interpolate_pos_encoding': positions always adapt to the image",
    ),
    (([[1.0]],), {}, ValueError, "Expected pixel_values as a torch tensor, got list"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), WRONG_INPUTS, ids=lambda value: str(value)[:30])
def test_wrong_inputs_say_what_was_expected_and_what_came(make_config, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ViTRegModel(make_config())(*args, **kwargs)


def test_arguments_that_are_none_are_no_mistake(make_config):
    model = ViTRegModel(make_config()).eval()
    pixels = torch.randn(1, 3, 32, 32)
    outputs = model(pixels, attention_mask=None, interpolate_pos_encoding=None)
    assert torch.equal(outputs.last_hidden_state, model(pixels).last_hidden_state)


def test_a_mask_of_the_wrong_length_is_refused(make_config):
    model = ViTRegForMaskedImageModeling(make_config())
    with pytest.raises(ValueError, match=r"Expected bool_masked_pos of shape \(1, 16\), got \(1, 9\)"):
        model(torch.zeros(1, 3, 32, 32), bool_masked_pos=torch.ones(1, 9))


def test_prefix_attention_needs_a_prefix(make_config):
    model = ViTRegModel(make_config(use_cls_token=False, pooling="mean", num_register_tokens=0))
    with pytest.raises(ValueError, match="Expected a model with CLS or registers for output_prefix_attentions"):
        model(torch.zeros(1, 3, 32, 32), output_prefix_attentions=True)


class TestPaddedBatches:
    """Images of several sizes, padded to one: each must come out as it does alone."""

    sizes = ((40, 24), (48, 48), (16, 40))

    @pytest.fixture
    def batch(self):
        images = [torch.randn(3, *size) for size in self.sizes]
        pixels, mask = torch.full((3, 3, 48, 48), 7.0), torch.zeros(3, 48, 48, dtype=torch.long)
        for index, image in enumerate(images):
            height, width = image.shape[-2:]
            pixels[index, :, :height, :width] = image
            mask[index, :height, :width] = 1
        return images, pixels, mask

    @pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "cls_register_mean"])
    @pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
    @torch.no_grad()
    def test_equal_to_one_by_one(self, make_config, batch, backend, pooling):
        images, pixels, mask = batch
        model = ViTRegForImageClassification(make_config(pooling=pooling, attn_implementation=backend)).eval()
        together = model(pixels, pixel_mask=mask)
        for index, image in enumerate(images):
            alone = model(image[None])
            torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
            rows, columns = alone.patch_map.shape[-2:]
            own = together.patch_map[index, :, :rows, :columns]
            torch.testing.assert_close(own, alone.patch_map[0], atol=1e-5, rtol=1e-5)

    def test_nothing_attends_to_padding(self, make_config, batch):
        _, pixels, mask = batch
        outputs = ViTRegModel(make_config()).eval()(
            pixels, pixel_mask=mask, output_attentions=True, output_prefix_attentions=True
        )
        padding = torch.cat([torch.zeros(3, 5, dtype=torch.bool), ~outputs.patch_mask], dim=1)
        for attention in (*outputs.attentions, *outputs.prefix_attentions):
            on_padding = attention.masked_select(padding[:, None, None, :].expand_as(attention))
            assert on_padding.numel()
            assert (on_padding == 0).all()
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))

    def test_the_mask_of_patches_is_returned(self, make_config, batch):
        _, pixels, mask = batch
        outputs = ViTRegModel(make_config()).eval()(pixels, pixel_mask=mask)
        assert outputs.patch_mask.sum(1).tolist() == [5 * 3, 6 * 6, 2 * 5]
        assert ViTRegModel(make_config())(pixels).patch_mask is None

    def test_partly_real_patches_count_when_padding_to_the_patch_size(self, make_config):
        model = ViTRegModel(make_config(pad_to_patch_size=True)).eval()
        pixels, mask = torch.randn(1, 3, 37, 45), torch.ones(1, 37, 45)
        assert model(pixels, pixel_mask=mask).patch_mask.sum() == 5 * 6
        mask[:, :, 17:] = 0
        assert model(pixels, pixel_mask=mask).patch_mask.sum() == 5 * 3


class TestPositionsFollowTheWeights:
    """Whatever changes the table of positions changes what comes out, at sizes seen before too."""

    pixels = torch.randn(1, 3, 48, 24)

    @pytest.fixture
    def model(self, make_config):
        model = ViTRegModel(make_config()).eval()
        with torch.no_grad():
            model(self.pixels)
        return model

    def expected(self, model, table):
        """The same network made anew around a table."""
        other = ViTRegModel(model.config).eval()
        other.load_state_dict({**model.state_dict(), "embeddings.position_embeddings": table})
        return other(self.pixels).last_hidden_state

    @torch.no_grad()
    def test_written_in_place_or_behind_autograd(self, model):
        table = model.embeddings.position_embeddings
        for write in (lambda: table.mul_(2), lambda: table.data.mul_(0.3), lambda: table.data.add_(1.0)):
            write()
            wanted = self.expected(model, table.clone())
            torch.testing.assert_close(model(self.pixels).last_hidden_state, wanted)

    @torch.no_grad()
    def test_replaced(self, model):
        for _ in range(4):  # freed memory is used again, so an address says nothing
            table = torch.randn_like(model.embeddings.position_embeddings)
            wanted = self.expected(model, table)
            model.load_state_dict({**model.state_dict(), "embeddings.position_embeddings": table}, assign=True)
            torch.testing.assert_close(model(self.pixels).last_hidden_state, wanted)

    @torch.no_grad()
    def test_called_with_other_weights(self, model):
        for _ in range(4):
            table = torch.randn_like(model.embeddings.position_embeddings)
            weights = {"embeddings.position_embeddings": table}
            got = torch.func.functional_call(model, weights, (self.pixels,)).last_hidden_state
            torch.testing.assert_close(got, self.expected(model, table))

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own attention under vmap
    @torch.no_grad()
    def test_an_ensemble_by_vmap(self, make_config):
        models = [ViTRegModel(make_config()).eval() for _ in range(3)]
        parameters, buffers = torch.func.stack_module_state(models)

        def tokens(parameters, buffers):
            return torch.func.functional_call(models[0], (parameters, buffers), (self.pixels,)).cls_token

        together = torch.func.vmap(tokens)(parameters, buffers)
        alone = torch.stack([model(self.pixels).cls_token for model in models])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_autocast_leaves_nothing_behind(self, model):
        before = model(self.pixels).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(self.pixels)
        assert torch.equal(model(self.pixels).last_hidden_state, before)
