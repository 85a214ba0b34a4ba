# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""One warm trainer for all tests of whole trainings, and the trainings that others are compared with."""

from collections.abc import Iterator
from typing import Any

import pytest

from .outcome import CLASSIFY, RANDOM, outcome
from .trainer import Trainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    warm = Trainer(tmp_path_factory.mktemp("jobs"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def uninterrupted(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the training with everything random leaves when nothing happens to it, and how many files it touches."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = trainer.run(CLASSIFY, *RANDOM, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return outcome(folder)
