"""What a search found: counted, printed, saved and loaded, and refused where a file holds anything else."""

import json
from dataclasses import asdict

import pytest

from vitreg_hf import RegisterNeurons
from vitreg_hf.register_neurons.ranking import RegisterNeuron, Trial

RANKING = tuple(RegisterNeuron(layer, neuron, 9.5 - neuron, 0.25) for layer, neuron in ((1, 0), (0, 3), (2, 5)))
TRIALS = (Trial(0, 0.25, 80.0, 1.0), Trial(1, 0.125, 60.0, 0.99), Trial(2, 0.0, 9.0, 0.98))
FOUND = RegisterNeurons(RANKING, 2, 30.0, "median rule", 4, 2, 0.25, 12, "largest", TRIALS)


def test_it_is_a_sequence_of_pairs():
    assert len(FOUND) == 2
    assert list(FOUND) == [(1, 0), (0, 3)]
    assert list(FOUND.first(3)) == [(1, 0), (0, 3), (2, 5)]
    assert FOUND.first(1).ranking == FOUND.ranking
    for count in (0, 4, -1):
        with pytest.raises(ValueError, match=f"Expected 1 to 3 register neurons, got {count}"):
            FOUND.first(count)


def test_it_prints_what_was_found_and_what_was_tried():
    text = str(FOUND)
    assert "2 register neurons of 3 ranked, in blocks 0 to 2, from 12 images" in text
    assert "25.00 % of patches have a norm above 30 after block 3 (median rule)" in text
    lines = text.splitlines()
    assert lines[3].split() == ["1", "0", "9.500", "0.250"]
    assert lines[4].split() == ["0", "3", "6.500", "0.250"]
    assert [line.split()[0] for line in lines[6:]] == ["0", "1", "2"]
    assert lines[-1].endswith("<- chosen")
    assert "<-" not in lines[-2]
    many = RegisterNeurons(RANKING * 5, 13, 30.0, "median rule", 4, 2, 0.25, 12)
    assert str(many).splitlines()[-1].strip() == "and 3 more"


def test_it_says_where_outliers_have_not_vanished():
    assert FOUND.left == 0
    assert FOUND.first(1).left == 0.5
    assert "50 % of them are left" in str(FOUND.first(1)).splitlines()[-1]
    assert "left" not in str(FOUND)
    assert "left" not in str(FOUND.first(3))  # was not tried


def test_it_comes_back_from_a_file(tmp_path):
    file = tmp_path / "register_neurons.json"
    FOUND.save(file)
    FOUND.save(file)  # in its own place
    assert RegisterNeurons.load(file) == FOUND
    assert RegisterNeurons.load(str(file)) == FOUND
    assert [path.name for path in tmp_path.iterdir()] == ["register_neurons.json"]
    assert json.loads(file.read_text())["ranking"][1] == asdict(RANKING[1])
    whole_numbers = json.dumps(FOUND.to_dict()).replace("30.0", "30")
    file.write_text(whole_numbers)
    assert RegisterNeurons.load(file).threshold == 30


def changed(**fields):
    return {**FOUND.to_dict(), **fields}


def with_first(part, **fields):
    first, *rest = FOUND.to_dict()[part]
    return changed(**{part: [{**first, **fields}, *rest]})


DAMAGED = {
    "nothing": "",
    "no JSON": "neurons",
    "half of it": json.dumps(FOUND.to_dict())[:-40],
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "deep nesting": "[" * 100_000,
    "an empty object": "{}",
    "no ranking": {name: value for name, value in FOUND.to_dict().items() if name != "ranking"},
    "no threshold": {name: value for name, value in FOUND.to_dict().items() if name != "threshold"},
    "an unknown field": changed(colour="blue"),
    "a ranking that is a text": changed(ranking="none"),
    "a ranking of numbers": changed(ranking=[1, 2, 3]),
    "an empty ranking": changed(ranking=[]),
    "a count that is a text": changed(count="2"),
    "a count that is not whole": changed(count=1.5),
    "a count of nothing": changed(count=None),
    "a count beyond the ranking": changed(count=4),
    "a negative count": changed(count=-1),
    "a threshold that is a text": changed(threshold="high"),
    "a reduction that is a number": changed(reduction=1),
    "a neuron that is a text": with_first("ranking", neuron="7"),
    "a neuron that is not whole": with_first("ranking", neuron=0.5),
    "a switch for a layer": with_first("ranking", layer=True),
    "a negative layer": with_first("ranking", layer=-1),
    "no activation": with_first("ranking", at_outliers=None),
    "an unknown field of a neuron": with_first("ranking", weight=1.0),
    "a trial that is none": changed(trials=[[0, 0.25, 80.0, 1.0]]),
    "a trial of texts": with_first("trials", count="0"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_that_hold_anything_else_are_refused(kind, tmp_path):
    file, content = tmp_path / "register_neurons.json", DAMAGED[kind]
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"Expected a file of register neurons, got .*register_neurons\.json: "):
        RegisterNeurons.load(file)


def test_what_is_no_text_no_file_or_too_large_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with open(tmp_path / "huge", "wb") as huge:
        huge.truncate(2**28)  # sparse
    (tmp_path / "folder").mkdir()
    for name in ("binary", "huge", "folder", "nowhere"):
        with pytest.raises(ValueError, match="Expected a file of register neurons, got"):
            RegisterNeurons.load(tmp_path / name)
