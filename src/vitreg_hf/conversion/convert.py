# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From any source to ViTReg: one loader, one report, nothing silently left random or unused."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import tqdm
from torch import Tensor

from vitreg_hf.conversion.layout import Layout, Reading, Told, check_depth, check_told, empty_model, own_shapes
from vitreg_hf.conversion.layouts import named_layout, recognised
from vitreg_hf.conversion.report import Report
from vitreg_hf.conversion.rules import Row, rows_of
from vitreg_hf.conversion.stored import CONVERSION, Source, open_source
from vitreg_hf.conversion.training_files import unwrapped
from vitreg_hf.conversion.writing import check_new, new_folder, write_json, write_safetensors
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.image_processing_pil_vitreg import ViTRegImageProcessorPil
from vitreg_hf.model.image_processing_vitreg import ViTRegImageProcessor

_OF_WRONG_TYPES = (TypeError, AttributeError, LookupError, ArithmeticError)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMED = 5  # tensors named in one message; a missing block has dozens


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        config: of the model.
        report: what became of every tensor; print it.
        reading: how the source was read.
        source: what was read.
        folder: where the result was saved, or None.
    """

    config: ViTRegConfig
    report: Report
    reading: Reading = field(repr=False)
    source: Source = field(repr=False)
    folder: Path | None = None

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode: `ViTRegForImageClassification` with a head, else `ViTRegModel`."""
        model = empty_model(self.config, self.reading.has_head)
        weights = {name: tensor.clone() for name, tensor in _own_tensors(self)}
        # assign: the parameters of a model without memory cannot be copied to
        model.load_state_dict(weights, strict=True, assign=True)
        model.config.architectures = [type(model).__name__]
        return model.eval()

    @cached_property
    def processor(self) -> Any:
        """The image processor: that of torchvision, or of PIL where torchvision is not installed."""
        try:
            return ViTRegImageProcessor(**self.reading.processor)
        except ImportError:
            return ViTRegImageProcessorPil(**self.reading.processor)


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    layout: str | None = None,
    revision: str | None = None,
    head: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    num_attention_heads: int | None = None,
    layer_norm_eps: float | None = None,
    use_mask_token: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint of another family, completely or not at all.

    Args:
        source: id of a repository on the Hub, a folder, a `.safetensors` file, or a file of `torch.save`.
        output: folder to save config, weights, image processor and a report (`conversion.json`) in; weights are
            streamed, so that this needs memory for one shard of at most 5 GB. None: nothing is saved.
        layout: name of the layout, where it cannot be recognised.
        revision: branch, tag or commit of the repository.
        head: file of a linear classifier that goes with a backbone of DINOv2 or DINOv3.
        architecture: name of a model of timm, where the checkpoint does not say it.
        layer_norm_eps: where the checkpoint does not say it; left out, that of its layout.
        num_attention_heads: where the checkpoint does not say it; left out, one per 64 channels.
        use_mask_token: keep the token that stands for masked patches in self-supervision, which must be there.
        dtype: type of the weights, floating point of 16 bits or more; left out, that of the source.
        overwrite: replace the output folder.

    Returns:
        The conversion; `.model` and `.processor` are ready to use, `.report` tells what became of every tensor.

    Raises:
        ValueError: if the source is damaged, holds code, is of no known layout or of one that the family cannot hold
            (with the reason), is told what it says otherwise or does not read, or a tensor is missing, unknown, of
            another shape or no floating point tensor; before anything is written.
        OSError: from the Hub or the disk; nothing is left behind.

    Example:

    ```python
    >>> converted = vitreg_hf.convert_checkpoint("facebook/dinov2-with-registers-base")
    >>> model, processor = converted.model, converted.processor
    ```"""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"Expected a dtype of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    if output is not None:
        check_new(Path(output), overwrite, (source, head))
    told = Told(architecture, num_attention_heads, layer_norm_eps, use_mask_token)
    conversion = plan_conversion(source, layout, revision, head, told)
    if dtype is not None:
        conversion.config.dtype = dtype
    if output is None:
        return conversion
    return save_conversion(conversion, output, overwrite)


def plan_conversion(
    source: str | os.PathLike[str],
    layout: str | None = None,
    revision: str | None = None,
    head: str | os.PathLike[str] | None = None,
    told: Told | None = None,
) -> Conversion:
    """Find out everything about a conversion but the values of tensors; see `convert_checkpoint`."""
    opened = unwrapped(open_source(source, revision))
    if head is not None:
        opened = _with_head(opened, head)
    told = told or Told()
    known, why = _layout_of(opened, layout, told)
    reading = _reading(known, opened, told)
    check_told(known, reading.config, told)
    if told.layer_norm_eps is not None:
        reading.config.layer_norm_eps = told.layer_norm_eps
        reading.config.check_values()
    rows = rows_of(reading.table, own_shapes(reading.config, reading.has_head), reading.rules)
    dropped = _check(opened, reading, rows)
    if reading.config.dtype is None:
        reading.config.dtype = _dtype(opened, rows)
    report = Report(opened.name, known.name, why, tuple(rows), dropped, (*opened.notes, *reading.notes))
    return Conversion(reading.config, report, reading, opened)


def _layout_of(source: Source, name: str | None, told: Told) -> tuple[Layout, str]:
    if name is None and told.architecture is None:
        return recognised(source)
    return named_layout(name or "timm"), "as told"


def _reading(layout: Layout, source: Source, told: Told) -> Reading:
    try:
        reading = layout.read(source, told)
    except (StrictDataclassError, *_OF_WRONG_TYPES) as error:  # a foreign config can hold anything
        said = " ".join(str(error).split())
        raise ValueError(f"Expected a config of {layout.title} in {source.name}, got another one: {said}") from error
    check_depth(reading.config, source)
    return reading


def _with_head(source: Source, head: str | os.PathLike[str]) -> Source:
    tensors = {name.removeprefix("linear_head."): tensor for name, tensor in open_source(head).tensors.items()}
    if tensors.keys() != {"weight", "bias"}:
        raise ValueError(f"Expected weight and bias of a linear head in {head}, got {', '.join(list(tensors)[:3])}")
    joined = {**source.tensors, **{f"linear_head.{name}": tensor for name, tensor in tensors.items()}}
    return source.changed(joined, f"the linear head is {head}")


# Checks


def _check(source: Source, reading: Reading, rows: Sequence[Row]) -> dict[str, str]:
    """Refuse a partial conversion; returns the tensors that are left out, and why."""
    dropped = _dropped(source, reading, rows)
    problems = [
        *_missing(source, rows),
        *_unknown(source, rows, dropped),
        *_misshapen(source, own_shapes(reading.config, reading.has_head), rows),
    ]
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems[: 2 * _NAMED])
        more = f"\n- and {len(problems) - 2 * _NAMED} more" if len(problems) > 2 * _NAMED else ""
        raise ValueError(f"Expected the weights of a whole model in {source.name}, got:{listed}{more}")
    return dropped


def _missing(source: Source, rows: Sequence[Row]) -> Iterator[str]:
    absent = [row.foreign for row in rows if row.foreign not in source.tensors]
    if absent:
        yield f"no tensor {_some(absent)}"


def _unknown(source: Source, rows: Sequence[Row], dropped: Mapping[str, str]) -> Iterator[str]:
    used = {row.foreign for row in rows}
    unknown = [name for name in source.tensors if name not in used and name not in dropped]
    if unknown:
        yield f"unknown tensors, which would be left unused: {_some(unknown)}"


def _misshapen(source: Source, shapes: Mapping[str, tuple[int, ...]], rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.foreign not in source.tensors:
            continue
        stored = source.tensors[row.foreign]
        if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
            yield f"{row.foreign} of type {stored.dtype}, expected floating point of 16 bits or more"
            continue
        try:
            read = row.rule.read(stored.like())
        except (ValueError, RuntimeError, IndexError) as error:
            yield f"{row.foreign} of shape {stored.shape}: {error}"
            continue
        for name, tensor in zip(row.own, read, strict=True):
            if tuple(tensor.shape) != shapes[name]:
                made = f"which makes {name} {tuple(tensor.shape)}, expected {shapes[name]}"
                yield f"{row.foreign} of shape {stored.shape}, {made}"


def _dropped(source: Source, reading: Reading, rows: Sequence[Row]) -> dict[str, str]:
    used = {row.foreign for row in rows}
    patterns = [(re.compile(pattern), reason) for pattern, reason in reading.dropped.items()]
    found = {
        name: next((reason for pattern, reason in patterns if pattern.search(name)), None)
        for name in source.tensors
        if name not in used
    }
    return {**source.left_out, **{name: reason for name, reason in found.items() if reason is not None}}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _dtype(source: Source, rows: Sequence[Row]) -> torch.dtype:
    """The type of most tensors."""
    types = [source.tensors[row.foreign].dtype for row in rows]
    return max(set(types), key=types.count)


# The result


def _own_tensors(conversion: Conversion, progress: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the model's parameters, read one row of the source at a time.

    Raises:
        ValueError: for a value that the layout has no parameter for, or that cannot be read.
    """
    prefix = own_prefix(conversion.reading)
    dtype = cast(torch.dtype, conversion.config.dtype)
    rows = tqdm(conversion.report.rows, desc="Converting", unit="tensor", disable=not progress)
    for row in rows:
        try:
            parts = row.rule.read(conversion.source.tensors[row.foreign].read())
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"Expected a tensor that can be converted, got {row.foreign}: {error}") from error
        for name, tensor in zip(row.own, parts, strict=True):
            yield (name if name.startswith("classifier.") else prefix + name), tensor.to(dtype)


