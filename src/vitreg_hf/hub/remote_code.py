# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The model's own Python files, for people who load a model without this package (`trust_remote_code=True`)."""

from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from vitreg_hf.model import image_processing_pil_vitreg, image_processing_vitreg, modeling_vitreg
from vitreg_hf.model.modeling_vitreg import remote_code_map

PROCESSORS = {
    "ViTRegImageProcessor": image_processing_vitreg.ViTRegImageProcessor,
    "ViTRegImageProcessorPil": image_processing_pil_vitreg.ViTRegImageProcessorPil,
}


def code_files() -> list[Path]:
    """All files of the installed version that the classes of the family need, sorted by name."""
    entries = [str(module.__file__) for module in (modeling_vitreg, image_processing_vitreg)]
    needed = [file for entry in entries for file in get_relative_import_files(entry)]
    return sorted({Path(file) for file in (*entries, *needed)}, key=lambda path: path.name)


def config_with_code(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config that names the class for every Auto class, whatever it named before."""
    return {**config, "auto_map": remote_code_map()}


def processor_with_code(processor: dict[str, Any]) -> dict[str, Any]:
    """A saved image processor that names the class for both backends; one of another family stays as it is."""
    if processor.get("image_processor_type") not in PROCESSORS:
        return processor
    pil, torchvision = (_reference(PROCESSORS[name]) for name in ("ViTRegImageProcessorPil", "ViTRegImageProcessor"))
    return {**processor, "auto_map": {"AutoImageProcessor": [pil, torchvision]}}  # the order Transformers expects


def _reference(cls: type) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"
