"""Every benchmark runs as a command, on a network of seconds; its timings are not asserted."""

import json
import pathlib
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def neighbours_of_a_script(monkeypatch):
    """Python looks for what a script imports in its folder, when it runs the script itself."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    sys.modules.pop("side_by_side", None)


def run(name, *arguments):
    return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["main"](arguments)


def test_stochastic_depth_counts_what_subsets_save(tmp_path, capsys):
    output = tmp_path / "numbers" / "depth.json"
    small = ["--hidden_size", "64", "--image_size", "32", "--num_layers", "2", "--repetitions", "1"]
    run("stochastic_depth", *small, "--output", str(output))
    results = json.loads(output.read_text())
    rows = {row["rate"]: row for row in results["rows"]}
    assert list(rows) == [0.0, 0.1, 0.2, 0.3, 0.5]
    assert rows[0.0]["flops_saved"] == 0.0
    saved = [row["flops_saved_at_batch_128"] for row in rows.values()]
    assert saved == sorted(saved)
    assert rows[0.0]["gflops"]["mask"] == rows[0.5]["gflops"]["mask"]
    assert {"machine", "versions", "settings"} < results.keys()
    table = capsys.readouterr().out
    assert table.count("\n") == 7
    assert f"written: {output}" in table


def test_the_committed_numbers_are_of_the_network_that_the_docstring_names():
    results = json.loads((ROOT / "benchmarks" / "results" / "stochastic_depth.json").read_text())
    settings = results["settings"]
    assert (settings["hidden_size"], settings["num_layers"], settings["image_size"]) == (384, 12, 224)
    for row in results["rows"]:  # almost all operations of this network are in its blocks
        dropped = 1 - row["samples_kept"] / settings["batch_size"]
        assert row["flops_saved"] == pytest.approx(dropped, abs=0.01)
        assert row["flops_saved_at_batch_128"] == pytest.approx(row["rate"], abs=0.02)


def test_a_wrong_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        run("stochastic_depth", "--repetitions", "0")
    assert "expected a positive number in --repetitions, got 0" in capsys.readouterr().err


def test_conversion_memory_measures_a_conversion(tmp_path, capsys):
    output, other = tmp_path / "memory.json", {"size": "large", "files": 1}
    output.write_text(json.dumps({"rows": [other]}))
    run("conversion_memory", "--size", "tiny", "--shard_gigabytes", "0.0005", "--output", str(output))
    results = json.loads(output.read_text())
    row, kept = results["rows"]
    assert kept == other
    assert row["files"] > 1
    assert row["largest_file_gigabytes"] < row["weights_gigabytes"]
    assert row["resident_gigabytes"] > row["anonymous_gigabytes"] > 0
    assert {"machine", "versions"} < results.keys()
    assert f"written: {output}" in capsys.readouterr().out


def test_converting_took_no_more_memory_than_one_file_of_the_result():
    rows = json.loads((ROOT / "benchmarks" / "results" / "conversion_memory.json").read_text())["rows"]
    assert {("large", 1), ("giant", 1)} < {(row["size"], row["files"]) for row in rows}
    for row in rows:
        assert row["anonymous_gigabytes"] < 1.1 * row["largest_file_gigabytes"], row["size"]


def test_inference_compares_features_and_counts_operations(tmp_path, capsys):
    output = tmp_path / "pooled_features.json"
    small = ["--num_layers", "2", "--image_size", "28", "--batch_sizes", "1", "2", "--repetitions", "2"]
    run("pooled_features", *small, "--output", str(output))
    run("pooled_features", *small[:-3], "--repetitions", "1", "--batch_sizes", "1", "--output", str(output))
    rows = json.loads(output.read_text())["rows"]
    assert [(row["batch_size"], row["repetitions"]) for row in rows] == [(1, 1), (2, 2)]  # the former replaced its own
    for row in rows:
        assert set(row["speedup_over"]) == {"all tokens", "transformers", "timm"}
        assert max(row["largest_difference"].values()) < 1e-4
        counted = row["gflops_per_image"]
        assert counted["vitreg_hf"] < 0.7 * counted["all tokens"]  # most of one of two blocks
        assert counted["all tokens"] == counted["transformers"] == counted["timm"]
    assert f"written: {output}" in capsys.readouterr().out


def test_mixed_resolutions_compares_packing_with_padding_and_one_by_one(tmp_path, capsys):
    output = tmp_path / "mixed_resolutions.json"
    small = ["--num_layers", "2", "--hidden_size", "64", "--batch_size", "4", "--most_patches", "16"]
    run("mixed_resolutions", *small, "--repetitions", "2", "--output", str(output))
    rows = json.loads(output.read_text())["rows"]
    assert {row["pass"] for row in rows} == {"inference", "training"}
    for row in rows:
        assert set(row["speedup_over"]) == {"padded", "one by one", "transformers"}
        assert max(row["largest_difference"].values()) < 1e-5
        counted = row["gflops"]
        assert counted["packed"] == pytest.approx(counted["one by one"], rel=0.02)  # positions apart
        assert counted["padded"] > 1.2 * counted["packed"]
        assert row["patches"][-1] <= 17
        assert sum(row["share_of_time"]["packed"].values()) == pytest.approx(1)
    assert f"written: {output}" in capsys.readouterr().out


def test_the_committed_numbers_of_mixed_resolutions_are_of_equal_outputs():
    rows = json.loads((ROOT / "benchmarks" / "results" / "mixed_resolutions.json").read_text())["rows"]
    found = {
        (row["pass"], row["most_patches"]) for row in rows if row["batch_size"] == 16 and row["hidden_size"] == 384
    }
    assert found >= {(kind, most) for kind in ("inference", "training") for most in (16, 64, 196)}
    for row in rows:
        assert max(row["largest_difference"].values()) < 1e-5
        assert 3 < row["patches"][-1] / row["patches"][0] < 6  # 1:4, rounded to whole patches


@pytest.mark.parametrize("wrong", [["--most_patches", "3"], ["--batch_size", "0"]])
def test_mixed_resolutions_refuses_wrong_numbers(wrong, capsys):
    with pytest.raises(SystemExit):
        run("mixed_resolutions", *wrong)
    assert f"in {wrong[0]}, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--image_size", "30"], "expected a multiple of the patch size 14 in --image_size, got 30"),
        (["--batch_sizes", "0"], "expected positive numbers in --batch_sizes, got [0]"),
        (["--threads", "0"], "expected a positive number in --threads, got 0"),
    ],
)
def test_inference_refuses_wrong_numbers(wrong, message, capsys):
    with pytest.raises(SystemExit):
        run("pooled_features", *wrong)
    assert message in capsys.readouterr().err
