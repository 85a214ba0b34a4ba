"""Images for the planted networks, which are described where they are made."""

import pytest

from vitreg_hf.register_neurons.planted import Images, planted_network, planted_vit_s, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Images:
    """Eight images for the small network; the last has no blue."""
    return write_images(tmp_path_factory.mktemp("small") / "images", planted_network(), 8)


@pytest.fixture(scope="session")
def large_images(tmp_path_factory) -> Images:
    """Eight images for ViT-S; the last has no blue."""
    return write_images(tmp_path_factory.mktemp("large") / "images", planted_vit_s(), 8)
