"""The README's Python, run as it stands."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.cli import parser

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_code_of_the_readme_runs(make_config, tmp_path):
    digits = tmp_path / "outputs" / "digits"  # in place of the model that the demo trains
    ViTRegForImageClassification(make_config()).save_pretrained(digits)
    ViTRegImageProcessor(size=32).save_pretrained(digits)
    Image.new("RGB", (40, 32)).save(digits / "digit.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert {"config.json", "modeling_vitreg.py", "preprocessor_config.json"} <= {
        p.name for p in (tmp_path / "mine").iterdir()
    }
    assert (tmp_path / "mine.onnx").stat().st_size > 0


def test_the_code_of_the_page_on_analysis_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "analysis.md").read_text(), re.DOTALL)
    found = {}
    exec(code, found)
    assert found["attention"].maps.shape == (2, 4, 5, 14, 14)
    assert found["norms"].shape == (2, 196)


def test_the_code_of_the_page_on_many_sizes_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mixed_resolutions.md").read_text(), re.DOTALL)
    found = {}
    exec("\n".join(code), found)
    assert [tuple(image.shape) for image in found["batch"]["pixel_values"]] == [
        *((3, 224, 288), (3, 288, 96), (3, 192, 336)),
    ]
    assert found["outputs"].logits.shape == (3, 10)
    assert capsys.readouterr().out.count("torch.Size([1, 64])") == 3


def test_every_command_of_the_page_on_analysis_exists():
    page = (ROOT / "docs" / "analysis.md").read_text()
    commands = set(re.findall(r"`vitreg ([a-z]+)", page))
    elsewhere = {"card", "push", "convert", "registers"}  # docs/hub.md, checkpoints.md, registers.md
    assert commands == set(parser()._subparsers._group_actions[0].choices) - elsewhere


PAGES = ["README.md", "docs/registers.md", "docs/hub.md", "docs/analysis.md", "examples/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_exists(page):
    text = (ROOT / page).read_text()
    found = re.findall(r"^ *(vitreg .*)$|`(vitreg [^`]*)`", text, re.MULTILINE)
    commands = [shlex.split(line or inline, comments=True)[1:] for line, inline in found]
    whole = [command for command in commands if len(command) > 2 and command[0] != "COMMAND"]
    for command in whole:
        parser().parse_args(command)  # ends the test where it cannot be parsed
    assert whole or page == "examples/README.md"


def test_every_file_of_the_tree_exists_and_is_in_it():
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    model = tree[tree.index("  model/") : tree.index("  conversion/")]
    named = set(re.findall(r"^    (\w+\.py)", model, re.MULTILINE))
    assert named == {p.name for p in (ROOT / "src/vitreg_hf/model").glob("*.py")} - {"__init__.py"}
