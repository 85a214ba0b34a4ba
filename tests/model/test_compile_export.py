"""torch.compile without graph breaks, torch.export and ONNX with dynamic sizes, each verified at a second size."""

import warnings

import pytest
import torch
from torch.export import Dim

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)

FAMILY = [
    ViTRegModel,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegBackbone,
]
ROTARY = {"position_embedding_type": "rotary"}
GRID = {**ROTARY, "rope_coordinates": "grid", "qk_norm": True}
SIZES = [(2, 3, 32, 32), (3, 3, 48, 24), (1, 3, 72, 40), (2, 3, 24, 56)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class TestCompile:
    # The traced graphs of AOTAutograd run without a code generator, which would take a minute per test on CPU and
    # compile the same graphs; one test below runs the default backend.
    backend = "aot_eager"

    def compiled(self, model, **kwargs):
        return torch.compile(model, fullgraph=True, dynamic=True, backend=self.backend, **kwargs)

    @pytest.mark.parametrize("model_class", FAMILY)
    @torch.no_grad()
    def test_evaluation_at_several_sizes(self, make_config, model_class):
        model = model_class(make_config(num_hidden_layers=1)).eval()
        compiled = self.compiled(model)
        for size in SIZES[:3]:
            pixels = torch.randn(*size)
            torch.testing.assert_close(compiled(pixels).patch_map, model(pixels).patch_map, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("fields", [{}, ROTARY])
    @torch.no_grad()
    def test_hidden_states_and_attentions(self, make_config, fields):
        model = ViTRegForImageClassification(make_config(num_hidden_layers=2, **fields)).eval()
        compiled = self.compiled(model)
        flags = {"output_hidden_states": True, "output_attentions": True, "output_prefix_attentions": True}
        for size in SIZES[:2]:
            pixels = torch.randn(*size)
            got, expected = compiled(pixels, **flags), model(pixels, **flags)
            for name in ("hidden_states", "attentions", "prefix_attentions"):
                assert len(got[name]) == len(expected[name])
                for mine, theirs in zip(got[name], expected[name], strict=True):
                    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "fields", [*({"position_interpolation_antialias": antialias} for antialias in (True, False)), GRID]
    )
    def test_training_at_several_sizes_with_gradients_of_positions(self, make_config, fields):
        model = ViTRegForImageClassification(make_config(num_hidden_layers=1, **fields)).train()
        compiled = self.compiled(model)
        for size in SIZES[:2]:
            pixels, labels = torch.randn(*size), torch.zeros(size[0], dtype=torch.long)
            gradients = []
            for network in (model, compiled):
                model.zero_grad()
                network(pixels, labels=labels).loss.backward()
                gradients.append([p.grad.clone() for p in model.parameters()])
            for eager, traced in zip(*gradients, strict=True):
                torch.testing.assert_close(traced, eager, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("rotary", [False, True])
    def test_training_with_dropout_drop_path_and_hidden_states(self, make_config, rotary):
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), 0.1)
        augmented = {**ROTARY, "pos_embed_shift": 0.1, "pos_embed_jitter": 1.1, "pos_embed_rescale": 2.0}
        config = make_config(num_hidden_layers=2, **rates, **(augmented if rotary else {}))
        model = ViTRegForImageClassification(config).train()
        outputs = self.compiled(model)(torch.randn(2, 3, 48, 24), output_hidden_states=True)
        outputs.hidden_states[1].sum().backward()
        assert model.vitreg.embeddings.register_tokens.grad.isfinite().all()

    @pytest.mark.parametrize("fields", [{}, ROTARY])
    @torch.no_grad()
    def test_padded_batches(self, make_config, fields):
        model = ViTRegModel(make_config(pad_to_patch_size=True, num_hidden_layers=1, **fields)).eval()
        compiled = self.compiled(model)
        for height, width in [(37, 45), (50, 29)]:
            pixels, mask = torch.randn(2, 3, height, width), torch.ones(2, height, width)
            mask[1, 20:] = 0
            got, expected = compiled(pixels, pixel_mask=mask), model(pixels, pixel_mask=mask)
            torch.testing.assert_close(got.cls_token, expected.cls_token, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("fields", [{}, ROTARY])
    @torch.no_grad()
    def test_no_recompilation_for_another_size(self, make_model, count_graphs, fields):
        compiled, graphs = count_graphs(make_model(ViTRegForImageClassification, num_hidden_layers=1, **fields))
        # torch itself specialises on a batch of one, and takes sizes that are equal in the first call for one size
        for size in [(2, 3, 48, 24), (4, 3, 24, 56), (5, 3, 72, 40)]:
            compiled(torch.randn(*size))
        assert len(graphs) == 1

    @torch.no_grad()
    def test_the_default_backend(self, make_config):
        model = ViTRegForImageClassification(make_config(num_hidden_layers=1)).eval()
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for size in SIZES[:2]:
            pixels = torch.randn(*size)
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-5)


