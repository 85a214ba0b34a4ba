"""Run Transformers' common model tests on ViTReg, and on Transformers' own register model for comparison.

    python tests/common_suite/run.py -n 2                      vitreg, compared with baseline_passed.json
    python tests/common_suite/run.py --compare -n 2            vitreg, compared with a run of the baseline now
    python tests/common_suite/run.py --write-baseline -n 2     run the baseline and store which tests it passes
    python tests/common_suite/run.py --partial -k pipeline     some tests only: no comparison, no minimum

Arguments that are not ours go to pytest. The exit status is 0 only if nothing failed, enough tests ran, the image
pipeline tests passed and (for vitreg) nothing that the baseline passes was missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from assemble import assemble
from families import BASELINE, FAMILIES, VITREG, Family
from mixins import fetch_mixins
from results import Baseline, Result, passed, read_junit, table, unavailable

REPOSITORY = Path(__file__).resolve().parents[2]
BASELINE_FILE = Path(__file__).resolve().parent / "baseline_passed.json"
NEEDED = ("transformers", "torch", "torchvision", "parameterized", "pytest")
SECONDS_PER_TEST = 300


def main(argv: list[str]) -> int:
    options, pytest_arguments = _parse(argv)
    sys.stdout.reconfigure(line_buffering=True)  # pytest writes to the same stream in between
    try:
        return _run(options, pytest_arguments)
    except RuntimeError as error:
        print(f"common suite: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: vitreg")
    parser.add_argument("--compare", action="store_true", help="run the baseline too, instead of reading its file")
    parser.add_argument("--write-baseline", action="store_true", help="run the baseline and write its file")
    parser.add_argument("--partial", action="store_true", help="a selection of tests: judge only those that ran")
    options, pytest_arguments = parser.parse_known_args(argv)
    default = BASELINE if options.write_baseline else VITREG
    options.family = FAMILIES[options.family] if options.family else default
    if options.write_baseline and (options.family is not BASELINE or options.compare or options.partial):
        parser.error("--write-baseline is a complete run of the baseline family, nothing else")
    if options.compare and (options.family is not VITREG or options.partial):
        parser.error("--compare is a complete run of vitreg")
    return options, pytest_arguments


def _run(options: argparse.Namespace, pytest_arguments: list[str]) -> int:
    installed = {name: _installed(name) for name in NEEDED}
    cache = Path(os.environ.get("VITREG_SUITE_CACHE") or REPOSITORY / ".cache" / "common_suite").resolve()
    mixins = fetch_mixins(cache, installed["transformers"])

    results, problems = _run_family(options.family, cache, mixins, pytest_arguments, options.partial)
    if options.write_baseline and not problems:
        _baseline(results, installed).write(BASELINE_FILE, BASELINE.model_type)
        print(f"wrote {BASELINE_FILE}")
    if options.family is VITREG and not options.partial:
        baseline = None
        if options.compare:
            baseline_results, baseline_problems = _run_family(BASELINE, cache, mixins, pytest_arguments, False)
            problems += baseline_problems
            baseline = _baseline(baseline_results, installed)
        else:
            baseline = _stored_baseline(installed)
        if baseline is not None:
            problems += _comparison(baseline, results)

    for problem in problems:
        print(f"PROBLEM  {problem}")
    print("common suite: " + (f"{len(problems)} problem(s)" if problems else "good"))
    return 1 if problems else 0


def _run_family(
    family: Family, cache: Path, mixins: Path, pytest_arguments: list[str], partial: bool
) -> tuple[list[Result], list[str]]:
    """Run one family's tests and print their table; return the results and what is wrong with them."""
    _check_importable(family)
    scratch = cache / "assembled" / family.model_type
    junit = scratch.with_suffix(".xml")
    module = assemble(scratch, mixins, family.model_type)
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(module), "-q", "--tb=short", "-rfE", f"--junitxml={junit}"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command.append(f"--timeout={SECONDS_PER_TEST}")
    started = time.monotonic()
    status = subprocess.run([*command, *pytest_arguments], cwd=scratch, env=_environment()).returncode
    seconds = time.monotonic() - started
    results = read_junit(junit) if junit.is_file() else []

    print(f"\n{family.model_type}, {seconds:.0f} s, {junit}\n{table(results)}")
    for name in unavailable(results):
        print(f"not available in this Transformers: {name}")
    return results, _problems(family, results, status, partial)


