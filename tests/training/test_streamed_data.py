# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams as a training takes them."""

import http.server
import re
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from vitreg_hf.training.corrupt_images import SkipLimit
from vitreg_hf.training.labelled_images import Collate
from vitreg_hf.training.streamed_data import StreamLoading, stream_files, stream_hub
from vitreg_hf.training.streaming import Decoder

from .conftest import image_of_mode
from .encoded import png, write_table, write_tar

COLLATE = Collate(lambda images: torch.stack([image.float() for image in images]))


def write_tars(folder: Path, broken: int = -1) -> None:
    """Three tars to train on, of 5, 6 and 7 images, and one to validate on."""
    for shard, name in enumerate(("train-0", "train-1", "train-2", "validation-0")):
        files = {}
        for row in range(5 + shard):
            image = png(image_of_mode("RGB", 10 * shard + row))
            files[f"{row}.png"] = image[:50] if (shard, row) == (1, broken) else image
            files[f"{row}.txt"] = ("cat", "dog")[row % 2].encode()
        write_tar(folder / f"{name}.tar", files)
    (folder / "names.txt").write_text("cat\ndog\n")


def flip(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1) if torch.rand(()) < 0.5 else image


def test_tars_have_no_number_of_images_and_parquet_files_have(tmp_path: Path) -> None:
    write_tars(tmp_path)
    names = str(tmp_path / "names.txt")
    data = stream_files(f"{tmp_path}/train-*.tar", f"{tmp_path}/validation-0.tar", class_names=names)
    assert (data.train.num_images, data.evaluation.num_images) == (None, None)
    assert (data.class_names, data.hub_id, data.source) == (["cat", "dog"], None, f"{tmp_path}/train-*.tar")
    for split in ("train", "validation"):
        file = tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
        write_table(file, [png(image_of_mode("RGB"))] * 5, [0, 1, 0, 1, 1], datasets.ClassLabel(names=["cat", "dog"]))
    hub = stream_hub(str(tmp_path / "hub"))
    assert (hub.train.num_images, hub.evaluation.num_images, hub.hub_id) == (5, 5, None)


def test_a_position_counts_the_images_of_all_processes(tmp_path: Path) -> None:
    write_tars(tmp_path)
    names = str(tmp_path / "names.txt")
    data = stream_files(f"{tmp_path}/train-{{0..2}}.tar", f"{tmp_path}/validation-0.tar", class_names=names)

    def batches(process: int, position: int, number: int) -> list[dict[str, Any]]:
        loading = StreamLoading(process, 2, num_workers=2, buffer_size=4)
        return list(islice(loading.training(data.train, 2, flip, COLLATE, 3, position), number))

    for process in (0, 1):
        whole = batches(process, 0, 9)
        for one, other in zip(batches(process, 20, 4), whole[5:], strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])
    with pytest.raises(ValueError, match="a position that is a multiple of 2 x 2 images, got 6"):
        batches(0, 6, 1)
    evaluated = [StreamLoading(process, 2).evaluation(data.evaluation, 3, COLLATE) for process in (0, 1)]
    assert sum(len(batch["labels"]) for loader in evaluated for batch in loader) == 8


def test_a_loader_leaves_the_generators_as_they_are(tmp_path: Path) -> None:
    write_tars(tmp_path)
    names = str(tmp_path / "names.txt")
    data = stream_files(f"{tmp_path}/train-*.tar", f"{tmp_path}/validation-0.tar", class_names=names)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert len(list(islice(StreamLoading(num_workers=2).training(data.train, 2, flip, COLLATE, 3), 3))) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_leaves_out_is_named_in_the_batch(tmp_path: Path, workers: int) -> None:
    write_tars(tmp_path, broken=3)
    names = str(tmp_path / "names.txt")
    data = stream_files(f"{tmp_path}/train-*.tar", f"{tmp_path}/validation-0.tar", class_names=names)
    loading = StreamLoading(num_workers=workers, decoder=Decoder(skip_limit=SkipLimit()))
    found = list(islice(loading.training(data.train, 3, flip, COLLATE, 3), 12))
    assert {name for batch in found for name in batch.get("skipped", ())} == {f"{tmp_path}/train-1.tar: 3"}
    with pytest.raises(ValueError, match=r"Expected a readable image, got .*train-1.tar: 3"):
        list(islice(StreamLoading(num_workers=workers).training(data.train, 3, flip, COLLATE, 3), 12))


class _Files(http.server.SimpleHTTPRequestHandler):
    """Serves files, also parts of them, and logs nothing."""

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(bounds[1]) : int(bounds[2]) + 1] if bounds else content
        self.send_response(206 if bounds else 200)
        if bounds:
            self.send_header("Content-Range", f"bytes {bounds[1]}-{int(bounds[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the files in `tmp_path`."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    handler = partial(_Files, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_elsewhere_are_read_without_being_downloaded(
    tmp_path: Path, server: str, workers: int, kind: str
) -> None:
    """Each worker opens its own connections, also after the process that it comes from has opened some."""
    if kind == "tar":
        write_tars(tmp_path)
        (tmp_path / "train-2.tar").rename(tmp_path / "unused.tar")
    else:
        for name in ("train-0", "train-1", "validation-0"):
            images, labels = [png(image_of_mode("RGB", row)) for row in range(5)], ["cat", "dog", "cat", "dog", "cat"]
            write_table(tmp_path / f"{name}.parquet", images, labels, datasets.Value("string"))
        (tmp_path / "names.txt").write_text("cat\ndog\n")
    names, before = str(tmp_path / "names.txt"), _bytes_in(tmp_path)
    near = stream_files(f"{tmp_path}/train-*.{kind}", f"{tmp_path}/validation-0.{kind}", class_names=names)
    far = stream_files(f"{server}/train-{{0..1}}.{kind}", f"{server}/validation-0.{kind}", class_names=names)
    loading = StreamLoading(num_workers=workers, buffer_size=3)
    batches = [list(islice(loading.training(data.train, 3, flip, COLLATE, 3, 6), 6)) for data in (near, far)]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert _bytes_in(tmp_path) == before


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
