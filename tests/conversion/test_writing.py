"""What is written is whole and loads, or is not there: whatever interrupts a conversion, and whatever was there."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.conversion import convert, rules, writing
from vitreg_hf.conversion.back import export_checkpoint
from vitreg_hf.conversion.convert import convert_checkpoint
from vitreg_hf.conversion.writing import new_folder, write_safetensors

from .forks import ended, forked
from .reference_files import dinov2_file, dinov2_source


@pytest.fixture
def source(filled, save_source):
    return save_source(dinov2_file(filled(dinov2_source(num_hidden_layers=2))), file="weights.pth")


@pytest.fixture
def other(filled, save_source):
    """A model of other weights."""
    return save_source(dinov2_file(filled(dinov2_source(num_hidden_layers=1))), name="other", file="weights.pth")


def content(folder):
    """Everything in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def beside(tmp_path):
    """What is in the temporary folder besides the sources, hidden or not."""
    return lambda: sorted({path.name for path in tmp_path.iterdir()} - {"source", "other"})


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype
        assert torch.equal(tensor, other.state_dict()[name]), name


# Whole


@pytest.mark.parametrize("has_head", [False, True])
def test_what_was_saved_is_the_model_and_the_processor_in_memory(has_head, source, save_source, tmp_path):
    head = {"weight": torch.randn(7, 256), "bias": torch.randn(7)}
    options = {"head": save_source(head, name="head", file="head.pth")} if has_head else {}
    converted = convert_checkpoint(source, tmp_path / "converted", **options)
    kind = ViTRegForImageClassification if has_head else ViTRegModel
    loaded, told = kind.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(told.values())
    assert type(converted.model) is kind
    assert_same_weights(converted.model, loaded)
    assert loaded.config.to_diff_dict() == converted.model.config.to_diff_dict()
    assert loaded.config.architectures == [kind.__name__]
    processor = ViTRegImageProcessor.from_pretrained(tmp_path / "converted")
    assert processor.to_dict() == converted.processor.to_dict()
    assert converted.folder == tmp_path / "converted"


def test_the_folder_holds_what_loading_needs_and_the_report(source, tmp_path, beside):
    converted = convert_checkpoint(source, tmp_path / "converted")
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "conversion.json"}
    assert content(tmp_path / "converted").keys() == names
    assert beside() == ["converted"]
    report = json.loads((tmp_path / "converted" / "conversion.json").read_text())
    assert report["layout"] == "dinov2"
    assert report["used"]["blocks.0.attn.qkv.weight"]["what"] == "split"
    assert report["dropped"].keys() == converted.report.dropped.keys()


def test_without_a_folder_nothing_is_written(source, tmp_path, beside):
    before = content(tmp_path)
    converted = convert_checkpoint(source)
    assert converted.model is converted.model
    assert converted.folder is None
    assert content(tmp_path) == before


def test_the_same_source_gives_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        convert_checkpoint(source, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_that_was_asked_for_is_written_and_loaded(dtype, source, tmp_path):
    converted = convert_checkpoint(source, tmp_path / "converted", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "converted" / "model.safetensors").values()} == {dtype}
    loaded = ViTRegModel.from_pretrained(tmp_path / "converted")
    assert loaded.dtype == dtype
    assert_same_weights(converted.model, loaded)


def test_a_model_in_memory_shares_nothing_with_its_source(source):
    """Training it must not write into the mapped file, nor into another model."""
    converted = convert_checkpoint(source)
    before = source.read_bytes()
    with torch.no_grad():
        for parameter in converted.model.parameters():
            parameter.zero_()
    assert source.read_bytes() == before
    assert convert_checkpoint(source).model.embeddings.cls_token.abs().max() > 0


# Shards


def in_shards(monkeypatch, most_bytes):
    monkeypatch.setattr(convert, "write_safetensors", partial(write_safetensors, most_bytes=most_bytes))


