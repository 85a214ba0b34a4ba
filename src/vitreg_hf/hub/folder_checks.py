# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a folder holds a complete model that may be published; nothing is sent, changed, or run from the folder."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor

from vitreg_hf.hub.cards import is_rendered, readme_to_publish
from vitreg_hf.hub.json_files import read_object
from vitreg_hf.hub.remote_code import PROCESSORS
from vitreg_hf.hub.weight_files import WeightFiles, count_tensors, find_weights, weight_problems, weights_fingerprint
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil
from vitreg_hf.model.modeling_vitreg import (
    AUTO_MODELS,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegPreTrainedModel,
)

CONFIG, PROCESSOR, CARD, RESULTS = "config.json", "preprocessor_config.json", "README.md", "results.json"
ARTIFACTS = f"artifacts/{RESULTS}"
_CLASSES = {cls.__name__: cls for cls in AUTO_MODELS.values()}
_NAMING_CLASSES = (ViTRegForImageClassification, ViTRegForSemanticSegmentation)
_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
# What Transformers' Trainer leaves beside a model; it is not published, and nobody loads a model from it.
_OF_TRAINERS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed all checks.

    Attributes:
        path: of the folder.
        config: content of `config.json`.
        processor: content of `preprocessor_config.json`.
        weights: the safetensors files and their index.
        labels: names of the classes, in order; empty for a model without.
        results: `results.json` and `artifacts/results.json`, those that are there.
        pictures: PNG, JPEG and SVG files beside the model, sorted by name.
    """

    path: Path
    config: dict[str, Any]
    processor: dict[str, Any]
    weights: WeightFiles
    labels: tuple[str, ...]
    results: tuple[Path, ...]
    pictures: tuple[Path, ...]

    @property
    def has_code(self) -> bool:
        """Whether the folder was saved for `trust_remote_code=True`."""
        return bool(self.config.get("auto_map") or self.processor.get("auto_map"))


def check_folder(folder: Path, model_id: str | None = None, model_license: str | None = None) -> ModelFolder:
    """Check everything about a folder that can be checked without the Hub.

    Args:
        folder: as the examples or `save_pretrained` leave it.
        model_id: of the repository, with its owner: what the code of the card has to load. None: the card, which
            depends on it, is not checked.
        model_license: licence of the weights, as the Hub spells it; None: that of the card, else that of the results.

    Raises:
        ValueError: listing everything that is wrong, each with the name of the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a trained model, got {folder}, which is none")
    problems: list[str] = []
    saved, config, model, weights, tensors, processor = {}, None, None, None, 0, {}
    with _listed(problems, CONFIG):
        saved = _read(folder, CONFIG, "the config that save_pretrained writes")
        config = _config_of(saved)
    with _listed(problems):  # the messages name the files
        weights = find_weights(folder)
        tensors = count_tensors(weights)
    if config is not None and weights is not None and tensors:
        with _listed(problems, CONFIG):
            model = _empty_model(config, tensors)
            wrong = list(weight_problems(weights, model))
            problems += wrong or _result_problems(folder, weights, model)
            problems += _label_problems(config, model)
    with _listed(problems, PROCESSOR):
        processor = _read(folder, PROCESSOR, "the image processor, which its save_pretrained writes")
        _check_processor(folder, processor)
    results = _existing(folder, RESULTS, ARTIFACTS)
    for path in results:
        with _listed(problems, str(path.relative_to(folder))):
            read_object(path)
    pictures = _pictures(folder)
    problems += _pickle_problems(folder)
    problems += _picture_problems(pictures)
    if model_id is not None:
        with _listed(problems, CARD):
            _check_card(folder, model_id, model_license)
    if problems or config is None or weights is None:
        listed = "".join(f"\n- {one}" for one in dict.fromkeys(problems))
        raise ValueError(f"Expected a model that can be published in {folder}, got:{listed}")
    labels = tuple(_names_of(config)) if isinstance(model, _NAMING_CLASSES) else ()
    return ModelFolder(folder, saved, processor, weights, labels, results, pictures)


@contextmanager
def _listed(problems: list[str], name: str | None = None) -> Iterator[None]:
    """What is wrong in the block goes to the list rather than to the caller, so that all of it is told at once."""
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        problems.append(told if name is None else f"{name}: {told}")


