"""Every number of a report on the planted network, next to what it must be: planted, or computed by literal code."""

import itertools
import json
import math

import diptest
import numpy as np
import pytest
import torch

from vitreg_hf.analysis.analyze import AnalyzeSettings, analyze
from vitreg_hf.analysis.measure import Pass
from vitreg_hf.analysis.units import UNITS, unit_of

from .conftest import CHANNEL, GRID, HEADS, LAYERS, PATCH, WRITING_BLOCK

PREFIX = 3  # CLS and two registers
SETTINGS = AnalyzeSettings(how=Pass(batch_size=5), pictured=2)


def leaves(value, place=()):
    """Every number, text and None of nested results, with its place."""
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in leaves(part, (*place, name))]
    if isinstance(value, list):
        return [leaf for index, part in enumerate(value) for leaf in leaves(part, (*place, index))]
    return [(place, value)]


@pytest.fixture(scope="module")
def report(planted, planted_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return analyze(planted(), planted_images, folder, SETTINGS), folder


@pytest.fixture(scope="module")
def results(report):
    return report[0]


@pytest.fixture(scope="module")
def literal(planted, planted_images):
    """Hidden states, attention maps and pixels of all images, straight from the model's own outputs."""
    import PIL.Image

    subject = planted()
    images = [PIL.Image.open(file) for file in sorted(planted_images.iterdir())]
    pixels = subject.preprocess(images, return_tensors="pt")["pixel_values"]
    subject.model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = subject.model(pixels, output_hidden_states=True, output_attentions=True)
        embedded = subject.model.embeddings.patch_embeddings(pixels)
    return {
        "states": torch.stack(outputs.hidden_states).double().numpy(),  # (states, images, N, D)
        "attention": torch.stack(outputs.attentions).double().numpy(),  # (L, images, h, N, N)
        "embedded": embedded.permute(0, 2, 3, 1).double().numpy(),
        "subject": subject,
    }


def interval_around(values):
    """What an interval of a mean over images must hold, and about how wide it must be."""
    values = np.array([v for v in values if not math.isnan(v)])
    return {"mean": values.mean(), "n": len(values), "spread": values.std(ddof=0) / math.sqrt(len(values))}


def check_interval(got, values):
    want = interval_around(values)
    assert got["n"] == want["n"]
    assert got["mean"] == pytest.approx(want["mean"], rel=1e-4, abs=1e-6)
    assert got["low"] <= got["mean"] + 1e-9
    assert got["mean"] <= got["high"] + 1e-9
    width = got["high"] - got["low"]
    assert width == pytest.approx(2 * 1.96 * want["spread"], rel=0.3, abs=1e-6)


def neighbours(embedded):
    """Mean cosine to the patches above, below, left and right."""
    out = np.zeros(embedded.shape[:3])
    for image, row, column in itertools.product(*(range(n) for n in embedded.shape[:3])):
        own, found = embedded[image, row, column], []
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            r, c = row + dr, column + dc
            if 0 <= r < GRID and 0 <= c < GRID:
                other = embedded[image, r, c]
                found.append(own @ other / np.linalg.norm(own) / np.linalg.norm(other))
        out[image, row, column] = np.mean(found)
    return out


class TestEveryNumber:
    """Sections are checked one by one; the last test makes sure that no number was left out."""

    def test_outliers_are_the_planted_patches(self, results, literal, blue_patches):
        found = results["outliers"]
        norms = np.linalg.norm(literal["states"][LAYERS, :, PREFIX:], axis=-1)
        assert (found["layer"], found["rule"], found["rule_value"]) == (LAYERS, "median", 2.0)
        assert found["cutoff"] == pytest.approx(2 * np.median(norms), rel=1e-5)
        assert found["norm"]["median"] == pytest.approx(np.median(norms), rel=1e-5)
        assert found["norm"]["percentile_98"] == pytest.approx(np.percentile(norms, 98), rel=1e-5)
        assert found["norm"]["max"] == pytest.approx(norms.max(), rel=1e-5)
        assert ((norms > found["cutoff"]) == blue_patches.reshape(12, -1)).all()
        check_interval(found["share"], blue_patches.mean(axis=(1, 2)))
        assert found["images_with_outliers"] == pytest.approx(10 / 12)
        check_interval(found["largest_over_median"], norms.max(axis=1) / np.median(norms, axis=1))

    def test_places_layer_and_neighbours(self, results, literal, blue_patches):
        found = results["outliers"]
        assert found["first_layer"] == WRITING_BLOCK
        border = np.ones((GRID, GRID), bool)
        border[1:-1, 1:-1] = False
        assert found["on_border"] == pytest.approx(blue_patches[:, border].sum() / blue_patches.sum())
        assert found["border_patches"] == pytest.approx(border.mean())
        similar = neighbours(literal["embedded"])
        blue = [similar[i][mask].mean() if mask.any() else math.nan for i, mask in enumerate(blue_patches)]
        check_interval(found["neighbour_similarity"]["outlier"], blue)
        normal = [similar[i][~mask].mean() for i, mask in enumerate(blue_patches)]
        check_interval(found["neighbour_similarity"]["normal"], normal)

    def test_two_groups(self, results, literal, blue_patches):
        groups, blue = results["outliers"]["two_groups"], blue_patches.reshape(12, -1)
        norms = np.linalg.norm(literal["states"][LAYERS, :, PREFIX:], axis=-1)
        dip, p_value = diptest.diptest(np.log(norms.ravel()))
        assert groups["dip"] == pytest.approx(dip, rel=1e-3)
        assert groups["p_value"] == pytest.approx(p_value, abs=1e-6)
        assert groups["low_mode"] == pytest.approx(np.median(norms[~blue]), rel=1e-3)
        assert groups["high_mode"] == pytest.approx(np.median(norms[blue]), rel=1e-3)
        assert groups["high_share"] == pytest.approx(blue.mean())
        assert groups["n"] == blue.size
        assert groups["bic_gain"] > 100
        assert groups["found"] is True
        assert groups["probably"] is False

    def test_layers(self, results, literal, blue_patches):
        assert [state["layer"] for state in results["layers"]] == list(range(LAYERS + 1))
        for state, hidden in zip(results["layers"], literal["states"], strict=True):
            norms = np.linalg.norm(hidden[:, PREFIX:], axis=-1)
            for name, value in zip(("2", "98"), np.percentile(norms, [2, 98]), strict=True):
                assert state[f"norm_percentile_{name}"] == pytest.approx(value, rel=1e-5)
            assert state["norm_median"] == pytest.approx(np.median(norms), rel=1e-5)
            assert state["norm_max"] == pytest.approx(norms.max(), rel=1e-5)
            written = state["layer"] >= WRITING_BLOCK
            assert state["outlier_share"] == pytest.approx(blue_patches.mean() if written else 0)
            flat = hidden.reshape(12, -1)
            assert state["infinity_norm"] == pytest.approx(np.abs(flat).max(axis=1).mean(), rel=1e-5)
            centred = flat - flat.mean(axis=1, keepdims=True)
            kurtosis = (centred**4).mean(axis=1) / (centred**2).mean(axis=1) ** 2
            assert state["kurtosis"] == pytest.approx(kurtosis.mean(), rel=1e-3)
            beyond = np.abs(centred) > 6 * centred.std(axis=1, keepdims=True)
            assert state["sigma_outliers"] == pytest.approx(beyond.sum(axis=1).mean())
            medians = np.median(np.abs(flat), axis=1, keepdims=True)
            assert state["relatively_massive"] == pytest.approx((np.abs(flat) > 1000 * medians).sum(axis=1).mean())
            assert state["massive"] == 0  # the planted value is about 45
            if written:
                assert state["peak"] == {"channel": CHANNEL, "token": "a patch", "agreement": pytest.approx(10 / 12)}
            else:
                places = [divmod(int(np.abs(one).argmax()), one.shape[1]) for one in hidden]
                names = ["CLS", "register 1", "register 2"]
                kinds = [(c, names[t] if t < PREFIX else "a patch") for t, c in places]
                found = (state["peak"]["channel"], state["peak"]["token"])
                assert kinds.count(found) == max(kinds.count(kind) for kind in kinds)
                assert state["peak"]["agreement"] == pytest.approx(kinds.count(found) / 12)

    def test_attention(self, results, literal):
        attention, weights = results["attention"], literal["attention"]
        assert [token["name"] for token in attention["tokens"]] == ["CLS", "register 1", "register 2"]
        last = weights[-1].mean(axis=1)  # (images, N, N)
        maps = last[:, :PREFIX, PREFIX:]
        shares = maps / maps.sum(axis=-1, keepdims=True)
        entropies = -(shares * np.log(shares)).sum(axis=-1)
        rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
        for index, token in enumerate(attention["tokens"]):
            check_interval(token["entropy"], entropies[:, index])
            check_interval(token["area"], np.exp(entropies[:, index]) / GRID**2)
            centre = [(shares[:, index] * (place + 0.5) / GRID).sum(axis=1).mean() for place in (rows, columns)]
            assert token["centre"] == pytest.approx(centre, rel=1e-4)
            row = last[:, index].mean(axis=0)
            assert token["mass"] == pytest.approx([row[0], row[1:PREFIX].sum(), row[PREFIX:].sum()], rel=1e-4)
            check_interval(token["norm"], np.linalg.norm(literal["states"][-1, :, index], axis=-1))
        overlap = np.minimum(shares[:, :, None], shares[:, None]).sum(axis=-1).mean(axis=0)
        np.testing.assert_allclose(attention["overlap"], overlap, rtol=1e-4)
        of_cls = weights.mean(axis=2)[:, :, 0].mean(axis=1)  # (L, N)
        mass = [[row[0], row[1:PREFIX].sum(), row[PREFIX:].sum()] for row in of_cls]
        np.testing.assert_allclose(attention["cls_mass"], mass, rtol=1e-4)
        check_interval(attention["cls_on_registers"], last[:, 0, 1:PREFIX].sum(axis=-1))
        assert attention["patch_only_cka"] is None  # all values are zero: CLS takes nothing
        assert attention["patch_only_cka_images"] == 12

    def test_sinks(self, results, literal, blue_patches):
        sinks, weights = results["sinks"], literal["attention"]
        tokens = weights.shape[-1]
        received = weights.mean(axis=3)  # (L, images, h, N)
        columns = [*(received[..., index] for index in range(PREFIX)), received[..., PREFIX:].max(axis=-1)]
        by_head = received.mean(axis=2)
        even = [*(by_head[..., index] for index in range(PREFIX)), by_head[..., PREFIX:].max(axis=-1)]
        assert [row["name"] for row in sinks["tokens"]] == [
            *("CLS", "register 1", "register 2"),
            "patch that gets most",
        ]
        for row, column, mean in zip(sinks["tokens"], columns, even, strict=True):
            assert row["score"] == pytest.approx((column > 0.3).mean(axis=(1, 2)))
            assert row["times_uniform"] == pytest.approx(mean.mean(axis=1) * tokens, rel=1e-4)
        patches = by_head[-1][:, PREFIX:] * tokens
        flat = blue_patches.reshape(12, -1)
        of_blue = [patches[i][m].mean() if m.any() else math.nan for i, m in enumerate(flat)]
        check_interval(sinks["outlier_patches_times_uniform"], of_blue)
        check_interval(sinks["normal_patches_times_uniform"], [patches[i][~m].mean() for i, m in enumerate(flat)])
        kinds = {"CLS": by_head[..., :1], "registers": by_head[..., 1:PREFIX]}
        kinds["outlier patches"] = by_head[..., PREFIX:] * flat
        kinds["normal patches"] = by_head[..., PREFIX:] * ~flat
        for kind, share in sinks["shares"].items():
            assert share == pytest.approx(kinds[kind].sum(axis=-1).mean(axis=1), rel=1e-4, abs=1e-7)
        writer = sinks["writer"]
        assert (writer["layer"], writer["channel"], writer["token"]) == (WRITING_BLOCK, CHANNEL, "a patch")
        assert writer["share"] == pytest.approx(1)  # channel 31 is empty before
        assert (writer["agreement"], writer["images"]) == (pytest.approx(10 / 12), 12)

    def test_probes_find_the_position_code_and_miss_it_in_outliers(self, results):
        normal, outlier = results["probes"]["normal"], results["probes"]["outlier"]
        assert normal["position_top1"]["mean"] > 0.95
        assert normal["position_distance"]["mean"] < 0.1
        assert outlier["position_top1"]["mean"] < 0.5
        assert outlier["position_distance"]["mean"] > 1
        assert normal["position_top1"]["n"] == 2  # a fifth of 12 images
        assert 0 <= normal["reconstruction_error"]["mean"] < math.sqrt(3 * PATCH**2)
        assert 0 <= outlier["reconstruction_error"]["mean"] < math.sqrt(3 * PATCH**2)
        assert results["classification"] is None  # no folders of classes

    def test_model_and_images(self, results, literal):
        model, images = results["model"], results["images"]
        assert model["parameters"] == sum(p.numel() for p in literal["subject"].model.parameters())
        assert (model["layers"], model["cls_tokens"], model["registers"]) == (LAYERS, 1, 2)
        assert model["patch_size"] == [PATCH, PATCH]
        assert (images["measured"], images["grid"], images["classes"]) == (12, [GRID, GRID], None)
        assert images["how"] == {"batch_size": 5, "image_size": None, "on_corrupt_image": "raise", "overwrite": False}

    def test_no_number_is_without_a_unit_and_none_was_left_out(self, report):
        written = json.loads((report[1] / "results.json").read_text())
        assert written["units"] == UNITS
        sections = {"model", "images", "outliers", "layers", "attention", "sinks", "probes", "classification", "units"}
        assert set(written) == sections | {"report"}  # each has a test above
        for place, value in leaves({name: part for name, part in written.items() if name != "units"}):
            named = ".".join(str(part) for part in place if not isinstance(part, int))
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert unit_of(named) is not None, f"{named} has no unit"
        places = {".".join(str(p) for p in place if not isinstance(p, int)) for place, _ in leaves(written)}
        unused = [unit for unit in UNITS if not any(p == unit or p.startswith(f"{unit}.") for p in places)]
        assert all(unit.startswith("classification.") for unit in unused)


@pytest.fixture(scope="module")
def silent_report(planted, planted_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("silent")
    return analyze(planted(planted=False), planted_images, folder, SETTINGS), folder


class TestNothingPlanted:
    def test_the_instruments_stay_silent(self, silent_report):
        silent, _ = silent_report
        found = silent["outliers"]
        assert found["share"]["mean"] == 0
        assert found["two_groups"]["found"] is False
        assert found["first_layer"] is None
        assert found["neighbour_similarity"]["outlier"]["n"] == 0
        assert silent["sinks"]["writer"] is None
        for row in silent["sinks"]["tokens"]:
            assert row["times_uniform"] == pytest.approx([1] * LAYERS, rel=1e-5)
            assert row["score"] == [0] * LAYERS

    def test_the_report_says_so(self, silent_report):
        _, folder = silent_report
        assert "Artifacts: none found" in (folder / "report.html").read_text()
        assert "NaN" not in (folder / "results.json").read_text()


def test_head_counts_agree(literal):
    assert literal["attention"].shape[:3] == (LAYERS, 12, HEADS)