@pytest.mark.parametrize("most_bytes", [1, 100_000, 400_000])
def test_several_shards_and_their_index_load_bit_by_bit(most_bytes, source, tmp_path, monkeypatch):
    whole = convert_checkpoint(source, tmp_path / "whole")
    in_shards(monkeypatch, most_bytes)
    convert_checkpoint(source, tmp_path / "converted")
    files = sorted(path.name for path in (tmp_path / "converted").glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    loaded, told = ViTRegModel.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(told.values())
    assert_same_weights(whole.model, loaded)
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.model.state_dict().keys()


def test_a_shard_is_no_larger_than_it_may_be_but_for_one_large_tensor(tmp_path):
    sizes = [10, 30, 30, 50, 200, 10, 20]
    tensors = [(str(number), torch.zeros(size)) for number, size in enumerate(sizes)]
    write_safetensors(tmp_path, tensors, most_bytes=4 * 80)
    held = [[len(t) for t in load_file(path).values()] for path in sorted(tmp_path.glob("*.safetensors"))]
    assert held == [[10, 30, 30], [50], [200], [10, 20]]


def test_no_more_than_one_shard_is_in_memory(tmp_path, monkeypatch):
    """Tensors are taken one by one, and a shard is gone before the next one is put together."""
    written, alive_at_once = [], []
    save = writing.save_file

    def record(shard, *args, **options):
        written.append([weakref.ref(tensor) for tensor in shard.values()])
        save(shard, *args, **options)

    def tensors():
        taken = []
        for number in range(40):
            shards_alive = sum(any(ref() is not None for ref in shard) for shard in written)
            alive_at_once.append((shards_alive, sum(ref() is not None for ref in taken)))
            tensor = torch.full((250,), float(number))
            taken.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor

    monkeypatch.setattr(writing, "save_file", record)
    write_safetensors(tmp_path, tensors(), most_bytes=8000)
    assert len(written) == 5
    assert {shards for shards, _ in alive_at_once} == {0}
    assert max(own for _, own in alive_at_once) <= 1


def test_values_are_read_only_while_they_are_written(source, tmp_path, monkeypatch):
    """The source is no model in memory: each of its tensors is asked for once, in the order of writing."""
    asked, original = [], rules.Same.read
    monkeypatch.setattr(rules.Same, "read", lambda rule, t: asked.append(t.is_meta) or original(rule, t))
    converted = convert_checkpoint(source)
    assert all(asked)
    rows = [row for row in converted.report.rows if isinstance(row.rule, rules.Same)]
    asked.clear()
    convert.save_conversion(converted, tmp_path / "converted")
    assert asked.count(False) == len(rows)


# Interrupted


class Stopped(Exception):
    """Anything that nobody foresees."""


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("had_before", [False, True])
def test_an_exception_in_the_middle_leaves_what_was_there(
    error, had_before, source, other, tmp_path, monkeypatch, beside
):
    if had_before:
        convert_checkpoint(other, tmp_path / "converted")
    before, calls, original = content(tmp_path), [], rules.Stacked.read

    def read(rule, tensor):
        if not tensor.is_meta:
            calls.append(tensor)
            if len(calls) == 3:
                assert ".converted.unfinished" in beside()
                raise error
        return original(rule, tensor)

    monkeypatch.setattr(rules.Stacked, "read", read)
    with pytest.raises(error):
        convert_checkpoint(source, tmp_path / "converted", overwrite=True)
    assert content(tmp_path) == before
    assert beside() == (["converted"] if had_before else [])


EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir", "shutil.rmtree"}


def dying_at(number, count, call):
    """Kill this process at the event of this number below a folder `converted` or one of its temporary ones."""
    seen = 0

    def listen(event, arguments):
        nonlocal seen
        if event in EVENTS and any("converted" in str(one) for one in arguments if isinstance(one, str | os.PathLike)):
            seen += 1
            os.pwrite(count, b"%d" % seen, 0)
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
    call()


@pytest.mark.parametrize("had_before", [False, True], ids=["new", "overwritten"])
def test_killed_anywhere_the_same_command_succeeds(had_before, source, other, tmp_path, monkeypatch, beside):
    """And until it does, the old result is there, or none, or the whole new one."""
    in_shards(monkeypatch, 400_000)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that it has written
    final = tmp_path / "converted"
    run = partial(convert_checkpoint, source, final, overwrite=had_before)
    convert_checkpoint(other, tmp_path / "old")
    old = content(tmp_path / "old")
    convert_checkpoint(source, tmp_path / "new")
    new = content(tmp_path / "new")
    count = os.open(tmp_path / "count", os.O_RDWR | os.O_CREAT)

    def begin():
        shutil.rmtree(final, ignore_errors=True)
        if had_before:
            shutil.copytree(tmp_path / "old", final)

    begin()
    assert ended(forked(dying_at, 0, count, run)) == 0
    events, seen = int(os.pread(count, 20, 0)), set()
    assert events > 20
    for number in range(1, events + 1):
        begin()
        assert ended(forked(dying_at, number, count, run)) == -signal.SIGKILL
        found = content(final) if final.exists() else None
        assert found in (old if had_before else None, new, None), number
        seen.add("none" if found is None else "new" if found == new else "old")
        convert_checkpoint(source, final, overwrite=True)
        assert content(final) == new
        assert beside() == ["converted", "count", "new", "old"], number
    assert seen >= ({"old", "new"} if had_before else {"none", "new"})


def test_of_a_conversion_killed_between_two_renames_the_old_result_comes_back(source, other, tmp_path, monkeypatch):
    """Even if the next one is interrupted as well."""
    convert_checkpoint(other, tmp_path / "converted")
    old = content(tmp_path / "converted")
    os.rename(tmp_path / "converted", tmp_path / ".converted.replaced")
    (tmp_path / ".converted.unfinished").mkdir()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "converted", overwrite=True)
    assert content(tmp_path / "converted") == old


