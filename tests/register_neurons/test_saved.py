"""A mended model is an ordinary one: saved, loaded, in pipelines, compiled, exported and tuned it says the same."""

import json

import PIL.Image
import pytest
import torch
from torch.export import Dim
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from vitreg_hf import ViTRegForImageClassification, ViTRegModel, add_test_time_registers, bias_from_images
from vitreg_hf.conversion.back import export_checkpoint
from vitreg_hf.hub.folder_checks import check_folder
from vitreg_hf.register_neurons.planted import planted_network, planted_neurons, processor_for
from vitreg_hf.register_neurons.ranking import RegisterNeuron, RegisterNeurons
from vitreg_hf.training.finetuning import load_for_finetuning

KINDS = ["MLP", "SwiGLU", "two registers", "bias of attention"]
LABELS = {0: "owl", 1: "newt", 2: "cat"}


def mended(kind="MLP", model_class=ViTRegModel, images=None, **fields):
    """A planted model of the family with registers of a kind."""
    model = planted_network(model_class, swiglu=kind == "SwiGLU", **fields)
    reduction = "largest" if kind == "SwiGLU" else "max"
    count = 2 if kind == "two registers" else 1
    moved = add_test_time_registers(model, planted_neurons(model.config), count, reduction=reduction)
    return bias_from_images(moved, images.pixels[:3]) if kind == "bias of attention" else moved


