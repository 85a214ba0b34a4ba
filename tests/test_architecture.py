"""The house: which room may know which, and what belongs in one only. A change here is a decision, not a repair."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vitreg_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room may import rooms of smaller rows, and itself; rooms of one row do not know one another.
ROWS = {
    "model": 0,
    "registration": 1,
    "conversion": 2,
    "analysis": 2,
    "training": 2,
    "hub": 2,
    "register_neurons": 3,
    "pipelines": 3,
    "cli": 4,
}
# Inside the model every file names the siblings that it may import.
MODEL_IMPORTS = {
    "configuration_checks": set(),
    "configuration_arguments": {"configuration_checks"},
    "checkpoint_checks": set(),
    "configuration_vitreg": {"configuration_arguments", "configuration_checks"},
    "outputs": set(),
    "recording": set(),
    "processor_checks": set(),
    "fingerprint": set(),
    "inference": set(),
    "patch_budget": set(),
    "pixel_memory": set(),
    "image_inputs": {"patch_budget", "pixel_memory", "processor_checks"},
    "token_layout": {"configuration_vitreg"},
    "position_embedding": {"configuration_vitreg"},
    "moved_neurons": {"configuration_vitreg", "token_layout"},
    "embeddings": {"configuration_vitreg", "inference", "token_layout", "position_embedding", "moved_neurons"},
    "packing": {"position_embedding", "token_layout"},
    "pooled_attention": set(),
    "prepacking": {"inference"},
    "fusing": {"inference", "prepacking"},
    "attention": {
        *("configuration_vitreg", "fusing", "packing", "pooled_attention", "position_embedding", "prepacking"),
        *("recording", "token_layout"),
    },
    "layers": {
        *("attention", "configuration_vitreg", "inference", "packing", "position_embedding", "recording"),
        "moved_neurons",
    },
    "packed_model": {"outputs", "packing", "token_layout"},
    "modeling_vitreg": {
        *("attention", "checkpoint_checks", "configuration_vitreg", "embeddings", "fusing", "layers", "outputs"),
        *("inference", "packed_model", "position_embedding", "recording", "token_layout"),
    },
    "image_processing_pil_vitreg": {"image_inputs", "patch_budget", "processor_checks"},
    "image_processing_vitreg": {
        *("image_inputs", "image_processing_pil_vitreg", "pixel_memory", "processor_checks"),
    },
}


def named(path):
    return str(path.relative_to(PACKAGE))


def room_of(module):
    """First part of a module below the package; the top level itself has none."""
    return module.split(".")[1] if module.startswith("vitreg_hf.") else None


def imports_of(path):
    """Absolute names of modules that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("path", FILES, ids=named)
def test_rooms_import_only_rooms_above_them(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "version"):
        return
    assert parts[0] in ROWS, f"{named(path)} is in a room that the table does not know"
    for module, level in imports_of(path):
        if level or not module.startswith("vitreg_hf"):
            continue
        room = room_of(module)
        assert room is not None, f"{named(path)} imports the top level, which registers the family"
        allowed = room in (parts[0], "version") or ROWS[room] < ROWS[parts[0]]
        assert allowed, f"{named(path)} must not know {module}"


def test_the_top_level_holds_no_logic():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = {type(node).__name__ for node in tree.body}
    assert kinds == {"Expr", "ImportFrom"}  # docstring, imports, the call that registers


class TestModelFolder:
    files = sorted((PACKAGE / "model").glob("*.py"))

    def test_it_is_flat(self):
        assert not [p for p in (PACKAGE / "model").iterdir() if p.is_dir() and p.name != "__pycache__"]

    @pytest.mark.parametrize("path", [p for p in files if p.stem != "__init__"], ids=lambda p: p.name)
    def test_files_import_siblings_by_one_dot_and_nothing_else_of_the_package(self, path):
        siblings = {module for module, level in imports_of(path) if level}
        assert all(level < 2 for _, level in imports_of(path))
        assert siblings <= MODEL_IMPORTS[path.stem]
        assert not [module for module, level in imports_of(path) if not level and module.startswith("vitreg_hf")]


NAMELESS = {"utils", "helpers", "common", "misc"}


def test_every_file_has_a_name():
    everywhere = [p for folder in ("src", "examples", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in everywhere if p.stem in NAMELESS]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_outgrows_a_reading(path):
    lines = len(path.read_text().splitlines())
    assert lines <= (700 if path.stem.startswith("modeling_") else 350)


def test_only_the_token_layout_slices_tokens():
    """Counts of prefix tokens inside a subscript are arithmetic that one file does for all."""
    count, other = r"num_(prefix|register|cls)", r"[^\]\n\"']*"
    slicing_by_count = re.compile(rf"\[{other}(:{other}{count}|{count}{other}:)")
    slicing = {named(p) for p in FILES if slicing_by_count.search(p.read_text())}
    # A table of positions is split into that of CLS and those of patches, which is no token sequence.
    assert slicing - {"model/position_embedding.py"} == {"model/token_layout.py"}


PURE = {"token_norms", "attention", "features", "probes", "sinks", "channels", "token_kinds", "object_discovery"}
PURE |= {"stream_numbers", "intervals", "paper_datasets", "units"}


@pytest.mark.parametrize("name", sorted(PURE))
def test_statistics_are_functions_of_tensors_alone(name):
    """They know no model, no file and no picture, only one another and the order of tokens."""
    allowed = {f"vitreg_hf.analysis.{other}" for other in PURE} | {"vitreg_hf.model.token_layout"}
    ours = {m for m, _ in imports_of(PACKAGE / "analysis" / f"{name}.py") if m.startswith("vitreg_hf")}
    assert ours <= allowed


def test_only_the_recorder_hooks_models():
    hooking = {named(p) for p in FILES if "register_forward" in p.read_text()}
    assert hooking == {"analysis/recorder.py"}


def test_only_the_table_of_foreign_models_names_them():
    """Model types of other projects stand in one file, of those that are measured, and in the room that converts."""
    types = r"\"(dinov2|dinov2_with_registers|dinov3_vit|siglip_vision_model|clip_vision_model|distilbert|mistral)\""
    naming = {named(p) for p in FILES if re.search(types, p.read_text())}
    assert {name for name in naming if not name.startswith("conversion/")} == {"analysis/foreign.py"}


def test_only_figures_know_matplotlib():
    users = {named(p) for p in FILES for module, _ in imports_of(p) if module.startswith("matplotlib")}
    assert {user.rsplit("/", 1)[0] for user in users} == {"analysis/figures"}


def test_training_parts_have_no_command_line():
    for path in (PACKAGE / "training").rglob("*.py"):
        assert "argparse" not in {module for module, _ in imports_of(path)}


def test_nothing_unpickles():
    for path in FILES:
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call
        unpickling = "pickle" in {module.split(".")[0] for module, _ in imports_of(path)}
        # the table of contents of distributed checkpoints is a pickle, read by one that knows a list of names
        assert not unpickling or named(path) == "conversion/training_shards.py"
