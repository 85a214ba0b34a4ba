# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Give a trained model registers, and teach it its own features averaged over shifted views, with the loop in sight.

    accelerate launch examples/distill_registers.py --model outputs/digits-plain
    accelerate launch examples/distill_registers.py --model MODEL --num_registers 16 --train_dir photos/train ...

As PH-Reg (Yan & Chen, arXiv 2505.21501): the teacher is the model as it is, averaged over views that are moved by
whole patches, so that artifacts fall on other patches each time. The student is the model with new registers; those,
positions, the patch projection and the last block learn. Labels are used by the evaluation alone. A table tells what
was gained and what was lost: distance to the teacher, norms of patches, accuracy of 20 nearest neighbours.

On the digits model without registers (`make demo` trains it) it takes 37 s of one CPU core: 1 - cosine to the teacher
falls from 0.030 to 0.012, 97.5 % of 360 digits are told by neighbours, and 98.3 % before. That model has no outliers,
so there is nothing to gain; `examples/README.md` has the table, also without new registers.
"""

import copy
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from vitreg_hf import ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis.token_norms import cutoff, outlier_mask, patch_norms
from vitreg_hf.model.fingerprint import fingerprint
from vitreg_hf.register_neurons.adding import add_registers
from vitreg_hf.register_neurons.averages import mean_patch
from vitreg_hf.training.augmentation import EvaluationTransform, TrainingTransform
from vitreg_hf.training.batch_size import recompute_activations
from vitreg_hf.training.checkpointing import agreed_checkpoint, load_checkpoint, no_totals
from vitreg_hf.training.command_line import parse_settings
from vitreg_hf.training.data import load_images
from vitreg_hf.training.distillation import as_table, feature_distances, unfreeze
from vitreg_hf.training.distillation_settings import DistillationSettings
from vitreg_hf.training.finetuning import load_backbone, processor_for, recompute_in_evaluation
from vitreg_hf.training.guards import LossGuard, TrainingDiverged
from vitreg_hf.training.labelled_images import (
    Collate,
    ImageClassificationData,
    TrainingImages,
    find_unreadable,
    without_unreadable,
)
from vitreg_hf.training.launch import create_accelerator, describe_launch
from vitreg_hf.training.nearest_neighbours import knn_accuracy
from vitreg_hf.training.optim import create_optimizer, create_schedule, one_kernel
from vitreg_hf.training.results import describe_data, hardware, staged_folder, versions, write_results
from vitreg_hf.training.running import Resumable, Saver, StopRequest, exit_with_a_sentence, outlive_stop
from vitreg_hf.training.sampling import BatchStream, SampleStream
from vitreg_hf.training.seeding import seed_step, seeded
from vitreg_hf.training.sharding import bare_model, clip_gradients
from vitreg_hf.training.step_statistics import gradient_norms, register_statistics
from vitreg_hf.training.timetable import Timetable
from vitreg_hf.training.trackers import check_trackers, start_trackers, tracker_folder
from vitreg_hf.training.training_log import TrainingLog
from vitreg_hf.training.view_average import draw_views, farthest_shift, view_average

LOSSES = ("cosine", "squared")


@dataclass
class Training(Resumable):
    """What the loop turns, and where it is."""

    settings: DistillationSettings
    accelerator: Accelerator
    timetable: Timetable
    student: torch.nn.Module
    teacher: ViTRegModel
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    loaders: Sequence[Any]  # of labelled images and of those that are held out
    num_classes: int
    saver: Saver
    log: TrainingLog
    fixed: dict[str, Any]  # what a run that continues this one must have in common with it
    totals: Tensor  # losses, steps and seconds since the last evaluation
    step: int = 0  # updates of the weights so far
    position: int = 0  # training samples taken so far, by all processes
    curve: list[dict[str, Any]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Distil, evaluate, and write model, processor, table and results to the output folder."""
    started = time.perf_counter()
    settings = parse_settings(DistillationSettings, argv=argv)
    accelerator = create_accelerator(
        settings.mixed_precision,
        settings.gradient_accumulation_steps,
        settings.per_device_train_batch_size,
        check_trackers(settings.report_to) or None,
        tracker_folder(settings.output_folder),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"Expected whole models in every process, got {accelerator.distributed_type.value}")
    checkpoint = agreed_checkpoint(accelerator, settings.resume_from_checkpoint, settings.checkpoint_folder)

    teacher = load_backbone(str(settings.model)).requires_grad_(False).to(accelerator.device)
    data = load_images(settings).with_channels(teacher.config.num_channels)
    unreadable = gather_object(find_unreadable(data, accelerator.process_index, accelerator.num_processes))
    data = without_unreadable(data, unreadable, settings.on_corrupt_image)
    crops = settings.crop_scale is not None
    processor = processor_for(settings.model, teacher.config, crops, settings.eval_crop_ratio)
    with StopRequest(accelerator) as stop:
        run = create_training(settings, accelerator, teacher, data, processor, stop)
        if checkpoint is not None:
            changes = settings.resume_with_changes
            run.resume(load_checkpoint(accelerator, checkpoint, run.fixed, run.scheduler, run.saver.modules, changes))
        hyperparameters = settings.hyperparameters()
        start_trackers(accelerator, "vitreg-registers", settings.output_folder, hyperparameters, run.step)
        try:
            with run.log:
                train(run, train_batches(run, data, processor))
        except TrainingDiverged as error:
            sys.exit("\n".join([str(error), *error.__notes__]))

    if accelerator.is_main_process:
        results = describe(run, data, skipped=sorted(str(one) for one in unreadable))
        results["seconds"]["total"] = max(time.perf_counter() - started, results["seconds"]["train"])
        save(run, processor, results)
    accelerator.end_training()