def said(model, pixels):
    with torch.no_grad():
        return model.eval()(pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_bit_by_bit(kind, images, tmp_path):
    model = mended(kind, images=images)
    model.save_pretrained(tmp_path)
    expected = said(model, images.pixels)
    for loaded in (ViTRegModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        outputs = said(loaded, images.pixels)
        assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(outputs.pooler_output, expected.pooler_output)
        assert loaded.config.register_neurons == model.config.register_neurons
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["register_neurons"] == [list(pair) for pair in planted_neurons(model.config)]


def test_pipelines_say_what_the_model_says(images, tmp_path):
    model = mended(model_class=ViTRegForImageClassification, id2label=LABELS, initializer_range=0.2)
    model.save_pretrained(tmp_path)
    processor_for(model).save_pretrained(tmp_path)
    image = PIL.Image.open(sorted(images.folder.iterdir())[0])
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    expected = said(model, pixels).logits.softmax(-1)[0]
    answer = pipeline("image-classification", model=str(tmp_path))(image)
    assert {one["label"]: one["score"] for one in answer} == pytest.approx(
        {name: expected[index].item() for index, name in LABELS.items()}, abs=1e-5
    )
    tokens = torch.tensor(pipeline("image-feature-extraction", model=str(tmp_path))(image))
    torch.testing.assert_close(tokens, said(model.vitreg, pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert tokens.shape == (1, 1 + 1 + 36, 96)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(said(loaded, pixels).logits, said(model, pixels).logits)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Compilers that make code take a minute for a model this deep: tests/model compiles smaller ones with them.


@pytest.mark.usefixtures("_fresh_compiler")
@torch.no_grad()
def test_compiled_in_one_graph_it_says_the_same(images):
    model = mended()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for pixels in (images.pixels, torch.randn(3, 3, 64, 40)):
        close(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


SIZES = [(2, 3, 48, 48), (1, 3, 64, 40), (3, 3, 24, 56)]


def axes():
    return {
        "pixel_values": {0: Dim("batch", min=1, max=64), 2: 8 * Dim("rows", max=64), 3: 8 * Dim("columns", max=64)}
    }


@pytest.mark.parametrize("kind", ["SwiGLU", "bias of attention"])
@torch.no_grad()
def test_exported_it_says_the_same_at_every_size(kind, images):
    model = mended(kind, images=images)
    inputs = {"pixel_values": torch.randn(*SIZES[0])}
    program = torch.export.export(model, (), inputs, dynamic_shapes=axes()).module()
    for size in SIZES:
        pixels = torch.randn(*size)
        close(program(pixel_values=pixels).last_hidden_state, model(pixels).last_hidden_state)


@torch.no_grad()
def test_onnx_says_the_same_at_other_sizes(images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model = mended("SwiGLU")
    program = torch.onnx.export(
        model, (), kwargs={"pixel_values": torch.randn(*SIZES[0])}, dynamic_shapes=axes(), dynamo=True, verbose=False
    )
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for pixels in (images.pixels, *(torch.randn(*size) for size in SIZES[1:])):
        (tokens, *_) = session.run(None, {"pixel_values": pixels.numpy()})
        close(torch.from_numpy(tokens), model(pixels).last_hidden_state)


def test_a_folder_with_its_search_can_be_published(images, tmp_path):
    model = mended(
        model_class=ViTRegForImageClassification, id2label=LABELS, label2id={n: i for i, n in LABELS.items()}
    )
    model.save_pretrained(tmp_path)
    processor_for(model).save_pretrained(tmp_path)
    ranking = tuple(RegisterNeuron(*pair, 50.0, 0.0) for pair in planted_neurons(model.config))
    RegisterNeurons(ranking, 5, 60.0, "median rule", 6, 4, 0.2, 8).save(tmp_path / "register_neurons.json")
    (tmp_path / "registers.json").write_text("{}")
    checked = check_folder(tmp_path)
    assert checked.labels == ("owl", "newt", "cat")
    assert checked.config["register_neurons"] == [list(pair) for pair in planted_neurons(model.config)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_finetuning_keeps_its_registers(kind, images, tmp_path):
    model = mended(kind, images=images)
    model.save_pretrained(tmp_path / "mended")
    tuned = load_for_finetuning(tmp_path / "mended", ["owl", "newt"]).train()
    for field in ("register_neurons", "num_test_time_registers", "register_neuron_reduction", "attention_bias_kv"):
        assert getattr(tuned.config, field) == getattr(model.config, field)
    with torch.no_grad():
        expected = said(model, images.pixels).last_hidden_state
        assert torch.equal(said(tuned.vitreg, images.pixels).last_hidden_state, expected)
    optimizer = torch.optim.SGD(tuned.train().parameters(), lr=0.1)
    before = tuned.vitreg.layers[0].mlp.up_proj.weight.clone()
    tuned(images.pixels, labels=torch.arange(8) % 2).loss.backward()
    optimizer.step()
    assert not torch.equal(before, tuned.vitreg.layers[0].mlp.up_proj.weight)
    tuned.save_pretrained(tmp_path / "tuned")
    again = ViTRegForImageClassification.from_pretrained(tmp_path / "tuned")
    assert again.config.register_neurons == model.config.register_neurons
    assert torch.equal(said(again, images.pixels).logits, said(tuned, images.pixels).logits)


FIELDS = {
    "transformers_dinov2": {
        "layerscale_value": 1.0,
        "position_interpolation_antialias": False,
        "intermediate_size": 384,
    },
    "vit": {"layer_norm_eps": 1e-12, "position_interpolation_antialias": False},
    "open_clip": {"embedding_norm": True, "patch_bias": False, "layer_norm_eps": 1e-5},
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("MLP", "num_test_time_registers=1, which would be 0; register_neurons="),
        ("bias of attention", "register_neurons|bias_k"),
    ],
)
@pytest.mark.parametrize("layout", FIELDS)
def test_layouts_of_others_cannot_hold_it(layout, kind, message, images, tmp_path):
    """And say so by the name of the field, rather than lose what was mended."""
    fields = FIELDS[layout]
    if layout == "open_clip":
        fields = {**fields, "hidden_size": 384, "intermediate_size": 1536}
    plain = planted_network(**fields)
    plain.save_pretrained(tmp_path / "plain")
    export_checkpoint(tmp_path / "plain", tmp_path / "plain back", layout=layout)  # so nothing else is in the way
    mended(kind, images=images, **fields).save_pretrained(tmp_path / "mended")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "mended", tmp_path / "back", layout=layout)
    assert not (tmp_path / "back").exists()
