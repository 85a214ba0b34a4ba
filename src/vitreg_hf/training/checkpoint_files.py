# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders of checkpoints: complete or absent, listed with checksums, compared with them before they are loaded.

A checkpoint is `step-<n>` with a `manifest.json` of its files. It is made under a temporary name and renamed, so that
a process may be killed between any two files.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"
_MANIFEST, _UNFINISHED, _REPLACED = "manifest.json", ".unfinished", ".replaced-"
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step is."""
    return folder / f"step-{step:08d}"


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is made."""
    return folder / _UNFINISHED


# Writing


def begin(folder: Path) -> None:
    """Make an empty folder for the next checkpoint, and clear away what processes that were killed have left."""
    discard(folder)
    restore_replaced(folder)
    unfinished(folder).mkdir(parents=True)


def discard(folder: Path) -> None:
    """Clear away a checkpoint that is not complete."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)


def complete(folder: Path, final: Path) -> None:
    """List the files of the unfinished checkpoint, see them to the disk, and give it its name."""
    made = unfinished(folder)
    _write_manifest(made)
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():  # of a training that was continued from an earlier step
        os.replace(final, replaced)
    os.replace(made, final)
    _flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def rotate(newest: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, the one that was just written among them.

    Later ones are of a training that was continued from an earlier step, or broken: the training goes on from here.
    """
    others = [path for path in list_checkpoints(newest.parent) if path != newest]
    earlier = [path for path in others if path < newest]
    kept = earlier[len(earlier) - (keep - 1) :] if keep > 1 else []
    for path in others:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Give a checkpoint its name back if a process was killed just before it was replaced."""
    for aside in folder.glob(f"{_REPLACED}*"):
        final = folder / aside.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)


def _write_manifest(folder: Path) -> None:
    """List every file with its size and checksum, when all of them have reached the disk."""
    files = {str(file.relative_to(folder)): _fingerprint(file, flush=True) for file in _files(folder)}
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(files, indent=2))
    _flush(manifest)
    _flush(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)


def _fingerprint(file: Path, flush: bool = False) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if flush:
        _flush(file)
    return {"bytes": file.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Finding


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first; whether their files are still good, others say."""
    named = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(path for path in named if (path / _MANIFEST).is_file())


def broken_files(checkpoint: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each: missing, of another size, or with other bytes."""
    try:
        listed: dict[str, dict[str, Any]] = json.loads((checkpoint / _MANIFEST).read_text())
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in listed.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return [f"{_MANIFEST}: {error}"]
    wrong = []
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            wrong.append(f"{name}: missing")
        elif file.stat().st_size != size:
            wrong.append(f"{name}: {file.stat().st_size} bytes, not {size}")
        elif _fingerprint(file)["sha256"] != digest:
            wrong.append(f"{name}: other bytes than were written")
    return wrong if PROGRESS in expected else [*wrong, f"{PROGRESS}: not listed"]


def checkpoint_to_resume(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint to continue from, with all its files as they were written.

    Args:
        wanted: path of a checkpoint; `latest` for the newest good one in `folder`; `auto` for the same, or a new
            training if there is none; None for a new training.
        folder: where this training keeps its checkpoints.

    Raises:
        ValueError: if the checkpoint does not exist or is broken, if all of them are, or if a new training would mix
            its checkpoints with others.
    """
    restore_replaced(folder)
    found = list_checkpoints(folder)
    if wanted is None:
        if found:
            raise ValueError(
                f"Expected a folder without checkpoints for a new training, got {found[-1]}: resume it "
                "(--resume_from_checkpoint latest) or name another output_dir"
            )
        return None
    if wanted not in ("latest", "auto"):
        if wrong := broken_files(Path(wanted)):
            raise ValueError(f"Expected a complete checkpoint, got {wanted!r} with {'; '.join(wrong)}")
        if found and Path(wanted).resolve().parent != folder.resolve():
            raise ValueError(f"Expected a folder without checkpoints of another training, got {found[-1]}")
        return Path(wanted)
    return _newest_good(found, folder, or_none=wanted == "auto")


def _newest_good(found: Sequence[Path], folder: Path, or_none: bool) -> Path | None:
    broken: list[str] = []
    for checkpoint in reversed(found):
        wrong = broken_files(checkpoint)
        if not wrong:
            for line in broken:
                print(f"passed over {line}")
            return checkpoint
        broken.append(f"{checkpoint} ({'; '.join(wrong)})")
    if broken:
        raise ValueError(f"Expected a complete checkpoint in {folder}, got only broken ones: {', '.join(broken)}")
    if or_none:
        return None
    raise ValueError(f"Expected a complete checkpoint in {folder}, got none")