def _read(folder: Path, name: str, what: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise ValueError(f"Expected {what}, got none")
    return read_object(folder / name)


def _existing(folder: Path, *names: str) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


# The model


def _config_of(saved: dict[str, Any]) -> ViTRegConfig:
    if saved.get("model_type") != ViTRegConfig.model_type:
        raise ValueError(f"Expected model_type {ViTRegConfig.model_type!r}, got {saved.get('model_type')!r:.60}")
    named = saved.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in _CLASSES:
        raise ValueError(f"Expected architectures with one of {', '.join(_CLASSES)}, got {named!r:.100}")
    return ViTRegConfig.from_dict(saved)


def _empty_model(config: ViTRegConfig, tensors: int) -> ViTRegPreTrainedModel:
    """The model without memory for its parameters; not before there are tensors enough for as many layers."""
    if tensors < config.num_hidden_layers:
        raise ValueError(f"Expected weights for num_hidden_layers={config.num_hidden_layers}, got {tensors} tensors")
    with torch.device("meta"):
        return _CLASSES[config.architectures[0]](config)  # type: ignore[index]  # checked before


def _names_of(config: ViTRegConfig) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _label_problems(config: ViTRegConfig, model: ViTRegPreTrainedModel) -> Iterator[str]:
    """A class without a name is a number to whoever uses the model."""
    if not isinstance(model, _NAMING_CLASSES) or config.problem_type == "regression":
        return
    names, by_index = _names_of(config), config.id2label or {}
    if not names or sorted(by_index) != list(range(len(names))):
        yield f"{CONFIG}: Expected id2label with the classes 0, 1, 2 and so on, got {sorted(by_index)!r:.100}"
        return
    if unnamed := [i for i, name in enumerate(names) if not name.strip() or name == f"LABEL_{i}"]:
        yield f"{CONFIG}: Expected a name for every class in id2label, got none for class {unnamed[0]}: {names!r:.100}"
    elif len(set(names)) < len(names):
        yield f"{CONFIG}: Expected different names in id2label, got {names!r:.100}"
    elif config.label2id != {name: index for index, name in enumerate(names)}:
        yield f"{CONFIG}: Expected label2id to turn id2label around, got {config.label2id!r:.100}"


def _result_problems(folder: Path, weights: WeightFiles, model: ViTRegPreTrainedModel) -> Iterator[str]:
    """Results of other weights would claim an accuracy that nobody measured of these."""
    path = folder / RESULTS
    if not path.is_file():
        return
    with contextlib.suppress(ValueError):  # damaged results are told of elsewhere
        described = read_object(path).get("model")
        stated = described.get("weights") if isinstance(described, dict) else None
        if stated is not None and stated != weights_fingerprint(weights, model):
            yield (
                f"{RESULTS}: Expected the results of these weights, got those of others: evaluate these, or remove "
                f"{RESULTS} and write {CARD} yourself"
            )


# The other files


def _check_processor(folder: Path, saved: dict[str, Any]) -> None:
    """Build the image processor; both of this family have the same options, and one of them needs no torchvision."""
    try:
        if saved.get("image_processor_type") in PROCESSORS:
            ViTRegImageProcessorPil.from_dict(saved)
        else:
            AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (TypeError, KeyError, AttributeError, ImportError) as error:  # what Transformers raises for odd options
        raise ValueError(f"Expected an image processor that can be loaded, got {error!r}") from error


def _check_card(folder: Path, model_id: str, model_license: str | None) -> None:
    try:
        readme_to_publish(folder, model_id, model_license)
    except ValueError as error:
        if not (folder / CARD).is_file() or is_rendered(folder):
            raise
        hint = f"edit it, or delete it to have it rendered from {RESULTS}"
        raise ValueError(f"{error} (this card was edited by hand or rendered by an older version: {hint})") from error


def _pickle_problems(folder: Path) -> Iterator[str]:
    """Reading a pickle runs what is in it, so the Hub warns of it and many refuse to load it."""
    for path in sorted(folder.iterdir()):
        if path.name in _OF_TRAINERS:
            continue
        pickled = path.suffix.lower() in _PICKLES or (path.suffix.lower() == ".npy" and _holds_objects(path))
        if path.is_file() and pickled:
            hint = "save weights with save_pretrained, which writes safetensors, and move or delete this file"
            yield f"{path.name}: Expected no pickle beside the model, as reading one can run code, got one: {hint}"


def _holds_objects(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return True
    except (OSError, EOFError):  # it holds nothing at all
        return False
    return False


def _pictures(folder: Path) -> tuple[Path, ...]:
    kinds = {*_PICTURES, ".svg"}
    found = (path for path in folder.iterdir() if path.suffix.lower() in kinds and path.is_file())
    return tuple(sorted(path for path in found if not path.name.startswith(".")))


def _picture_problems(pictures: tuple[Path, ...]) -> Iterator[str]:
    """A picture that is none, which pages would show as a broken one."""
    for path in pictures:
        kind = _PICTURES.get(path.suffix.lower())
        if kind is None:
            continue
        try:
            with PIL.Image.open(path, formats=[kind]) as picture:
                picture.verify()
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            yield f"{path.name}: Expected a {kind} picture, got: {error}"