def dynamic_axes(patch=8):
    """Batch, height and width free; sizes are multiples of the patch size, as torch.export wants it said."""
    return {0: Dim("batch", min=1, max=64), 2: patch * Dim("rows", max=64), 3: patch * Dim("columns", max=64)}


class TestExport:
    @pytest.mark.parametrize("model_class", FAMILY)
    def test_every_head_at_other_sizes(self, make_config, model_class):
        model = model_class(make_config()).eval()
        program = torch.export.export(
            model, (torch.randn(*SIZES[0]),), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
        ).module()
        for size in SIZES:
            pixels = torch.randn(*size)
            torch.testing.assert_close(program(pixels).patch_map, model(pixels).patch_map, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("offset", [0.0, 0.1])
    @pytest.mark.parametrize("antialias", [True, False])
    def test_every_interpolation_rule(self, make_config, antialias, offset):
        config = make_config(position_interpolation_antialias=antialias, position_interpolation_offset=offset)
        model = ViTRegModel(config).eval()
        program = torch.export.export(
            model, (), {"pixel_values": torch.randn(*SIZES[1])}, dynamic_shapes={"pixel_values": dynamic_axes()}
        ).module()
        for size in SIZES:
            pixels = torch.randn(*size)
            got, expected = program(pixel_values=pixels).last_hidden_state, model(pixels).last_hidden_state
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("fields", [{}, ROTARY, GRID])
    def test_prefix_attentions(self, make_config, fields):
        model = ViTRegModel(make_config(output_prefix_attentions=[0, 2], **fields)).eval()
        program = torch.export.export(
            model, (), {"pixel_values": torch.randn(*SIZES[0])}, dynamic_shapes={"pixel_values": dynamic_axes()}
        ).module()
        for size in SIZES:
            pixels = torch.randn(*size)
            got, expected = program(pixel_values=pixels), model(pixels)
            for layer in (0, 2):
                mine, theirs = got.prefix_attentions[layer], expected.prefix_attentions[layer]
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("fields", [{}, {**ROTARY, "num_classifier_layers": 2}])
    def test_padding_to_the_patch_size_and_masks(self, make_config, fields):
        config = make_config(pad_to_patch_size=True, pooling="cls_mean", **fields)
        model = ViTRegForImageClassification(config).eval()
        axes = {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}
        example = {"pixel_values": torch.randn(2, 3, 37, 45), "pixel_mask": torch.ones(2, 37, 45)}
        program = torch.export.export(
            model,
            (),
            example,
            dynamic_shapes={"pixel_values": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "pixel_mask": axes},
        ).module()
        for batch, height, width in [(2, 37, 45), (3, 61, 18), (2, 40, 48)]:
            pixels, mask = torch.randn(batch, 3, height, width), torch.ones(batch, height, width)
            mask[1, :, 10:] = 0
            got = program(pixel_values=pixels, pixel_mask=mask).logits
            torch.testing.assert_close(got, model(pixels, pixel_mask=mask).logits, atol=1e-5, rtol=1e-5)

    def test_a_size_that_does_not_fit_is_refused_by_the_program_too(self, make_config):
        model = ViTRegModel(make_config()).eval()
        program = torch.export.export(
            model, (), {"pixel_values": torch.randn(*SIZES[0])}, dynamic_shapes={"pixel_values": dynamic_axes()}
        ).module()
        with pytest.raises((RuntimeError, AssertionError)):
            program(pixel_values=torch.randn(2, 3, 37, 45))


@pytest.mark.parametrize("fields", [{}, ROTARY])
def test_torch_jit_trace(make_config, fields):
    model = ViTRegForImageClassification(make_config(return_dict=False, **fields)).eval()
    with warnings.catch_warnings():  # tracing is deprecated, and still what some deployments take
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.randn(*SIZES[0]), strict=False)
    pixels = torch.randn(*SIZES[0])
    torch.testing.assert_close(traced(pixels)[0], model(pixels)[0], atol=1e-5, rtol=1e-5)