def train(run: Training, batches: Iterator[dict[str, Tensor]]) -> None:
    """What is left of the training. The curve starts with the model as it was, and with untrained registers."""
    settings, total = run.settings, run.timetable.total_steps
    if not run.curve:
        run.curve = [{"step": 0, "original": measured(run, run.teacher), "student": measured(run, run.student)}]
    for step in range(run.step, total):
        started = time.perf_counter()
        with run.log.waiting():
            taken = list(islice(batches, settings.gradient_accumulation_steps))
        seed_step(settings.seed, step, run.accelerator.process_index)  # a loader that starts draws a number, too
        train_step(run, taken)
        run.totals[-1] += time.perf_counter() - started
        if run.step == total or (settings.eval_steps and run.step % settings.eval_steps == 0):
            with run.log.paused():
                run.curve = [*run.curve, describe_stretch(run)]
            run.log.log_metrics(run.step, run.curve[-1]["student"])
            run.totals = torch.zeros_like(run.totals)
        run.saver.after_step(run.step, run.progress)


def train_step(run: Training, batches: Sequence[dict[str, Tensor]]) -> None:
    """One update of the student."""
    accelerator, settings, module = run.accelerator, run.settings, bare_model(run.accelerator, run.student)
    sums, norm, statistics = torch.zeros(len(LOSSES), device=accelerator.device), None, {}
    learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
    for batch in batches:
        images = send_to_device(batch["pixel_values"], accelerator.device, non_blocking=True)
        targets = taught(run, images)
        with accelerator.accumulate(run.student):
            losses = feature_distances(run.student(images).patch_map, targets).mean(dim=0)
            accelerator.backward(losses.sum())
            if accelerator.sync_gradients:
                norm = clip_gradients(accelerator, run.student, settings.max_grad_norm)
                if run.log.due(run.step + 1):
                    statistics = gradient_norms(module) | register_statistics(module)
            run.optimizer.step()
            run.optimizer.zero_grad()
        sums += losses.detach() / len(batches)
    if not accelerator.optimizer_step_was_skipped:
        run.scheduler.step()
    images_per_step = run.timetable.images_per_step
    run.step, run.position = run.step + 1, run.position + images_per_step
    norm = None if accelerator.optimizer_step_was_skipped else norm
    run.totals[:-1] += torch.cat([sums, sums.new_ones(1)]).to(run.totals)
    run.log.update(run.step, sums.sum(), learning_rate, images_per_step, batches, norm, statistics)


@torch.no_grad()
def taught(run: Training, images: Tensor) -> Tensor:
    """What the teacher says of patches, `(B, D, rows, columns)`: its average over views of this draw."""
    settings, config = run.settings, run.teacher.config
    reach = farthest_shift(settings.max_shift, config.position_grid)
    views = draw_views(settings.num_views, reach, bool(settings.mirror_views))

    def features_of(view: Tensor) -> Tensor:
        with run.accelerator.autocast():
            return cast(Tensor, run.teacher(view).patch_map).float()

    return view_average(features_of, images, views, config.patch_height_width)


