"""A mended model on the Hub: pushed beside what `vitreg registers` leaves, loaded by id, and the same in pipelines."""

import json

import PIL.Image
import pytest
import torch

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor, add_test_time_registers
from vitreg_hf.register_neurons.ranking import RegisterNeuron, RegisterNeurons

NEURONS = [(0, 3), (1, 40), (1, 7)]
LOAD = """
import json, sys
import torch, PIL.Image
import vitreg_hf
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

repository, picture, out = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(repository).eval()
pixels = AutoImageProcessor.from_pretrained(repository)(PIL.Image.open(picture), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    tokens = AutoModel.from_pretrained(repository).eval()(pixels).last_hidden_state
    torch.save({"logits": model(pixels).logits, "tokens": tokens}, out)
answer = pipeline("image-classification", model=repository)(picture)
print(json.dumps({"config": model.config.to_dict(), "scores": {one["label"]: one["score"] for one in answer}}))
"""
PUSH = "import sys; from vitreg_hf.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def mended(trained, tmp_path_factory):
    """The folder of a training with its classifier mended, beside the files that `vitreg registers` leaves."""
    folder = tmp_path_factory.mktemp("mended") / "model"
    plain = ViTRegForImageClassification.from_pretrained(trained)
    model = add_test_time_registers(plain, NEURONS, cls="keep").eval()
    model.save_pretrained(folder)
    ViTRegImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    ranking = tuple(RegisterNeuron(*pair, 5.0, 0.0) for pair in NEURONS)
    RegisterNeurons(ranking, 3, 9.0, "median rule", 2, 1, 0.1, 4).save(folder / "register_neurons.json")
    (folder / "registers.json").write_text(json.dumps({"source": "alice/vitreg-pets", "method": "test-time"}))
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: image-classification\nlicense: mit\n---\n\n# Mended\n"
    )
    return folder, model, plain


def test_a_mended_model_comes_back_from_the_hub(mended, client, hub, tmp_path):
    folder, model, plain = mended
    hub.reset()
    pushed = client.run(PUSH, "push", str(folder), "alice/mended", "--license", "mit")
    assert pushed.returncode == 0, pushed.stderr
    PIL.Image.new("RGB", (40, 32), (10, 20, 250)).save(tmp_path / "picture.png")
    loaded = client.run(LOAD, "alice/mended", str(tmp_path / "picture.png"), str(tmp_path / "said.pt"))
    assert loaded.returncode == 0, loaded.stderr
    answer = json.loads(loaded.stdout.splitlines()[-1])
    assert answer["config"]["register_neurons"] == [list(pair) for pair in NEURONS]
    assert answer["config"]["test_time_register_cls"] == "keep"

    processor = ViTRegImageProcessor.from_pretrained(folder)
    pixels = processor(PIL.Image.open(tmp_path / "picture.png"), return_tensors="pt")["pixel_values"]
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    with torch.no_grad():
        expected, before = model(pixels).logits, plain.eval()(pixels).logits
        tokens = model.vitreg(pixels).last_hidden_state
    torch.testing.assert_close(said["logits"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(said["tokens"], tokens, atol=1e-6, rtol=0)
    assert not torch.allclose(before, expected, atol=1e-4)  # so that the mending itself came along
    names = {name: index for index, name in model.config.id2label.items()}
    for name, score in answer["scores"].items():
        assert score == pytest.approx(expected.softmax(-1)[0, names[name]].item(), abs=1e-5)