class TestOnnx:
    @staticmethod
    def session(model, inputs, axes, path):
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
        program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=axes, dynamo=True, verbose=False)
        program.save(str(path))
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    @staticmethod
    def run(session, **inputs):
        names = [i.name for i in session.get_inputs()]
        values = session.run(None, {name: inputs[name].numpy() for name in names})
        return [torch.from_numpy(value) for value in values]

    @pytest.mark.parametrize(
        ("model_class", "fields"), [(ViTRegModel, {}), (ViTRegForSemanticSegmentation, {}), (ViTRegModel, ROTARY)]
    )
    def test_at_other_sizes(self, make_config, tmp_path, model_class, fields):
        model = model_class(make_config(**fields)).eval()
        axes = {"pixel_values": dynamic_axes()}
        session = self.session(model, {"pixel_values": torch.randn(*SIZES[0])}, axes, tmp_path / "model.onnx")
        for size in SIZES:
            pixels = torch.randn(*size)
            first = self.run(session, pixel_values=pixels)[0]
            torch.testing.assert_close(first, model(pixels)[0], atol=1e-4, rtol=1e-4)

    def test_with_prefix_attentions(self, make_config, tmp_path):
        model = ViTRegModel(make_config(output_prefix_attentions=True)).eval()
        axes = {"pixel_values": dynamic_axes()}
        session = self.session(model, {"pixel_values": torch.randn(*SIZES[0])}, axes, tmp_path / "model.onnx")
        for size in SIZES:
            pixels = torch.randn(*size)
            outputs = self.run(session, pixel_values=pixels)
            attentions = model(pixels).prefix_attentions
            found = [o for o in outputs if o.shape == attentions[0].shape]
            assert len(found) == 3
            for mine, theirs in zip(found, attentions, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)

    @pytest.mark.filterwarnings(
        "ignore:.*The axis name. .* will not be used"
    )  # said of every axis that two inputs share
    @pytest.mark.parametrize("fields", [{}, GRID])
    def test_with_padding(self, make_config, tmp_path, fields):
        config = make_config(pad_to_patch_size=True, pooling="cls_mean", **fields)
        model = ViTRegForImageClassification(config).eval()
        example = {"pixel_values": torch.randn(2, 3, 37, 45), "pixel_mask": torch.ones(2, 37, 45)}
        batch, height, width = Dim("batch", max=64), Dim("height", max=512), Dim("width", max=512)
        axes = {"pixel_values": {0: batch, 2: height, 3: width}, "pixel_mask": {0: batch, 1: height, 2: width}}
        session = self.session(model, example, axes, tmp_path / "model.onnx")
        for size in [(2, 37, 45), (3, 61, 18), (2, 40, 48)]:
            pixels, mask = torch.randn(size[0], 3, *size[1:]), torch.ones(*size)
            mask[1, :, 10:] = 0
            first = self.run(session, pixel_values=pixels, pixel_mask=mask)[0]
            torch.testing.assert_close(first, model(pixels, pixel_mask=mask).logits, atol=1e-4, rtol=1e-4)
