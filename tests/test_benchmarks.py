"""Every benchmark runs as a command, on a network of seconds; its timings are not asserted."""

import json
import pathlib
import runpy
import sys
import warnings

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def neighbours_of_a_script(monkeypatch):
    """Python looks for what a script imports in its folder, when it runs the script itself."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("side_by_side", "pooled_features"):
        sys.modules.pop(name, None)


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
        assert set(row["speedup_over"]) == {"all tokens", "prepacked", "transformers", "timm"}
        assert set(row["prepacked_speedup_over"]) == {"vitreg_hf", "all tokens", "transformers", "timm"}
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
        more = {"prepacked"} if row["pass"] == "inference" else set()
        assert set(row["speedup_over"]) == {"padded", "one by one", "transformers"} | more
        assert max(row["largest_difference"].values()) < 1e-5
        counted = row["gflops"]
        assert not more or counted["prepacked"] < 0.8 * counted["packed"]  # most of one of two blocks
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


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_pooled_features_of_both_families_with_onnx_runtime(family, tmp_path):
    output = tmp_path / "features.json"
    small = ["--num_layers", "2", "--image_size", {"dinov2": "28", "dinov3": "32"}[family], "--repetitions", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, in PyTorch's own code
        run("pooled_features", "--family", family, *small, "--batch_sizes", "2", "--onnx", "--output", str(output))
    row = json.loads(output.read_text())["rows"][0]
    assert row["speedup_over"].keys() >= {"onnx vitreg_hf", "onnx transformers"}
    assert row["onnx_speedup_over_transformers"]["median"] > 0
    assert 0 < row["peak_megabytes"]["vitreg_hf"] <= row["peak_megabytes"]["transformers"]


def test_training_steps_start_equal_and_leave_out_what_is_dropped(tmp_path, capsys):
    output = tmp_path / "steps.json"
    small = ["--num_layers", "2", "--image_size", "28", "--batch_size", "10", "--repetitions", "1"]
    run("training_step", *small, "--output", str(output))
    rows = {row["schedule"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == {"none", "uniform", "linear"}
    counted = {name: row["gflops_per_image"] for name, row in rows.items()}
    assert counted["none"]["masking"] == counted["none"]["transformers"] == counted["none"]["timm"]
    assert counted["uniform"]["vitreg_hf"] < 0.75 * counted["none"]["vitreg_hf"]
    losses = rows["none"]["loss_of_the_first_step"]
    assert all(loss == pytest.approx(losses["vitreg_hf"], rel=1e-4) for loss in losses.values())
    assert f"written: {output}" in capsys.readouterr().out


def test_peak_memory_counts_what_is_held_at_once():
    run_path = runpy.run_path(str(ROOT / "benchmarks" / "side_by_side.py"))
    million = 1000 * 1000 * 4 / 1e6  # MB

    def work():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return second * 2

    assert run_path["peak_megabytes"](work) == pytest.approx(2 * million, abs=0.01)


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    """The README's table and the page are what rendering gives, word for word."""
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    found = [one for benchmark in report["BENCHMARKS"] for one in benchmark.comparisons()]
    assert {one.group for one in found} == {benchmark.group for benchmark in report["BENCHMARKS"]}
    pages = {
        "README.md": report["summary"](found),
        "docs/benchmarks.md": report["page"](found),
        "docs/mixed_resolutions.md": report["many_sizes"](),
    }
    for page, text in pages.items():
        assert f"{report['BEGIN']}\n\n{text}\n\n{report['END']}" in (ROOT / page).read_text(), page


def test_preprocessing_compares_outputs_of_every_input(tmp_path, capsys):
    output = tmp_path / "preprocessing.json"
    run("preprocessing", "--photos", "3", "--repetitions", "2", "--output", str(output))
    run("preprocessing", "--photos", "3", "--repetitions", "1", "--output", str(output))
    rows = json.loads(output.read_text())["rows"]
    kinds = ["PIL images", "numpy arrays", "uint8 tensors"]
    assert [(row["setting"], row["input"]) for row in rows] == [
        (setting, kind) for setting in ("crop", "fixed") for kind in kinds
    ]
    for row in rows:
        assert row["repetitions"] == 1  # which replaced the rows of the run before
        assert set(row["speedup_over"]) == {"vit", "dinov2", "dinov3"}
        assert row["largest_difference"]["vit"] == row["largest_difference"]["dinov2"] == 0.0
        assert row["largest_difference"]["dinov3"] > 0
    assert f"written: {output}" in capsys.readouterr().out