def test_the_old_folder_is_there_until_the_new_one_is_complete(source, other, tmp_path, monkeypatch):
    convert_checkpoint(other, tmp_path / "converted")
    old, moved = content(tmp_path / "converted"), []
    replace = os.replace

    def watch(start, end):
        if os.fspath(end) == os.fspath(tmp_path / "converted"):
            moved.append(content(start))
        elif "unfinished" not in os.fspath(start):
            assert content(tmp_path / "converted") == old
        replace(start, end)

    monkeypatch.setattr(os, "replace", watch)
    convert_checkpoint(source, tmp_path / "converted", overwrite=True)
    assert moved == [content(tmp_path / "converted")]
    assert moved[0] != old


def test_an_empty_folder_is_written_to(source, tmp_path):
    (tmp_path / "converted").mkdir()
    convert_checkpoint(source, tmp_path / "converted")
    assert ViTRegModel.from_pretrained(tmp_path / "converted")


def test_folders_above_are_made(source, tmp_path):
    convert_checkpoint(source, tmp_path / "a" / "b" / "converted")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["converted"]


@pytest.mark.parametrize("name", ["converted", "./converted", "converted/", "."])
def test_folders_by_relative_names(name, source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert_checkpoint(source, name)
    place = tmp_path / "here" if name == "." else tmp_path / "here" / "converted"
    assert (place / "model.safetensors").is_file()


def test_a_checkpoint_can_be_converted_onto_itself(filled, tmp_path):
    """The source is mapped while its folder is replaced."""
    model = filled(dinov2_source(num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    expected = convert_checkpoint(tmp_path / "model").model
    convert_checkpoint(tmp_path / "model", tmp_path / "model", overwrite=True)
    assert_same_weights(expected, ViTRegModel.from_pretrained(tmp_path / "model"))


def test_the_source_is_not_replaced_with_the_folder_that_it_is_in(source, tmp_path):
    inside = tmp_path / "models" / "weights.pth"
    inside.parent.mkdir()
    shutil.copy(source, inside)
    before, conversion = content(tmp_path), convert_checkpoint(inside)
    with pytest.raises(ValueError, match=r"Expected a source outside of .*models, which is to be replaced"):
        convert_checkpoint(inside, tmp_path / "models", overwrite=True)
    with pytest.raises(ValueError, match="Expected a source outside of"):
        convert_checkpoint(source, tmp_path / "models", head=inside, overwrite=True)
    with pytest.raises(ValueError, match="Expected a source outside of"):
        convert.save_conversion(conversion, tmp_path / "models", overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "events.tfevents", "train.py", "folder"])
def test_what_no_checkpoint_has_is_not_replaced(name, source, tmp_path):
    convert_checkpoint(source, tmp_path / "converted")
    for known in ("README.md", ".gitattributes"):
        (tmp_path / "converted" / known).write_text("of a repository")
    convert_checkpoint(source, tmp_path / "converted", overwrite=True)
    if name == "folder":
        (tmp_path / "converted" / name).mkdir()
    else:
        (tmp_path / "converted" / name).write_text("dear")
    with pytest.raises(ValueError, match=f"a checkpoint and nothing else to be replaced, got .*{name} beside it"):
        convert_checkpoint(source, tmp_path / "converted", overwrite=True)
    assert (tmp_path / "converted" / name).exists()


def test_files_are_on_the_disk_before_the_folder_has_its_name(source, tmp_path, monkeypatch):
    flushed, fsync, replace = [], os.fsync, os.replace

    def record(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(start, end):
        if os.fspath(end) == os.fspath(tmp_path / "converted"):
            assert {os.fspath(path) for path in start.iterdir()} <= set(flushed)
        replace(start, end)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    convert_checkpoint(source, tmp_path / "converted")
    assert len(flushed) >= 4


# A full disk


def fails_in_a_sentence(call):
    """In a process without room: the error is one of the disk, with the name of the file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
    with pytest.raises(OSError, match="converted"):
        call()


@pytest.mark.parametrize("had_before", [False, True])
def test_no_file_may_grow(had_before, source, other, tmp_path, beside):
    if had_before:
        convert_checkpoint(other, tmp_path / "converted")
    before = content(tmp_path)
    call = partial(convert_checkpoint, source, tmp_path / "converted", overwrite=True)
    assert ended(forked(fails_in_a_sentence, call)) == 0
    assert content(tmp_path) == before
    assert beside() == (["converted"] if had_before else [])


@pytest.mark.parametrize("layout", ["dinov2", "dinov2_with_registers"])
def test_no_file_may_grow_on_the_way_back(layout, source, tmp_path, beside):
    convert_checkpoint(source, tmp_path / "other")
    before = content(tmp_path)
    call = partial(export_checkpoint, tmp_path / "other", tmp_path / "converted", layout=layout)
    assert ended(forked(fails_in_a_sentence, call)) == 0
    assert content(tmp_path) == before
    assert beside() == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory with too little room, and how to give it more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        mounted = mount("size=300k")
    except FileNotFoundError as error:
        pytest.skip(f"needs mount: {error}")
    if mounted.returncode:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    yield folder, lambda: mount("remount,size=20m")
    subprocess.run(["umount", folder], check=False)


def test_a_file_system_runs_full_and_with_more_room_the_same_command_succeeds(source, small_disk):
    folder, enlarge = small_disk
    with pytest.raises(OSError, match="converted"):
        convert_checkpoint(source, folder / "converted")
    assert not list(folder.iterdir())
    assert enlarge().returncode == 0
    convert_checkpoint(source, folder / "converted")
    assert ViTRegModel.from_pretrained(folder / "converted")


def test_a_folder_that_may_not_be_written_to_is_an_error_of_the_disk(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        convert_checkpoint(source, tmp_path / "file" / "converted")


# By itself


def test_a_new_folder_has_its_name_only_when_the_block_ends_well(tmp_path):
    final = tmp_path / "folder"
    with new_folder(final) as folder:
        (folder / "a.pth").write_text("1")
        assert not final.exists()
    assert content(final) == {"a.pth": b"1"}
    with pytest.raises(Stopped), new_folder(final, overwrite=True) as folder:
        (folder / "a.pth").write_text("2")
        raise Stopped
    assert content(final) == {"a.pth": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
