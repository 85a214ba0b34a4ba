"""Read what pytest wrote, tell it in a table, and compare it with the baseline."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# A skip whose reason starts so names a mixin that the installed version does not have.
UNAVAILABLE = "not available: "

# They need a checkpoint key mapping registered with Transformers, which ViTReg has on purpose not.
NEEDS_KEY_MAPPING = frozenset(
    {"ModelTest::test_reverse_loading_mapping", "ModelTest::test_can_load_from_already_mapped_keys"}
)


@dataclass(frozen=True)
class Result:
    """One test's outcome: `passed` (no part of it skipped), `skipped` (at least one part) or `failed`."""

    test: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Baseline:
    """Names of the tests the baseline family passes, and the versions that holds for."""

    transformers: str
    torch: str
    passed: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> Baseline:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["transformers"], content["torch"], frozenset(content["passed"]))

    def write(self, path: Path, family: str) -> None:
        content = {"family": family, "transformers": self.transformers, "torch": self.torch}
        path.write_text(json.dumps({**content, "passed": sorted(self.passed)}, indent=2) + "\n", encoding="utf-8")

    def missing(self, results: Iterable[Result]) -> list[Result]:
        """Baseline tests that are not among the passed ones of `results`, with what happened to them instead."""
        found = {result.test: result for result in results}
        names = sorted(self.passed - NEEDS_KEY_MAPPING)
        outcomes = [found.get(name, Result(name, "absent", "there is no such test")) for name in names]
        return [outcome for outcome in outcomes if outcome.status != "passed"]


def read_junit(path: Path) -> list[Result]:
    """Read a JUnit file; a test with subtests counts once, as its worst part."""
    found: dict[str, Result] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        test = f"{case.get('classname', '').rpartition('.')[2] or '(collection)'}::{case.get('name')}"
        result = Result(test, *_outcome(case))
        if test not in found or _SEVERITY[result.status] > _SEVERITY[found[test].status]:
            found[test] = result
    return list(found.values())


_SEVERITY = {"passed": 0, "skipped": 1, "failed": 2}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for tag, status in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        reasons = [" ".join((part.get("message") or "").split()) for part in case.findall(tag)]
        if reasons:
            return status, " | ".join(dict.fromkeys(reasons))
    return "passed", ""


def passed(results: Iterable[Result]) -> frozenset[str]:
    """Names of the tests that passed."""
    return frozenset(result.test for result in results if result.status == "passed")


def table(results: Iterable[Result]) -> str:
    """Passed, skipped and failed tests per test class."""
    counts: dict[str, dict[str, int]] = {}
    for result in results:
        for row in (result.test.partition("::")[0], "total"):
            counts.setdefault(row, dict.fromkeys(_SEVERITY, 0))[result.status] += 1
    total = counts.pop("total", dict.fromkeys(_SEVERITY, 0))
    rows = [*sorted(counts.items()), ("total", total)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  {'passed':>7}  {'skipped':>7}  {'failed':>7}"]
    lines += [f"{name:{width}}  {_numbers(row)}" for name, row in rows]
    return "\n".join(lines)


def _numbers(row: Mapping[str, int]) -> str:
    return "  ".join(f"{row[status]:>7}" for status in _SEVERITY)


def unavailable(results: Iterable[Result]) -> list[str]:
    """What the installed Transformers version does not offer, as the test module found it."""
    reasons = {result.reason for result in results if UNAVAILABLE in result.reason}
    return sorted(reason.partition(UNAVAILABLE)[2] for reason in reasons)
