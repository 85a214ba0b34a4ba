"""The loopback Hub's check of a model card's metadata, and what it reads out of them.

Errors and warnings are a selection of those of the Hub: what a card of this package could get wrong.
"""

import math
import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\r?\n)??---[ \t]*(\r?\n|\Z)", re.DOTALL)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LICENSES = _words("""
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0
    cc-by-nc-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 ecl-2.0 epl-2.0
    eupl-1.1 eupl-1.2 gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl mulanpsl-2.0 odbl openrail
    openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib other unknown
""")
_TASKS = _words("""
    any-to-any audio-classification audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask image-classification image-feature-extraction
    image-segmentation image-text-to-text image-to-3d image-to-image image-to-text image-to-video
    keypoint-detection mask-generation object-detection other question-answering reinforcement-learning
    sentence-similarity summarization table-question-answering tabular-classification tabular-regression
    text-classification text-generation text-ranking text-to-image text-to-speech text-to-video
    token-classification translation unconditional-image-generation video-classification video-text-to-text
    visual-question-answering zero-shot-classification zero-shot-image-classification
    zero-shot-object-detection
""")
_STRINGS = ("library_name", "license_name", "license_link", "thumbnail")
_LISTS_OF_STRINGS = ("tags", "datasets", "metrics", "language", "base_model")


def metadata_of(content: str) -> dict[str, Any] | None:
    """Metadata at the top of a card; None if there are none.

    Raises:
        ValueError: if they are no YAML, or no mapping.
    """
    found = _FRONT_MATTER.match(content)
    if found is None:
        return None
    try:
        metadata = yaml.safe_load(found[1] or "")
    except yaml.YAMLError as error:
        raise ValueError(f"bad YAML: {error}") from error
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise ValueError(f"the metadata must be a mapping, not {type(metadata).__name__}")
    return metadata


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    try:
        metadata = metadata_of(content)
    except ValueError as error:
        return [str(error)], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    warnings = [] if "license" in metadata else ['"license" is missing']
    return [*_simple_errors(metadata), *_model_index_errors(metadata.get("model-index"))], warnings


def _simple_errors(metadata: dict[str, Any]) -> list[str]:
    licenses = metadata.get("license", [])
    licenses = licenses if isinstance(licenses, list) else [licenses]
    errors = [
        f'"license" must be one that is known, not {one!r}' for one in licenses if not _is_one_of(one, _LICENSES)
    ]
    if "pipeline_tag" in metadata and not _is_one_of(metadata["pipeline_tag"], _TASKS):
        errors.append(f'"pipeline_tag" must be one of the known tasks, not {metadata["pipeline_tag"]!r}')
    errors += [f'"{key}" must be a string' for key in _STRINGS if not isinstance(metadata.get(key, ""), str)]
    for key in _LISTS_OF_STRINGS:
        value = metadata.get(key, [])
        if not isinstance(value, str) and not _is_list_of_strings(value):
            errors.append(f'"{key}" must be a string or a list of strings')
    return errors


def _is_one_of(value: Any, known: frozenset[str]) -> bool:
    return isinstance(value, str) and value in known


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _model_index_errors(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list) or not index:
        return ['"model-index" must be a list with a model']
    errors = []
    for i, model in enumerate(index):
        place = f"model-index[{i}]"
        if not isinstance(model, dict) or not _is_text(model.get("name")):
            errors.append(f'"{place}.name" must be a string')
        elif not isinstance(model.get("results"), list):
            errors.append(f'"{place}.results" must be a list')
        else:
            for j, result in enumerate(model["results"]):
                errors += _result_errors(result, f"{place}.results[{j}]")
    return errors


def _result_errors(result: Any, place: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{place}" must be a mapping']
    errors = []
    for section, fields in (("task", ("type",)), ("dataset", ("name", "type"))):
        value = result.get(section)
        value = value if isinstance(value, dict) else {}
        errors += [f'"{place}.{section}.{name}" must be a string' for name in fields if not _is_text(value.get(name))]
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, f'"{place}.metrics" must be a list with a metric']
    for i, metric in enumerate(metrics):
        metric = metric if isinstance(metric, dict) else {}
        if not _is_text(metric.get("type")):
            errors.append(f'"{place}.metrics[{i}].type" must be a string')
        if not _is_number(metric.get("value")):
            errors.append(f'"{place}.metrics[{i}].value" must be a number')
    return errors


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tags_of(metadata: dict[str, Any]) -> list[str]:
    """Tags under which the Hub lists a model."""
    tags = [metadata[key] for key in ("library_name", "pipeline_tag") if _is_text(metadata.get(key))]
    for key, prefix in (("tags", ""), ("datasets", "dataset:"), ("license", "license:"), ("language", "")):
        value = metadata.get(key) or []
        tags += [f"{prefix}{one}" for one in ([value] if isinstance(value, str) else value)]
    if metadata.get("model-index"):
        tags.append("model-index")
    return [*dict.fromkeys(tags), "region:us"]
