"""The package as a user first meets it."""

import importlib.metadata
import json
import subprocess
import sys

import vitreg_hf

PUBLIC = [
    "ViTRegBackbone",
    "ViTRegConfig",
    "ViTRegForImageClassification",
    "ViTRegForMaskedImageModeling",
    "ViTRegForSemanticSegmentation",
    "ViTRegImageProcessor",
    "ViTRegImageProcessorPil",
    "ViTRegModel",
    "RegisterNeurons",
    "add_registers",
    "add_test_time_registers",
    "bias_from_images",
    "convert_checkpoint",
    "export_checkpoint",
    "find_register_neurons",
    "mean_patch",
]


def run_python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_public_names():
    assert all(hasattr(vitreg_hf, name) for name in PUBLIC)


def test_the_version_is_that_of_the_distribution():
    assert importlib.metadata.version("vitreg_hf") == vitreg_hf.__version__


def test_importing_brings_nothing_slow_that_transformers_does_not_bring():
    code = """
import json, sys
import transformers.modeling_utils, transformers.image_processing_backends, transformers.models.auto.modeling_auto
before = set(sys.modules)
import vitreg_hf
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new)))
"""
    slow = {"datasets", "evaluate", "matplotlib", "accelerate", "sklearn", "timm", "pandas"}
    assert not slow & set(run_python(code))


def test_extras_are_not_needed_to_import_it():
    code = """
import json, sys

sys.modules.update(dict.fromkeys(["scipy", "matplotlib", "diptest", "timm", "peft", "sklearn"]))  # as if not there
import vitreg_hf
print(json.dumps(len(dir(vitreg_hf))))
"""
    assert run_python(code) > len(PUBLIC)


def test_torchvision_is_not_needed():
    code = """
import importlib.abc, importlib.machinery, importlib.util, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torchvision" else find(name, *a)
import numpy, torch, vitreg_hf
from transformers import AutoImageProcessor
processor = vitreg_hf.ViTRegImageProcessorPil()
pixels = processor(numpy.zeros((300, 400, 3), dtype="uint8"), return_tensors="pt").pixel_values
config = vitreg_hf.ViTRegConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
print(json.dumps(list(vitreg_hf.ViTRegModel(config)(pixels).last_hidden_state.shape)))
"""
    assert run_python(code) == [1, 1 + 4 + 14 * 14, 32]
