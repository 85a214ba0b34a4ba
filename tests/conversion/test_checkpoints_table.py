"""docs/checkpoints.md says what the commands take, what layouts there are, and what timm says of its checkpoints."""

import itertools
import pathlib
import re
import shlex
from fnmatch import fnmatch
from functools import cache
from unittest import mock

import pytest
import timm
from packaging.version import Version
from timm.models import get_pretrained_cfg, list_models

from vitreg_hf.cli import parser
from vitreg_hf.conversion.layouts import LAYOUTS
from vitreg_hf.conversion.timm_fields import Refused, fields_of
from vitreg_hf.conversion.timm_models import empty_timm_model

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
TEXT = PAGE.read_text(encoding="utf-8")
COLUMNS = ["checkpoint", "layout", "size", "registers", "head", "licence", "parity", "command"]
# test_from_timm.py shows that no other name of timm has registers
WITH_REGISTERS = re.compile(r"reg\d|dinov3|radio|lingbot|sapiens2|naflexvit|^test_vit")
LIKE_VIT = ("vision_transformer", "eva", "naflexvit")


def expanded(text):
    """Every name that braces stand for: a{b,c} is ab and ac."""
    parts = [part.split(",") for part in re.split(r"[{}]", text)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def names_in(text):
    """Names in backticks, each for itself where braces stand for several."""
    return [name for span in re.findall(r"`([^`]+)`", text) if " " not in span for name in expanded(span)]


def commands_in(text):
    """Commands in backticks and in blocks, without comments."""
    found = re.findall(r"`(vitreg [^`]+)`|^    (vitreg .+)$", text, re.MULTILINE)
    commands = [shlex.split(inline or block, comments=True) for inline, block in found]
    return [command for command in commands if "SOURCE" not in command]


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows():
    """Rows of all tables of checkpoints, by column."""
    inside, found = False, []
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            inside = False
        elif cells_of(line) == COLUMNS:
            inside = True
        elif inside and not line.startswith("|---"):
            found.append(dict(zip(COLUMNS, cells_of(line), strict=True)))
    return found


def section(title):
    return next(part for part in TEXT.split("\n## ") if part.startswith(title))


ROWS = rows()
COMMANDS = commands_in(TEXT)
REFUSED = names_in(section("Refused, and why"))
OF_TIMM = re.compile(r"^(?:timm|belfner)/([^.]+)\.(.+)$")  # a repository, an architecture and its weights


def released():
    """Checkpoints of timm that are published and may have registers: architecture and weights, id on the Hub."""
    names = [name for module in LIKE_VIT for name in list_models(module=module, pretrained=True)]
    configs = {name: get_pretrained_cfg(name) for name in names if WITH_REGISTERS.search(name)}
    published = {name: config for name, config in configs.items() if config.hf_hub_id or config.url}
    return {name: config for name, config in published.items() if not name.endswith(".untrained")}


@cache
def backbone(architecture):
    """A model without head and without memory for its weights; drawing them takes most of the time, also without."""
    with mock.patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *bounds: tensor):
        return empty_timm_model(architecture, {"num_classes": 0})


def registers_of(architecture):
    model = backbone(architecture)
    token = getattr(getattr(model, "embeds", model), "reg_token", None)
    return 0 if token is None else token.shape[1]


def weights_named(name):
    """Architecture and weights, as timm calls them, of a repository; None for other names."""
    match = OF_TIMM.match(name)
    return None if match is None else f"{match[1]}.{match[2]}"


def rows_of_timm():
    """Rows of timm's own checkpoints with registers, and their names there."""
    named = [(row, [weights_named(name) for name in names_in(row["checkpoint"])]) for row in ROWS]
    return [
        pytest.param(row, names, id=names[0])
        for row, names in named
        if names and all(names) and row["registers"] != "0"
    ]


# The page by itself


def test_there_are_tables_and_commands():
    assert len(ROWS) > 40
    assert len(COMMANDS) > len(ROWS)
    assert len(REFUSED) > 15


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_the_tool_takes(command):
    options = parser().parse_args(command[1:])
    assert options.command == "convert"
    for layout in (options.layout, options.to):
        assert layout is None or layout in LAYOUTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["checkpoint"])
def test_a_row_names_a_layout_and_claims_no_real_weights(row):
    assert row["layout"] in LAYOUTS
    assert row["parity"] == "random weights"
    assert all(row[column] for column in COLUMNS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["checkpoint"])
def test_the_command_of_a_row_converts_a_checkpoint_of_that_row(row):
    (command,) = commands_in(row["command"])
    source = parser().parse_args(command[1:]).source
    names = [name for name in names_in(row["checkpoint"]) if "/" in name or name.endswith((".pth", ".pt"))]
    assert not names or any(fnmatch(source, name) for name in names)


def test_no_checkpoint_has_two_rows():
    names = [name for row in ROWS for name in names_in(row["checkpoint"])]
    assert sorted(set(names)) == sorted(names)


def test_every_layout_is_in_a_table():
    assert {row["layout"] for row in ROWS} == set(LAYOUTS)


# The page and timm

STATED = re.search(r"of timm ([\d.]+\d)", TEXT.replace("\n  ", " "))[1]
as_stated = pytest.mark.skipif(
    Version(timm.__version__) < Version(STATED), reason=f"an older timm than the page's {STATED} lacks models of it"
)


@as_stated
def test_every_name_of_timm_is_one_of_timm():
    told = [parser().parse_args(command[1:]) for command in COMMANDS]
    names = {weights_named(name) for name in (*names_in(TEXT), *(options.source for options in told))} - {None}
    assert len(names) > 80
    assert names <= set(list_models(pretrained=True))
    assert all(timm.is_model(options.architecture) for options in told if options.architecture)


@as_stated
def test_every_released_checkpoint_of_timm_with_registers_is_in_a_table_or_refused():
    converted = {name for row in ROWS for name in names_in(row["checkpoint"])}
    missing = []
    for name, config in released().items():
        architecture = name.split(".")[0]
        if not registers_of(architecture):
            continue
        try:
            fields_of(backbone(architecture))
            place = converted
        except Refused:
            place = REFUSED
        owner = config.hf_hub_id.split("/")[0]
        missing += [] if {f"{owner}/{name}", f"timm/{name}"} & set(place) else [name]
    assert missing == []


@as_stated
@pytest.mark.parametrize(("row", "names"), rows_of_timm())
def test_a_row_says_what_timm_says(row, names):
    configs = [get_pretrained_cfg(name) for name in names]
    architectures = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert {registers_of(name) for name in architectures} == {int(row["registers"])}
    assert {config.license for config in configs} == {row["licence"]}
    assert {config.num_classes for config in configs} == labels_of(row["head"])
    parameters, images = row["size"].split("; ")
    patch, pixels = images.split("/")
    assert parameters.split(" / ") == list(dict.fromkeys(size_of(name) for name in architectures))
    assert {fields_of(backbone(name))["patch_size"] for name in architectures} == {int(patch)}
    assert {config.input_size[-1] for config in configs} == {int(number) for number in pixels.split(", ")}


def labels_of(cell):
    """Numbers of labels in a cell."""
    without_names = re.sub(r"`[^`]*`", "", cell)
    return (
        {0}
        if cell == "none"
        else {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", without_names)}
    )


def size_of(architecture):
    """Parameters without a head, in millions as the page writes them."""
    millions = sum(parameter.numel() for parameter in backbone(architecture).parameters()) / 1e6
    return f"{millions:.1f}M" if millions < 10 else f"{millions:,.0f}M"
