# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The training log: records, their file, resuming exactly, and stopping all processes when one has a bad loss."""

import json
import math
import os
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from vitreg_hf.training.guards import LossGuard, TrainingDiverged
from vitreg_hf.training.replay import load_replay
from vitreg_hf.training.training_log import LOG_FILE, TrainingLog, without_timing


def log_in(folder, total=100, logging_steps=5, **more):
    return TrainingLog(Accelerator(cpu=True), folder, logging_steps, total, **more)


def told(log, first, last):
    """Tell a log of steps whose numbers follow from their step alone."""
    for step in range(first, last + 1):
        statistics = {"norm": torch.tensor(1.0 / step), "plain": 2.0 * step} if log.due(step) else {}
        loss = torch.tensor(2.0 + math.sin(step))
        log.update(step, loss, 0.1 / step, 32, gradient_norm=torch.tensor(float(step)), statistics=statistics)


def lines_of(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_a_record_is_the_mean_since_the_last_one(tmp_path):
    with log_in(tmp_path) as log:
        told(log, 1, 12)
    assert [record["step"] for record in log.records] == [5, 10]
    second = log.records[1]
    expected = sum(torch.tensor(2.0 + math.sin(step)).item() for step in range(6, 11)) / 5
    assert second["loss"] == pytest.approx(expected, rel=1e-12)
    assert second["learning_rate"] == 0.01
    assert second["gradient_norm"] == 10
    assert second["norm"] == pytest.approx(0.1)
    assert second["plain"] == 20
    assert second["images_per_second"] > 0
    assert second["memory_megabytes"] > 0
    assert lines_of(tmp_path) == log.records


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    with log_in(tmp_path, logging_steps=1) as log:
        log.update(1, torch.tensor(1.0), 0.1, 8, statistics={"norm": torch.tensor(math.inf), "plain": math.nan})
    assert log.records[0]["norm"] is None
    assert log.records[0]["plain"] is None
    assert lines_of(tmp_path) == log.records


@pytest.mark.parametrize("stop", [3, 5, 13, 21])
def test_a_resumed_log_is_the_one_that_never_stopped(tmp_path, stop):
    """Stopped after 21 steps and resumed from a checkpoint of an earlier one, through JSON as a checkpoint is."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    with log_in(tmp_path / "whole") as whole:
        told(whole, 1, 30)
    with log_in(tmp_path / "parts") as first:
        told(first, 1, stop)
        state = json.loads(json.dumps(first.state(), allow_nan=False))
        told(first, stop + 1, 21)
    with (tmp_path / "parts" / LOG_FILE).open("a") as file:
        file.write('{"step": 25, "lo')  # killed while writing
    with log_in(tmp_path / "parts") as second:
        second.load_state(state, stop)
        assert second.bar.n == stop
        told(second, stop + 1, 30)
    assert without_timing(second.records) == without_timing(whole.records)
    assert without_timing(lines_of(tmp_path / "parts")) == without_timing(lines_of(tmp_path / "whole"))
    kept, expected = second.state(), whole.state()
    assert {name: kept[name] for name in ("losses", "guard", "made")} == {
        name: expected[name] for name in ("losses", "guard", "made")
    }


def test_a_state_does_not_change_when_training_goes_on(tmp_path):
    with log_in(tmp_path) as log:
        told(log, 1, 7)
        state = log.state()
        before = json.dumps(state)
        told(log, 8, 30)
    assert json.dumps(state) == before


def test_a_new_training_starts_a_new_file(tmp_path):
    for last in (20, 10):
        with log_in(tmp_path) as log:
            told(log, 1, last)
    assert [record["step"] for record in lines_of(tmp_path)] == [5, 10]


def test_records_of_a_long_training_are_thinned_evenly_and_the_last_stays(tmp_path):
    with log_in(tmp_path, total=None, logging_steps=1) as log:
        told(log, 1, 1903)
    steps = [record["step"] for record in log.records]
    assert 100 <= len(steps) <= 201
    assert len({after - before for before, after in pairwise(steps[:-1])}) == 1
    assert (steps[0], steps[-1]) == (1, 1903)
    assert len(log.state()["records"]) <= 400
    assert len(lines_of(tmp_path)) == 1903


def test_an_unknown_total_stays_unknown(tmp_path):
    with log_in(tmp_path, total=None) as log:
        told(log, 1, 5)
        assert log.bar.total is None


def test_time_in_a_pause_is_not_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vitreg_hf.training.training_log.time.perf_counter", lambda: now[0])
    with log_in(tmp_path, logging_steps=2) as log:
        now[0] = 1.0
        told(log, 1, 1)
        with log.paused():
            now[0] = 100.0
        now[0] = 103.0
        told(log, 2, 2)
    assert log.records[0]["images_per_second"] == 64 / 4


def test_waiting_for_data_is_a_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vitreg_hf.training.training_log.time.perf_counter", lambda: now[0])
    with log_in(tmp_path, logging_steps=2) as log:
        for step in (1, 2, 3, 4):
            with log.waiting():
                now[0] += 0.25 if step < 3 else 3.0
            now[0] += 0.75 if step < 3 else 1.0
            told(log, step, step)
            assert log.state()["waited"] == {1: 0.25, 2: 0.0, 3: 3.0, 4: 0.0}[step]
    assert [record["waiting_for_data"] for record in log.records] == [0.25, 0.75]


def test_trackers_get_what_the_file_gets(tmp_path):
    class Listener(GeneralTracker):
        name, requires_logging_directory, tracker = "listener", False, None
        heard = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            self.heard.append((step, values))

    accelerator = Accelerator(cpu=True, log_with=Listener())
    accelerator.init_trackers("project")
    with TrainingLog(accelerator, tmp_path, 5, 10) as log:
        told(log, 1, 5)
        log.log_metrics(5, {"accuracy": 0.5, "n": None})
    (step, values), evaluation = Listener.heard
    assert {"step": step, **values} == log.records[0]
    assert evaluation == (5, {"accuracy": 0.5})
    accelerator.trackers.clear()


# Guarding


def batch(value):
    return {"pixel_values": torch.full((2, 3), float(value))}


def test_a_bad_loss_stops_in_the_next_step_with_the_batches_of_its_own_step(tmp_path):
    log = log_in(tmp_path, facts={"seed": 7, "settings": {"learning_rate": 0.1}})
    for step in (1, 2):
        log.update(step, torch.tensor(1.0), 0.1, 8, [batch(step)])
    log.update(3, torch.tensor(math.nan), 0.1, 8, [batch(3), batch(3.5)])
    with pytest.raises(TrainingDiverged, match="got nan in step 3") as caught:
        log.update(4, torch.tensor(1.0), 0.1, 8, [batch(4)])
    folder = tmp_path / "replay" / "step-00000003-process-0"
    assert caught.value.folder == str(folder)
    assert str(folder) in caught.value.__notes__[0]
    batches, facts = load_replay(folder)
    assert [one["pixel_values"][0, 0].item() for one in batches] == [3, 3.5]
    assert facts["seed"] == 7
    assert facts["seed_step"] == [2, 0]
    assert facts["settings"] == {"learning_rate": 0.1}
    assert math.isnan(facts["own_loss"])


def test_no_checkpoint_is_made_of_a_step_that_broke(tmp_path):
    log = log_in(tmp_path)
    log.update(1, torch.tensor(1.0), 0.1, 8)
    log.update(2, torch.tensor(math.inf), 0.1, 8)
    with pytest.raises(TrainingDiverged, match="step 2"):
        log.state()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    log = log_in(tmp_path, logging_steps=1)
    with pytest.raises(TrainingDiverged, match="norm of its gradient is nan"):
        log.update(1, torch.tensor(1.0), 0.1, 8, gradient_norm=torch.tensor(math.nan))


def test_a_spike_stops_unless_spikes_are_let_pass(tmp_path):
    for factor, stops in ((10.0, True), (0.0, False)):
        log = log_in(tmp_path, logging_steps=1, guard=LossGuard(factor))
        told(log, 1, 20)
        if stops:
            with pytest.raises(TrainingDiverged, match="times the median"):
                log.update(21, torch.tensor(1e4), 0.1, 8)
        else:
            log.update(21, torch.tensor(1e4), 0.1, 8)


# Two processes

PROCESS = """
import copy, math, sys, torch
from pathlib import Path
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vitreg_hf.model.configuration_vitreg import ViTRegConfig
from vitreg_hf.model.modeling_vitreg import ViTRegForImageClassification
from vitreg_hf.training.guards import TrainingDiverged
from vitreg_hf.training.step_statistics import gradient_norms, register_statistics
from vitreg_hf.training.training_log import TrainingLog

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2

torch.manual_seed(0)
shape = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
whole = ViTRegForImageClassification(ViTRegConfig(num_register_tokens=3, **shape))
sharded = copy.deepcopy(whole)
for part in (*sharded.base_model.layers, sharded):
    fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
images = torch.randn(2, 3, 16, 16)
for model in (whole, sharded):
    model(pixel_values=images).logits.square().sum().backward()
torch.testing.assert_close(gradient_norms(sharded), gradient_norms(whole))
torch.testing.assert_close(register_statistics(sharded), register_statistics(whole))
norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) for model in (whole, sharded)]
print("sharded like whole")