# Evaluation


@torch.no_grad()
def measured(run: Training, model: torch.nn.Module) -> dict[str, float]:
    """The columns of the table for one model, on held-out images and the same views of them every time."""
    layout = bare_model(run.accelerator, model).layout

    def seen_of(images: Tensor, outputs: Any) -> tuple[Tensor, ...]:
        with seeded(0):
            distances = feature_distances(outputs.patch_map, taught(run, images))
        return distances, patch_norms(outputs.hidden_states[-1], layout), outputs.pooler_output

    train, train_labels = read(run, model, run.loaders[0], lambda _, outputs: (outputs.pooler_output,))
    distances, norms, test, test_labels = read(run, model, run.loaders[1], seen_of)
    k = min(run.settings.knn_neighbours, len(train))
    cosine, squared = distances.double().mean(dim=0).tolist()
    return {
        "cosine_distance": cosine,
        "squared_error": squared,
        "largest_over_median": float(norms.max() / norms.median()),
        "outlier_share": float(outlier_mask(norms, cutoff(norms.cpu().flatten().numpy())).double().mean()),
        "knn_accuracy": knn_accuracy(train, train_labels, test, test_labels, run.num_classes, [k])[k],
    }


def read(
    run: Training, model: torch.nn.Module, loader: Any, keep: Callable[[Tensor, Any], tuple[Tensor, ...]]
) -> list[Tensor]:
    """What is kept of a model's outputs for every image, and the labels, of all processes in every process."""
    gathered = []
    for batch in loader:
        with run.accelerator.autocast():
            outputs = model(batch["pixel_values"], output_hidden_states=True)
        kept = [one.float() for one in keep(batch["pixel_values"], outputs)]
        gathered.append(run.accelerator.gather_for_metrics((*kept, batch["labels"])))
    return [torch.cat(parts) for parts in zip(*gathered, strict=True)]


def describe_stretch(run: Training) -> dict[str, Any]:
    """The entry of the steps since the last evaluation in the curve; to be called by every process."""
    *losses, steps, seconds = run.accelerator.reduce(run.totals, reduction="mean").tolist()
    means = {f"{name}_loss": total / steps for name, total in zip(LOSSES, losses, strict=True)}
    speed = {"images_per_second": steps * run.timetable.images_per_step / seconds, "seconds": seconds}
    return {"step": run.step, "student": measured(run, run.student), **means, **speed}


# What the loop is put together from


def create_student(settings: DistillationSettings, teacher: ViTRegModel, first_images: Tensor) -> ViTRegModel:
    """A copy of the teacher with new registers, which start as the mean patch of some images `(n, C, H, W)`.

    It is in evaluation mode: what a deterministic teacher says is learned without dropout.
    """
    student = copy.deepcopy(teacher)
    if settings.num_registers:
        average = mean_patch(teacher, first_images)
        student = add_registers(student, settings.num_registers, average, settings.seed).eval()
    unfreeze(student, settings.num_tuned_layers)
    if settings.gradient_checkpointing:
        recompute_activations(student)
        for layer in student.layers:
            recompute_in_evaluation(layer)
    return student