def test_photos_become_tensors_in_less_time_and_are_the_same():
    rows = json.loads((ROOT / "benchmarks" / "results" / "preprocessing.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        least = 1.5 if row["input"] == "uint8 tensors" else 2.5
        assert min(row["speedup_over"][name]["median"] for name in ("vit", "dinov2")) > least
        assert row["largest_difference"]["vit"] == row["largest_difference"]["dinov2"] == 0.0


def test_preprocessing_refuses_no_photos(capsys):
    with pytest.raises(SystemExit):
        run("preprocessing", "--photos", "0")
    assert "expected a positive number in --photos, got 0" in capsys.readouterr().err


def test_jpeg_decoding_tells_what_is_saved_and_what_it_changes(tmp_path, capsys):
    output = tmp_path / "jpeg.json"
    small = ["--photos", "2", "--repetitions", "1", "--output", str(output)]
    run("jpeg_decoding", "--sizes", "375x500", "1200x1600", *small)
    rows = {(row["size"], row["needs"]): row for row in json.loads(output.read_text())["rows"]}
    assert len(rows) == 6
    assert rows["1200x1600", "no random crops"]["decoded"] == "600x800"
    assert rows["1200x1600", "crops from 35 %"]["decoded"] == "600x800"
    for row in rows.values():
        assert set(row["speedup_over"]) == {"whole"}
        smaller = row["decoded"] != row["size"]
        assert smaller == (row["size"] == "1200x1600" and row["needs"] != "crops from 8 %")
        assert (row["mean_difference"]["resized"] > 0) == smaller
    assert f"written: {output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sizes", "375"], "expected sizes like 375x500 in --sizes, got 375"),
        (["--device", "cuda"], "expected cpu in --device, where JPEGs are decoded, got cuda"),
    ],
)
def test_jpeg_decoding_refuses_what_it_cannot_measure(wrong, message, capsys):
    with pytest.raises(SystemExit):
        run("jpeg_decoding", *wrong)
    assert message in capsys.readouterr().err


def test_analysis_pass_compares_the_pass_with_forward_passes(tmp_path, capsys):
    output = tmp_path / "analysis_pass.json"
    small = ["--num_layers", "3", "--image_size", "32", "--images", "3", "--batch_size", "2", "--repetitions", "2"]
    run("analysis_pass", *small, "--output", str(output))
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["images"], row["num_layers"], row["batch_size"]) == (3, 3, 2)
    assert row["seconds"].keys() == {"measuring pass", "forward passes", "decoding alone"}
    for ratio in row["pass_over_forward"].values():
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    told = capsys.readouterr().out
    assert "the pass over forward passes, decoding taken off" in told
    assert f"written: {output}" in told


def test_analysis_pass_refuses_wrong_numbers(capsys):
    with pytest.raises(SystemExit):
        run("analysis_pass", "--image_size", "100")
    assert "expected an --image_size that 16 divides, got 100" in capsys.readouterr().err


def test_attention_maps_compares_memory_and_time_of_equal_maps(tmp_path, capsys):
    output = tmp_path / "attention_maps.json"
    small = ["--sizes", "small", "--num_layers", "2", "--image_size", "56", "--repetitions", "2"]
    run("attention_maps", *small, "--output", str(output))
    (row,) = json.loads(output.read_text())["rows"]
    maps, tokens = row["maps_megabytes"], 5 + 4 * 4
    assert maps["full maps"] == maps["transformers"] == maps["timm"] == 4 * 2 * 6 * tokens**2 / 1e6
    assert maps["vitreg_hf"] == pytest.approx(maps["full maps"] * 5 / tokens)
    assert max(row["largest_difference"].values()) < 1e-5
    assert row["time_over_plain"].keys() == {"vitreg_hf", "full maps", "transformers", "timm"}
    assert row["peak_megabytes_beyond_plain"].keys() == row["time_over_plain"].keys()
    assert f"written: {output}" in capsys.readouterr().out


def test_maps_of_cls_and_registers_held_a_fiftieth_of_the_memory_of_full_ones():
    rows = json.loads((ROOT / "benchmarks" / "results" / "attention_maps.json").read_text())["rows"]
    assert {("small", 518), ("base", 518)} <= {(row["size"], row["image_size"]) for row in rows}
    for row in rows:
        for held in (row["maps_megabytes"], row["peak_megabytes_beyond_plain"]):
            assert max(held.values()) > 50 * held["vitreg_hf"], row["size"]


def test_attention_maps_refuses_wrong_numbers(capsys):
    with pytest.raises(SystemExit):
        run("attention_maps", "--image_size", "100")
    assert "expected a multiple of the patch size 14 in --image_size, got 100" in capsys.readouterr().err


def test_loading_compares_time_and_memory(tmp_path, capsys):
    output = tmp_path / "loading.json"
    run("loading", "--sizes", "small", "--num_layers", "1", "--repetitions", "1", "--output", str(output))
    (row,) = json.loads(output.read_text())["rows"]
    assert row["speedup_over"].keys() == {"transformers"}
    assert row["peak_megabytes"].keys() == {"vitreg_hf", "transformers"}
    assert f"written: {output}" in capsys.readouterr().out