log = TrainingLog(accelerator, Path(sys.argv[1]), 2, 10)
try:
    for step in range(1, 11):
        bad = step == 5 and accelerator.process_index == 1
        loss = math.nan if bad else 1.0 + accelerator.process_index
        batch = {"x": torch.tensor([step, accelerator.process_index])}
        log.update(step, torch.tensor(loss), 0.1, 8, [batch], norms[1])
except TrainingDiverged as error:
    assert all(abs(record["gradient_norm"] - norms[0].item()) < 1e-4 for record in log.records)
    print("stopped", error.step, [record["loss"] for record in log.records])
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes of one training have printed, and their output folder."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder)],
            env={**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        outputs.append(output)
    return outputs, folder


def test_statistics_of_a_sharded_model_are_those_of_a_whole_one(two_processes):
    assert all("sharded like whole" in output for output in two_processes[0])


def test_all_processes_stop_at_the_loss_of_one_and_each_keeps_its_batch(two_processes):
    outputs, folder = two_processes
    assert all("stopped 5 [1.5, 1.5]" in output for output in outputs)
    for rank, own_loss in ((0, 1.0), (1, math.nan)):
        (kept,), facts = load_replay(folder / "replay" / f"step-00000005-process-{rank}")
        assert kept["x"].tolist() == [5, rank]
        assert facts["own_loss"] == pytest.approx(own_loss, nan_ok=True)
