"""Eager, SDPA, FlashAttention-2 and flex attention give the same model."""

import importlib.util
import pathlib
import sys

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from vitreg_hf import ViTRegForImageClassification, ViTRegModel

BACKENDS = ["eager", "sdpa", "flex_attention"]


def outputs_of(model, backend, pixels, **kwargs):
    model.config._attn_implementation = backend
    with torch.no_grad():
        return model(pixels, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_equal_to_eager_in_float32(make_config, backend):
    model = ViTRegModel(make_config()).eval()
    pixels = torch.randn(2, 3, 40, 24)
    expected = outputs_of(model, "eager", pixels).last_hidden_state
    torch.testing.assert_close(outputs_of(model, backend, pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_sdpa_are_those_of_eager(make_config):
    model = ViTRegModel(make_config()).eval()
    pixels, gradients = torch.randn(2, 3, 32, 32), {}
    for backend in ("eager", "sdpa"):
        model.config._attn_implementation = backend
        model.zero_grad()
        model(pixels).pooler_output.square().sum().backward()
        gradients[backend] = [p.grad.clone() for p in model.parameters()]
    for eager, sdpa in zip(gradients["eager"], gradients["sdpa"], strict=True):
        torch.testing.assert_close(sdpa, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_its_rounding_allows(make_config, backend, dtype):
    """Backends round at different places. No one may be further from float32 than twice what eager is."""
    model = ViTRegModel(make_config()).eval()
    pixels = torch.randn(4, 3, 32, 32)
    exact = outputs_of(model, "eager", pixels).last_hidden_state
    model.to(dtype)
    own_rounding = (outputs_of(model, "eager", pixels.to(dtype)).last_hidden_state.float() - exact).norm()
    half = outputs_of(model, backend, pixels.to(dtype)).last_hidden_state
    assert half.dtype == dtype
    assert 0 < (half.float() - exact).norm() <= 2 * own_rounding


def test_flex_attention_has_no_backward_on_cpu_and_says_so(make_config):
    model = ViTRegModel(make_config(attn_implementation="flex_attention"))
    with pytest.raises(ValueError, match="Expected a GPU or no gradient for attn_implementation='flex_attention'"):
        model(torch.randn(1, 3, 32, 32))


def test_an_unknown_backend_is_refused(make_config):
    with pytest.raises(ValueError, match="is not supported"):
        ViTRegModel(make_config(attn_implementation="telepathy"))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_dropout_is_active_in_training_only(make_config, backend):
    model = ViTRegModel(make_config(attention_probs_dropout_prob=0.5, attn_implementation=backend))
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model.train()(pixels)[0], model(pixels)[0])
        assert torch.equal(model.eval()(pixels)[0], model(pixels)[0])


class TestFlashAttention2:
    @pytest.fixture
    def flash(self, monkeypatch):
        """The reference in place of the library."""
        path = pathlib.Path(__file__).with_name("flash_attn_reference.py")
        spec = importlib.util.spec_from_file_location("flash_attn_reference", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        reference = module.FlashAttnReference()
        for name, stand_in in reference.modules().items():
            monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
        monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
        return reference

    @pytest.fixture
    def model(self, make_config):
        return ViTRegForImageClassification(make_config()).eval().bfloat16()

    def test_layout_and_arguments(self, flash, model):
        pixels = torch.randn(2, 3, 40, 24, dtype=torch.bfloat16)
        expected = outputs_of(model, "eager", pixels)
        got = outputs_of(model, "flash_attention_2", pixels)
        torch.testing.assert_close(got.logits, expected.logits, atol=5e-2, rtol=5e-2)
        assert flash.calls == [("dense", {"shape": (2, 20, 4, 8), "causal": False, "dropout_p": 0.0})] * 3

    def test_padding_becomes_variable_lengths_without_a_mask(self, flash, model):
        pixels, mask = torch.randn(2, 3, 40, 24, dtype=torch.bfloat16), torch.ones(2, 40, 24)
        mask[1, 16:] = 0
        got = outputs_of(model, "flash_attention_2", pixels, pixel_mask=mask)
        assert flash.calls == [("varlen", {"lengths": [20, 11], "causal": False, "dropout_p": 0.0})] * 3
        alone = outputs_of(model, "flash_attention_2", pixels[1:, :, :16])
        torch.testing.assert_close(got.logits[1], alone.logits[0], atol=5e-2, rtol=5e-2)

    @pytest.mark.parametrize("fields", [{}, {"position_embedding_type": "rotary"}], ids=["table", "rotary"])
    def test_images_of_many_sizes_are_one_call(self, flash, make_config, fields):
        model = ViTRegForImageClassification(make_config(**fields)).eval().bfloat16()
        images = [torch.randn(3, *size, dtype=torch.bfloat16) for size in [(40, 24), (8, 8), (40, 24), (16, 48)]]
        alone = [outputs_of(model, "eager", image[None]).logits for image in images]
        for output_tokens, last in ((True, [20, 20, 6, 17]), (False, [1, 1, 1, 1])):
            flash.calls.clear()
            got = outputs_of(model, "flash_attention_2", images, output_tokens=output_tokens)
            calls = [("varlen", {"lengths": n, "causal": False, "dropout_p": 0.0}) for n in ([20, 20, 6, 17], last)]
            # one token of each image takes by weights, without the kernel, where keys are not turned one by one
            by_weights = not output_tokens and not fields
            assert flash.calls == [calls[0], calls[0], *([] if by_weights else calls[1:])]
            torch.testing.assert_close(got.logits, torch.cat(alone), atol=5e-2, rtol=5e-2)

    def test_attention_maps_come_beside_the_kernel(self, flash, model):
        pixels = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
        kwargs = {"output_attentions": True, "output_prefix_attentions": True}
        expected = outputs_of(model, "eager", pixels, **kwargs)
        got = outputs_of(model, "flash_attention_2", pixels, **kwargs)
        assert len(flash.calls) == 3
        for name in ("attentions", "prefix_attentions"):
            for mine, theirs in zip(got[name], expected[name], strict=True):
                torch.testing.assert_close(mine.float(), theirs.float(), atol=3e-2, rtol=0)

    def test_dropout_reaches_the_kernel_in_training(self, flash, make_config):
        model = ViTRegModel(make_config(attention_probs_dropout_prob=0.1)).bfloat16().train()
        outputs_of(model, "flash_attention_2", torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
        assert {call[1]["dropout_p"] for call in flash.calls} == {0.1}


requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
requires_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash_attn")


@requires_gpu
@pytest.mark.parametrize(
    "backend", ["sdpa", "flex_attention", pytest.param("flash_attention_2", marks=requires_flash)]
)
def test_on_a_gpu_in_bfloat16_forward_and_backward(make_config, backend):
    model = ViTRegModel(make_config(hidden_size=128)).eval().to("cuda", torch.bfloat16)
    pixels = torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    expected = outputs_of(model, "eager", pixels).last_hidden_state
    model.set_attn_implementation(backend)
    output = model(pixels).last_hidden_state
    torch.testing.assert_close(output, expected, atol=5e-2, rtol=5e-2)
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
