# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of classes that a checkpoint counts but does not name."""

import importlib.util
from collections import Counter
from typing import Any

# Sets that timm brings names of; the count of classes tells which.
_SETS = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog"}


def named_labels(count: int) -> dict[str, Any]:
    """Fields of the config that name the classes of a head.

    Args:
        count: number of classes. ImageNet's are named where timm, which brings the names, is installed.

    Returns:
        `id2label` and `label2id`; `num_labels` alone where the names are not known.
    """
    if count not in _SETS or importlib.util.find_spec("timm") is None:
        return {"num_labels": count}
    from timm.data import ImageNetInfo

    info = ImageNetInfo(_SETS[count])
    names = [info.index_to_description(index) for index in range(count)]
    alike = {name for name, times in Counter(names).items() if times > 1}  # crane, the bird and the machine: say which
    names = [f"{name} ({info.index_to_label_name(i)})" if name in alike else name for i, name in enumerate(names)]
    return label_fields(names)


def label_fields(names: list[str]) -> dict[str, Any]:
    """Fields of the config for classes by name."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
