"""Get Transformers' common test mixins: they are in its source distribution (`tests/test_*.py`), not in the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_DOWNLOAD_SECONDS = 600


def fetch_mixins(cache: Path, version: str) -> Path:
    """Return the folder that holds the mixins of Transformers `version`, downloading it once.

    Args:
        cache: folder for downloads; made if missing.
        version: the installed Transformers version.

    Returns:
        The `tests` folder of the unpacked source distribution.

    Raises:
        RuntimeError: if the source distribution cannot be had or is of another version; the message is one sentence.
    """
    home = cache / f"transformers-{version}"
    if not home.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # A sibling of the target, so that the rename below is atomic and an interrupted download leaves no half.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
            unpacked = _unpack(_download(Path(scratch), version), Path(scratch) / "unpacked", version)
            try:
                os.rename(unpacked, home)
            except OSError:
                if not home.is_dir():  # else another run was quicker
                    raise
    _check_version(home, version)
    return home / "tests"


def _download(scratch: Path, version: str) -> Path:
    """Let the running interpreter's pip download the source distribution."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(scratch), f"transformers=={version}"]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        reason = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"pip took more than {_DOWNLOAD_SECONDS} s"
    archives = sorted(scratch.glob("transformers-*.tar.gz"))
    if reason or not archives:
        raise RuntimeError(
            f"cannot download the source distribution of transformers {version}, which holds the common tests: "
            f"{reason or 'pip left no archive'}"
        )
    return archives[0]


def _unpack(archive: Path, target: Path, version: str) -> Path:
    """Unpack the package's metadata and its tests, and nothing else."""
    top = f"transformers-{version}"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if not member.isfile() or not re.match(rf"{re.escape(top)}/(PKG-INFO$|tests/)", member.name):
                continue
            destination = target / member.name
            if not destination.resolve().is_relative_to(target.resolve()):
                raise RuntimeError(f"the archive {archive.name} holds a file outside its own folder: {member.name}")
            destination.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None  # a regular file
            with content, destination.open("wb") as out:
                shutil.copyfileobj(content, out)
    if not (target / top / "tests" / "test_modeling_common.py").is_file():
        raise RuntimeError(f"the source distribution {archive.name} has no tests/test_modeling_common.py")
    return target / top


def _check_version(home: Path, version: str) -> None:
    """Refuse a folder whose metadata names another version."""
    metadata = (home / "PKG-INFO").read_text(encoding="utf-8")
    found = re.search(r"^Version: (\S+)", metadata, re.MULTILINE)
    if found is None or found.group(1) != version:
        raise RuntimeError(
            f"{home} holds the tests of transformers {found.group(1) if found else '(unknown)'}, but {version} is "
            "installed: delete that folder"
        )
