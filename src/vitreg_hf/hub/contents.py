# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Which files of a folder go into a repository, and which of a repository they replace."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from vitreg_hf.hub.folder_checks import ARTIFACTS, CARD, CONFIG, PROCESSOR, RESULTS, ModelFolder
from vitreg_hf.hub.remote_code import code_files, config_with_code, processor_with_code

# What readers would load beside or instead of the new files: weights of another layout, and what stands before
# `config.json` and `preprocessor_config.json` where it exists; and results of another model.
_SUPERSEDED = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"
    rf"|adapter_config\.json|processor_config\.json|{re.escape(RESULTS)}|{re.escape(ARTIFACTS)}"
)

Contents = Mapping[str, Path | bytes]


def contents_of(model: ModelFolder, card: str, with_code: bool) -> dict[str, Path | bytes]:
    """Path in the repository -> file, or content where the repository gets another one than the folder has.

    Args:
        model: the folder.
        card: text of the card.
        with_code: add the code of the installed version, and name it in the configs.
    """
    contents: dict[str, Path | bytes] = {CONFIG: model.path / CONFIG, PROCESSOR: model.path / PROCESSOR}
    contents |= {path.name: path for path in (*model.weights.all, *model.pictures)}
    contents |= {path.relative_to(model.path).as_posix(): path for path in model.results}
    contents[CARD] = _card(model.path / CARD, card)
    if with_code:
        contents |= {path.name: path for path in code_files()}
        contents[CONFIG] = _saved(model.config, config_with_code(model.config), model.path / CONFIG)
        contents[PROCESSOR] = _saved(model.processor, processor_with_code(model.processor), model.path / PROCESSOR)
    return dict(sorted(contents.items()))


def _card(path: Path, text: str) -> Path | bytes:
    """The file as it is, with its line ends, if nothing else is to be published."""
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    return path if same else text.encode()


def _saved(before: dict[str, Any], after: dict[str, Any], path: Path) -> Path | bytes:
    """As Transformers writes a config."""
    return path if after == before else f"{json.dumps(after, indent=2, sort_keys=True)}\n".encode()


def size_of(contents: Contents) -> int:
    """Bytes of all files."""
    return sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in contents.values())


def changes(contents: Contents, there: Mapping[str, RepoFile]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What has to be done to the files of a repository so that it holds the contents; nothing if it does."""
    code = {path.name for path in code_files()}  # of an earlier commit with code: no config names it any more
    gone = [path for path in there if path not in contents and (path in code or _SUPERSEDED.fullmatch(path))]
    added = [CommitOperationAdd(path, _readable(content)) for path, content in contents.items()]
    return [
        *(operation for operation in added if not _is_same(operation, there.get(operation.path_in_repo))),
        *(CommitOperationDelete(path, is_folder=False) for path in gone),
    ]


def _readable(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content.absolute())


def _is_same(operation: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Compared as the Hub names contents: large files by their sha256, others as git does."""
    if there is None or there.size != operation.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as file:
        content = file.read()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
