"""Reports: valid JSON, one page that needs nothing else, and files that are whole."""

import base64
import json
import math
import os
from html.parser import HTMLParser

import pytest

from vitreg_hf.analysis.report import Picture, Section, Table, interval, number, write_json, write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def names_in(folder):
    return sorted(os.listdir(folder))


# JSON


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    content = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, 2)], "c": {"d": math.nan, "e": "nan"}, "f": True}
    write_json(tmp_path / "results.json", content)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None, "e": "nan"}, "f": True}
    assert names_in(tmp_path) == ["results.json"]


def test_what_cannot_be_written_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names_in(tmp_path) == ["results.json"]


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})

    def crash(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# HTML


class Page(HTMLParser):
    """Collects tags, what they refer to, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


EVIL = '<script src="http://example.org/x.js">&"it\'s"</script>'


@pytest.fixture
def page(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(PIXEL)
    table = Table(["name", EVIL], [[EVIL, "1"], ["b", "2"]], f"caption {EVIL}")
    sections = [
        Section(f"first {EVIL}", [EVIL, "second paragraph"], [table], [Picture(picture, f"picture {EVIL}")]),
        Section("empty"),
    ]
    write_report(tmp_path / "report.html", f"title {EVIL}", f"lead {EVIL}", sections)
    assert names_in(tmp_path) == ["picture.png", "report.html"]
    picture.unlink()  # the page holds it
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside(page):
    assert [reference[:22] for reference in Page(page).references] == ["data:image/png;base64,"]
    assert base64.b64decode(Page(page).references[0][22:]) == PIXEL
    assert "@import" not in page
    assert "url(" not in page


def test_text_stays_text(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.text.count(EVIL) == 9  # twice the title, lead, heading, paragraph, two cells, two captions
    assert parsed.tags.count("h2") == 2
    assert (parsed.tags.count("th"), parsed.tags.count("td"), parsed.tags.count("img")) == (2, 4, 1)


def test_parts_stand_in_their_order(page):
    places = [
        page.index(part) for part in ("<h1>", 'class="lead"', "<h2>first", "second paragraph", "<table>", "<img")
    ]
    assert places == sorted(places)


# Numbers


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (1.23456, 3, "1.23"),
        (0.00012345, 2, "0.00012"),
        (1234.5, 5, "1234.5"),
        (0.0, 3, "0"),
        (None, 3, "-"),
        (math.nan, 3, "-"),
        (math.inf, 3, "-"),
    ],
)
def test_numbers(value, digits, expected):
    assert number(value, digits) == expected


@pytest.mark.parametrize("value", [150.0, 1234.5, 12345.0, -2500.0])
def test_large_numbers_are_not_scientific(value):
    assert "e" not in number(value)
    assert float(number(value)) == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"mean": 0.5, "low": 0.25, "high": 0.754, "n": 12}, "50 [25, 75.4] (n = 12)"),
        ({"mean": 0.5, "low": None, "high": None, "n": 1}, "50 (n = 1)"),
        ({"mean": math.nan, "low": None, "high": None, "n": 0}, "- (n = 0)"),
        ({"mean": None, "low": None, "high": None, "n": 0}, "- (n = 0)"),
        ({"mean": -0.1, "low": -0.2, "high": 0.0, "n": 9}, "-10 [-20, 0] (n = 9)"),
    ],
)
def test_intervals(value, expected):
    assert interval(value, factor=100) == expected
