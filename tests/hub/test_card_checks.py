"""What the Hub refuses in a card is found without asking it, and all at once."""

import math

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitreg_hf.hub.card_checks import check_license
from vitreg_hf.hub.cards import check_card


def card_with(code='pipeline("image-classification", model="alice/things")', **metadata):
    data = ModelCardData(**{"license": "mit", "pipeline_tag": "image-classification", **metadata})
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n```python\n{code}\n```\n")


def result(**fields):
    usual = {"task_type": "image-classification", "dataset_type": "someone/things", "dataset_name": "things"}
    return EvalResult(**{**usual, "metric_type": "accuracy", "metric_value": 0.5, **fields})


def test_a_good_card_passes():
    check_card(card_with(eval_results=[result()], model_name="a", tags=["vision"], datasets=["mnist"]), "alice/things")
    several = [result(), result(dataset_type="mnist"), result(metric_type="f1")]  # the Hub reads the last one second
    card = card_with(eval_results=several, model_name="a")
    card.data.eval_results = several
    check_card(card)
    check_card(ModelCard("---\nlicense: [mit, apache-2.0]\n---\n"))
    check_card(ModelCard("---\nlibrary_name: transformers\n---\nno licence is no mistake"))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"license": "MIT"}, r"license 'MIT' \(did you mean mit\?\)"),
        ({"license": "Apache 2.0"}, r"did you mean apache-2\.0\?"),
        ({"license": "my own"}, r"license 'my own' \(see https://hf\.co"),
        ({"license": ["mit", "BSD"]}, r"license 'BSD'"),
        ({"license": {"name": "mit"}}, r"license \{'name': 'mit'\}"),
        ({"license": "other"}, "without license_name and license_link"),
        ({"license": "other", "license_name": "ours"}, "without license_name and license_link"),
        ({"pipeline_tag": "attention-maps"}, "pipeline_tag 'attention-maps', which is none of depth-estimation"),
        ({"tags": ["vision", 2024]}, "tags that are no text: 2024"),
        ({"tags": [True]}, "tags that are no text: True"),
        ({"metrics": [None, ""]}, "metrics that are no text: None, ''"),
        ({"datasets": ["my photos/train"]}, "datasets with 'my photos/train', which is no id"),
        ({"datasets": "/home/me/photos"}, "datasets with '/home/me/photos', which is no id"),
    ],
)
def test_bad_metadata_is_named(metadata, said):
    with pytest.raises(ValueError, match=f"Expected a model card that the Hub accepts, got .*{said}"):
        check_card(card_with(**metadata))


def test_another_licence_with_its_name_and_link_passes():
    check_card(card_with(license="other", license_name="ours", license_link="LICENSE"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_are_finite(value):
    card = card_with(model_name="a", eval_results=[result(metric_value=value)])
    with pytest.raises(ValueError, match=f"got accuracy {value} in model-index$"):
        check_card(card)


def test_results_are_on_a_dataset_that_the_hub_can_name():
    card = card_with(model_name="a", eval_results=[result(dataset_type="/home/me/photos")])
    with pytest.raises(ValueError, match="dataset type '/home/me/photos' in model-index, which is no id"):
        check_card(card)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task_name": "Classify"}, "a model-index that reads back differently"),  # only the first name is kept
        ({"metric_value": None}, "metadata that cannot be read back"),
        ({"metric_value": np.float64(0.5)}, "metadata that cannot be read back"),
    ],
)
def test_results_that_do_not_read_back_are_found(fields, said):
    card = card_with(model_name="a", eval_results=[result()])
    card.data.eval_results = [result(metric_type="f1"), result(**fields)]
    with pytest.raises(ValueError, match=said):
        check_card(card)


def test_everything_wrong_is_listed_at_once():
    with pytest.raises(ValueError, match=r"license 'MIT'.*; pipeline_tag 'x'.*; tags that.*; code that loads"):
        check_card(card_with(license="MIT", pipeline_tag="x", tags=[1]), "alice/other")


@pytest.mark.parametrize(
    "code",
    [
        'pipeline("image-classification", model="outputs/things")',
        "AutoModel.from_pretrained('outputs/things')",
        'AutoModel.from_pretrained(\n    "./things"\n)',
        'AutoModel.from_pretrained("/home/alice/things"); AutoModel.from_pretrained("alice/things")',
        'AutoModel.from_pretrained("things"); AutoModel.from_pretrained("alice/things")',
        'model = ""; AutoModel.from_pretrained("alice/things")',
    ],
)
def test_code_that_loads_a_folder_is_no_code_for_readers(code):
    check_card(card_with(code))
    with pytest.raises(ValueError, match="code that loads"):
        check_card(card_with(code), "alice/things")


def test_a_folder_that_looks_like_an_id_is_found_where_it_is_one(tmp_path, monkeypatch):
    card = card_with('AutoModel.from_pretrained("outputs/digits"); AutoModel.from_pretrained("alice/things")')
    monkeypatch.chdir(tmp_path)
    check_card(card, "alice/things")  # may well be another repository
    (tmp_path / "outputs" / "digits").mkdir(parents=True)
    with pytest.raises(ValueError, match="loads 'outputs/digits', which is no id"):
        check_card(card, "alice/things")


def test_a_card_without_code_passes():
    check_card(ModelCard("---\nlicense: mit\n---\nThe model=large one."), "alice/things")


def test_a_licence_is_checked_alone():
    check_license("cc-by-4.0")
    with pytest.raises(ValueError, match=r"Expected a licence as the Hub spells it, got 'CC BY 4.0' \(did you mean"):
        check_license("CC BY 4.0")
