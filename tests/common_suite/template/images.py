"""The tiny models and inputs that all mixins ask a `model_tester` for."""

from typing import Any

import torch
from tests.families import TINY, Family
from tests.test_modeling_common import floats_tensor, ids_tensor
from transformers.testing_utils import torch_device

NUM_LABELS = 10


class ImageModelTester:
    """A `model_tester` for a family of vision transformers.

    Args:
        family: the family to configure.
        test: name of the running test, for the config arguments that only it needs.
        config: config arguments on top of all others.
    """

    batch_size = 3
    is_training = True
    num_labels = NUM_LABELS
    image_size, patch_size, num_channels = (TINY[name] for name in ("image_size", "patch_size", "num_channels"))
    hidden_size, num_hidden_layers, num_attention_heads = (
        TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )

    def __init__(self, family: Family, test: str = "", **config: Any) -> None:
        self.family = family
        self.arguments = {**TINY, **family.tiny, **family.config_for_test.get(test, {}), **config}
        self.grid = self.image_size // self.patch_size
        self.num_patches = self.grid**2
        self.seq_length = self.encoder_seq_length = self.num_patches + 1 + self.arguments["num_register_tokens"]
        # `bool_masked_pos` has one entry per patch, of which the mixins mask the first `num_masks`.
        self.mask_length, self.num_masks = self.num_patches, self.num_patches // 2
        # What the tensor-parallel mixin calls the class to run.
        self.causal_lm_class = family.load(family.image_classification)

    def get_config(self, **overrides: Any) -> Any:
        return self.family.load(self.family.config)(**{**self.arguments, **overrides})

    def images(self, batch_size: int | None = None, num_channels: int | None = None) -> torch.Tensor:
        channels = num_channels or self.num_channels
        return floats_tensor([batch_size or self.batch_size, channels, self.image_size, self.image_size])

    def labels(self) -> torch.Tensor:
        return ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs(self) -> tuple[Any, torch.Tensor, torch.Tensor]:
        return self.get_config(), self.images(), self.labels()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), {"pixel_values": self.images()}

    def build(self, class_name: str, **overrides: Any) -> Any:
        """A model in evaluation mode."""
        return self.family.load(class_name)(self.get_config(**overrides)).to(torch_device).eval()