def _environment() -> dict[str, str]:
    """The tests' environment: offline, one thread, and this checkout's package first."""
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    paths = [str(REPOSITORY / "src"), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)
    # More threads than one make models this small many times slower on shared cores.
    return {**env, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _check_importable(family: Family) -> None:
    """Say what is wrong with the family in one sentence, rather than once per test."""
    names = [family.config, *family.heads().values(), *family.image_processors.values()]
    code = f"import {family.module} as m; print(*[n for n in {names!r} if not hasattr(m, n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise RuntimeError(f"cannot import {family.module}: {done.stderr.strip().rpartition(chr(10))[2]}")
    if done.stdout.strip():
        raise RuntimeError(f"{family.module} does not export {done.stdout.strip()}")


def _problems(family: Family, results: list[Result], status: int, partial: bool) -> list[str]:
    failed = [f"{result.test} failed: {result.reason[:300]}" for result in results if result.status == "failed"]
    problems = [f"{family.model_type}: {failure}" for failure in failed]
    if status != 0 and not failed:
        problems.append(f"{family.model_type}: pytest ended with exit status {status}")
    if partial:
        return problems
    ran = sum(result.status != "skipped" for result in results)
    if ran < family.minimum_run:
        problems.append(
            f"{family.model_type}: {ran} tests ran, expected at least {family.minimum_run} "
            "(--partial when you select tests on purpose)"
        )
    found = {result.test: result for result in results}
    for test in _pipeline_tests(family):
        result = found.get(test, Result(test, "absent"))
        if result.status in ("absent", "skipped"):
            problems.append(f"{family.model_type}: {test} must pass, but was {result.status}: {result.reason}")
    return problems


def _pipeline_tests(family: Family) -> list[str]:
    """Tests that must pass: the pipeline mixin turns every error while loading a model or processor into a skip."""
    tasks = set(family.pipelines())
    if importlib.util.find_spec("timm") is None:
        tasks.discard("image-segmentation")  # the mixin wants timm for it, though not all segmentation models do
    names = [f"ModelTest::test_pipeline_{task.replace('-', '_')}" for task in sorted(tasks)]
    return [name + dtype for name in names for dtype in ("", "_fp16")]


def _comparison(baseline: Baseline, results: list[Result]) -> list[str]:
    missing = baseline.missing(results)
    print(
        f"comparison with {BASELINE.model_type} (transformers {baseline.transformers}, torch {baseline.torch}): "
        f"{len(missing)} of its {len(baseline.passed)} passing tests do not pass here"
    )
    # Failed ones are listed already.
    return [
        f"{VITREG.model_type}: {result.test} passes for {BASELINE.model_type}, here it is {result.status}: "
        f"{result.reason[:300]}"
        for result in missing
        if result.status != "failed"
    ]


def _stored_baseline(installed: dict[str, str]) -> Baseline | None:
    """The stored baseline, or None (and a line saying so) if it was written for other versions."""
    if not BASELINE_FILE.is_file():
        print(f"no comparison: {BASELINE_FILE.name} is missing (--write-baseline makes it, --compare does without)")
        return None
    baseline = Baseline.read(BASELINE_FILE)
    stored, here = (baseline.transformers, baseline.torch), (installed["transformers"], installed["torch"])
    if stored != here:
        print(
            f"no comparison: {BASELINE_FILE.name} is for transformers {stored[0]} and torch {stored[1]}, installed "
            f"are {here[0]} and {here[1]} (--compare runs the baseline here)"
        )
        return None
    return baseline


def _baseline(results: list[Result], installed: dict[str, str]) -> Baseline:
    return Baseline(installed["transformers"], installed["torch"], passed(results))


def _installed(name: str) -> str:
    """The installed version without a local part such as `+cpu`."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        raise RuntimeError(f"needs the package {name}, which is not installed") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