def create_training(
    settings: DistillationSettings,
    accelerator: Accelerator,
    teacher: ViTRegModel,
    data: ImageClassificationData,
    processor: ViTRegImageProcessor,
    stop: StopRequest,
) -> Training:
    """Student, teacher, optimizer, schedule and what saves them, prepared for this launch."""
    batch_size, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    images_per_step = batch_size * accumulated * accelerator.num_processes
    length = settings.num_train_epochs, settings.steps_per_epoch, settings.max_steps
    timetable = Timetable(images_per_step, len(data.train), *length)
    collate = Collate(EvaluationTransform(processor))
    first_images = collate([data.train[index] for index in range(min(64, len(data.train)))])["pixel_values"]
    student = create_student(settings, teacher, first_images)
    optimizer = create_optimizer(student, settings, one_kernel(accelerator))
    scheduler = create_schedule(optimizer, timetable.total_steps, settings)
    learning = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    accelerator.print(f"trains    {learning:,} of {student.num_parameters():,} weights on {len(data.train)} images")
    size, workers = settings.per_device_eval_batch_size, settings.dataloader_num_workers
    options: dict[str, Any] = {"collate_fn": collate, "num_workers": workers, "worker_init_fn": outlive_stop}
    loaders = [DataLoader(images, size, **options) for images in (data.train, data.evaluation)]
    run_student, run_optimizer, *loaders = accelerator.prepare(student, optimizer, *loaders)
    saver = Saver(
        *(accelerator, settings.checkpoint_folder, scheduler, {}, stop),
        *(settings.save_steps, settings.save_total_limit, settings.logging_steps),
    )
    facts = {"seed": settings.seed, "settings": settings.hyperparameters()}
    guard = LossGuard(settings.loss_spike_factor)
    log = TrainingLog(accelerator, settings.output_folder, settings.logging_steps, timetable.total_steps, guard, facts)
    weights = fingerprint(teacher.state_dict().items())  # a checkpoint holds the student alone
    return Training(
        *(settings, accelerator, timetable, run_student, teacher, run_optimizer, scheduler),
        *(loaders, len(data.class_names), saver, log),
        settings.fixed(**describe_launch(accelerator), train_images=len(data.train), teacher=weights),
        no_totals(len(LOSSES) + 2, accelerator.device),
    )


def train_batches(
    run: Training, data: ImageClassificationData, processor: ViTRegImageProcessor
) -> Iterator[dict[str, Tensor]]:
    """The training batches of this process from where the training is."""
    settings, accelerator = run.settings, run.accelerator
    transform = TrainingTransform(processor, settings.crop_scale)
    sampler = BatchStream(
        SampleStream(len(data.train), settings.seed),
        settings.per_device_train_batch_size,
        (run.timetable.total_steps - run.step) * settings.gradient_accumulation_steps,
        *(run.position, accelerator.process_index, accelerator.num_processes),
    )
    loader = DataLoader(
        TrainingImages(data.train, transform.augment, settings.seed),
        batch_sampler=sampler,
        collate_fn=Collate(transform),
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=outlive_stop,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


def describe(run: Training, data: ImageClassificationData, skipped: Sequence[str]) -> dict[str, Any]:
    """The content of `results.json`."""
    settings, student = run.settings, bare_model(run.accelerator, run.student)
    config, images_per_step = student.config, run.timetable.images_per_step
    first, last = run.curve[0], run.curve[-1]
    return {
        "model": {
            "name": settings.output_folder.name,
            "parameters": student.num_parameters(),
            **{name: getattr(config, name) for name in ("image_size", "patch_size", "num_register_tokens")},
            "weights": fingerprint(student.state_dict().items()),
        },
        "teacher": {"name": str(settings.model).rstrip("/").rpartition("/")[2], "weights": run.fixed["teacher"]},
        "hyperparameters": {**settings.hyperparameters(), "total_train_batch_size": images_per_step},
        "data": describe_data(data, skipped),
        "metrics": {
            **{"original": first["original"], "untrained": first["student"], "distilled": last["student"]},
            **{"neighbours": min(settings.knn_neighbours, len(data.train)), "n": len(data.evaluation)},
        },
        "curve": run.curve,
        "steps": run.log.records,
        "versions": versions(),
        "hardware": hardware(run.accelerator),
        "seconds": {"train": sum(entry["seconds"] for entry in run.curve[1:])},
        "command": shlex.join(["python", *sys.argv]),
    }


def save(run: Training, processor: ViTRegImageProcessor, results: dict[str, Any]) -> None:
    """Write everything into the output folder at once, and say what is where."""
    folder = run.settings.output_folder
    with staged_folder(folder) as staging:
        bare_model(run.accelerator, run.student).save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / "table.md").write_text(as_table(results) + "\n")
        write_results(results, staging / "results.json")
    print(as_table(results))
    print(f"measured  on {results['metrics']['n']} held-out images; {results['seconds']['train']:.1f} s of training")
    print(f"model     {folder} (with image processor)")
    for label, file in (("results", "results.json"), ("table", "table.md")):
        print(f"{label:9} {folder / file}")


if __name__ == "__main__":
    exit_with_a_sentence(main)