def own_prefix(reading: Reading) -> str:
    """What stands before the names of a backbone inside a classifier; nothing in a backbone by itself."""
    return "vitreg." if reading.has_head else ""


def save_conversion(
    conversion: Conversion,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    verification: Mapping[str, Any] | None = None,
) -> Conversion:
    """Save config, weights, image processor and report of a conversion, completely or not at all.

    Args:
        conversion: of `convert_checkpoint`.
        output: a new folder.
        overwrite: replace a folder that is there, once the new one is complete.
        verification: what a comparison with the source found, as JSON holds it; goes to the report.

    Returns:
        The conversion, with its folder.

    Raises:
        ValueError: if there is something in the way, or a value cannot be converted.
        OSError: if the disk is full.
    """
    final = Path(output)
    check_new(final, overwrite, [conversion.source.name])
    model = empty_model(conversion.config, conversion.reading.has_head)
    conversion.config.architectures = [type(model).__name__]
    verified = {} if verification is None else {"verified": verification}
    with new_folder(final, overwrite) as folder:
        write_safetensors(folder, _own_tensors(conversion, progress=True))
        conversion.config.save_pretrained(folder)
        conversion.processor.save_pretrained(folder)
        facts = dict(conversion.reading.facts)
        write_json(folder / CONVERSION, {**conversion.report.to_dict(), "facts": facts, **verified})
    return replace(conversion, folder=final)
