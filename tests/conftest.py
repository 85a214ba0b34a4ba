"""Shared by all tests: one thread (two are many times slower for models this small), no network, a small model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from vitreg_hf import ViTRegConfig

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_config():
    """A config of a network small enough for a unit test; any field can be overridden."""

    def make(**overrides):
        small = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
            "num_register_tokens": 4,
            "num_labels": 5,
            "initializer_range": 0.2,  # large weights, so that a wrong computation shows
            "token_initializer_range": 0.5,
        }
        return ViTRegConfig(**{**small, **overrides})

    return make
