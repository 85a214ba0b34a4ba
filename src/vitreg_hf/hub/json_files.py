# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading JSON files of a folder that somebody is about to publish."""

import json
from pathlib import Path
from typing import Any, NoReturn

from vitreg_hf.model.configuration_checks import MOST_BYTES


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: for a file that is too large or damaged, nested too deep, or no object; and for NaN and infinity,
            which Python writes but which are no JSON, so that the Hub cannot read them.
        OSError: for a file that cannot be opened.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"Expected at most {MOST_BYTES} bytes, got {size}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON that can be read, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object, got {type(content).__name__}")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant}, which is no number of JSON")
