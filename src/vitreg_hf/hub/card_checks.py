# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the Hub refuses in a model card, found without asking it."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# https://huggingface.co/docs/hub/repositories-licenses
_IDENTIFIERS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
_LICENSES = frozenset(_IDENTIFIERS.split())
# https://github.com/huggingface/huggingface.js/blob/main/packages/tasks/src/pipelines.ts, those that take an image
_TASKS = (
    *("depth-estimation", "image-classification", "image-feature-extraction", "image-segmentation", "image-to-image"),
    *("image-text-to-text", "image-to-text", "keypoint-detection", "mask-generation", "object-detection"),
    *("visual-question-answering", "zero-shot-image-classification", "zero-shot-object-detection"),
)
_DATASET_ID = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
_LOADED = re.compile(r"""(?:from_pretrained\(\s*|\bmodel\s*=\s*)(?:"([^"\n]*)"|'([^'\n]*)')""")


def check_card(card: ModelCard, model_id: str | None = None) -> None:
    """Check the metadata of a card, and with `model_id` also what its code loads.

    Args:
        card: rendered or written by hand.
        model_id: id on the Hub that the card is for. None: its code may load a folder.

    Raises:
        ValueError: listing everything that the Hub would refuse or readers could not load.
    """
    data = cast(ModelCardData, card.data)  # declared as what all kinds of cards have
    problems = [*_license_problems(data), *_field_problems(data), *_result_problems(card)]
    if model_id is not None:
        problems += _code_problems(card.text, model_id)
    if problems:
        raise ValueError(f"Expected a model card that the Hub accepts, got {'; '.join(problems)}")


def check_license(identifier: str) -> None:
    """Check that the Hub knows a licence by this identifier.

    Raises:
        ValueError: with the identifier that was probably meant, if there is one.
    """
    if identifier not in _LICENSES:
        raise ValueError(f"Expected a licence as the Hub spells it, got {_misspelled(identifier)}")


def _misspelled(identifier: Any) -> str:
    meant = re.sub(r"[\s_]+", "-", str(identifier).strip().lower())
    hint = f"did you mean {meant}?" if meant in _LICENSES else "see https://hf.co/docs/hub/repositories-licenses"
    return f"{identifier!r} ({hint})"


def _license_problems(data: ModelCardData) -> Iterator[str]:
    stated: Any = data.license  # the Hub takes a list too
    for one in stated if isinstance(stated, list) else [stated]:
        if one is not None and not (isinstance(one, str) and one in _LICENSES):
            yield f"license {_misspelled(one)}"
        if one == "other" and not (data.license_name and data.license_link):
            yield "license 'other' without license_name and license_link"


def _field_problems(data: ModelCardData) -> Iterator[str]:
    task: Any = data.pipeline_tag
    if task is not None and task not in _TASKS:
        yield f"pipeline_tag {task!r}, which is none of {', '.join(_TASKS)}"
    for field in ("tags", "datasets", "metrics"):
        values = getattr(data, field)
        values = values if isinstance(values, list) else [] if values is None else [values]
        if strange := [value for value in values if not isinstance(value, str) or not value]:
            yield f"{field} that are no text: {', '.join(map(repr, strange))}"
        elif field == "datasets":
            yield from (f"datasets with {value!r}, which is no id" for value in values if not _is_dataset_id(value))


def _is_dataset_id(value: Any) -> bool:
    return isinstance(value, str) and _DATASET_ID.fullmatch(value) is not None


def _results_of(card: ModelCard) -> list[EvalResult]:
    return cast(ModelCardData, card.data).eval_results or []


def _result_problems(card: ModelCard) -> Iterator[str]:
    results = _results_of(card)
    for result in results:
        value = result.metric_value
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{result.metric_type} {value} in model-index"
        if not _is_dataset_id(result.dataset_type):
            yield f"dataset type {result.dataset_type!r} in model-index, which is no id"
    try:
        again = _results_of(ModelCard(str(card)))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        yield f"metadata that cannot be read back: {error}"
        return
    if sorted(map(repr, again)) != sorted(map(repr, results)):  # the Hub groups them; NaN is not equal to itself
        yield "a model-index that reads back differently"


def _code_problems(text: str, model_id: str) -> Iterator[str]:
    """What code in the card loads that is not on the Hub; an id and a relative path look the same."""
    loaded = [double or single for double, single in _LOADED.findall(text)]
    for name in dict.fromkeys(loaded):
        if name != model_id and (not _is_repo_id(name) or Path(name).exists()):
            yield f"code that loads {name!r}, which is no id on the Hub"
    if loaded and model_id not in loaded:
        yield f"code that loads {', '.join(map(repr, dict.fromkeys(loaded)))} and never {model_id!r}"


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
