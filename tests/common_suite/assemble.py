"""Put the mixins, the stand-ins and the test module together into one runnable `tests` package.

The result, for a family called `F`:

    pytest.ini
    src/transformers/__init__.py          empty; the pipeline mixin executes it to find the installed package
    utils/fetch_hub_objects_for_ci.py     ours
    tests/test_*.py                       Transformers', untouched
    tests/exporters/, generation/, ...    ours: modules the mixins import and the source distribution lacks
    tests/families.py, images.py, parallel.py
    tests/models/F/test_F.py              ours: the test classes
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Ours -> the name under which the mixins (or our test module) import it.
_FILES = {
    "families.py": "tests/families.py",
    "template/images.py": "tests/images.py",
    "template/parallel.py": "tests/parallel.py",
    "stand_ins/configuration.py": "tests/utils/test_configuration_utils.py",
    "stand_ins/distributed.py": "tests/distributed_testing_utils.py",
    "stand_ins/export.py": "tests/exporters/test_export.py",
    "stand_ins/fixtures.py": "utils/fetch_hub_objects_for_ci.py",
    "stand_ins/generation.py": "tests/generation/test_utils.py",
    "stand_ins/image_pipelines.py": "tests/pipelines/image_pipelines.py",
}

_PYTEST_INI = """[pytest]
testpaths = tests/models
addopts = -p no:cacheprovider -p no:asyncio
filterwarnings =
    ignore::pytest.PytestUnknownMarkWarning
"""


def assemble(target: Path, mixins: Path, model_type: str) -> Path:
    """Write the package, replacing what was there.

    Args:
        target: folder to write; must be for this use alone, since it is emptied first.
        mixins: `tests` folder of the Transformers source distribution.
        model_type: the family to aim the tests at.

    Returns:
        The test module, relative to `target`.
    """
    shutil.rmtree(target, ignore_errors=True)
    for source, destination in _FILES.items():
        _copy(HERE / source, target / destination)
    for mixin in sorted(mixins.glob("test_*.py")):
        _copy(mixin, target / "tests" / mixin.name)
    module = Path("tests", "models", model_type, f"test_{model_type}.py")
    _copy(HERE / "template" / "family_tests.py", target / module)
    _write(target / "tests" / "utils" / "tiny_model_summary.json", "{}\n")
    _write(target / "src" / "transformers" / "__init__.py", "")
    _write(target / "pytest.ini", _PYTEST_INI)
    _add_pipeline_modules(target / "tests")
    for folder in {path.parent for path in (target / "tests").rglob("*.py")} | {target / "tests" / "models"}:
        _write(folder / "__init__.py", "")
    return module


def _add_pipeline_modules(tests: Path) -> None:
    """Give each pipeline test class that the pipeline mixin names a module to be found in.

    Newer versions name them in strings and import them late, 5.17 imports all of them at once. Ours are the image
    ones; the others are empty, and skipped because no family maps their task.
    """
    source = (tests / "test_pipeline_mixin.py").read_text(encoding="utf-8")
    ours = (tests / "pipelines" / "image_pipelines.py").read_text(encoding="utf-8")
    named = re.findall(r"pipelines\.(test_pipelines_\w+)(?:\.| import )(\w+)", source)
    for module, name in sorted(set(named)):
        has_stand_in = f"class {name}(" in ours
        line = f"from .image_pipelines import {name}  # noqa: F401\n" if has_stand_in else f"class {name}: ...\n"
        _write(tests / "pipelines" / f"{module}.py", line)


def _copy(source: Path, destination: Path) -> None:
    _write(destination, source.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
