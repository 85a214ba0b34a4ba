# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a Vision Transformer with registers without labels, as DINOv2 does, with the loop in sight.

    accelerate launch examples/pretrain_dino.py
    accelerate launch examples/pretrain_dino.py --train_dir photos/train --validation_dir photos/val ...

Without arguments it trains on the handwritten digits that scikit-learn ships: some four minutes on one CPU core.
Labels are used by the evaluation alone: the 20 nearest neighbours among the training images vote for the class of each
of 360 held-out images. About 62 % are right with the untrained network, about 88 % in the end. (Of the pixels as they
are, neighbours tell 97.5 %: these scans lie in the middle of their image and need no network, but they show whether
one learns.) What is saved is the teacher's backbone, for `AutoModel.from_pretrained`, with its image processor.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from vitreg_hf import ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis.figures.self_supervision import knn_curve
from vitreg_hf.model.fingerprint import fingerprint
from vitreg_hf.training.augmentation import EvaluationTransform
from vitreg_hf.training.batch_size import recompute_activations
from vitreg_hf.training.checkpointing import agreed_checkpoint, load_checkpoint, no_totals
from vitreg_hf.training.command_line import parse_settings
from vitreg_hf.training.data import load_images
from vitreg_hf.training.dino_settings import MODEL_SETTINGS, DinoSettings
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
from vitreg_hf.training.optim import one_kernel
from vitreg_hf.training.results import describe_data, hardware, staged_folder, versions, write_results
from vitreg_hf.training.running import Resumable, Saver, StopRequest, exit_with_a_sentence, outlive_stop
from vitreg_hf.training.sampling import BatchStream, SampleStream
from vitreg_hf.training.schedules import cosine, learning_rates, linear, set_weight_decay
from vitreg_hf.training.seeding import seed_step, seed_weights
from vitreg_hf.training.self_supervision.losses import dino_loss, gram_loss, ibot_loss, koleo_loss
from vitreg_hf.training.self_supervision.multi_crop import CropBatch, MultiCrop, MultiCropCollate
from vitreg_hf.training.self_supervision.patch_masks import PatchMasks, draw_masks
from vitreg_hf.training.self_supervision.student_teacher import (
    DinoNetwork,
    NetworkOutput,
    create_teacher,
    parameter_groups,
    update_teacher,
)
from vitreg_hf.training.self_supervision.targets import target_rule
from vitreg_hf.training.sharding import bare_model, clip_gradients
from vitreg_hf.training.step_statistics import gradient_norms, register_statistics
from vitreg_hf.training.timetable import Timetable
from vitreg_hf.training.trackers import check_trackers, start_trackers, tracker_folder
from vitreg_hf.training.training_log import TrainingLog

LOSSES = ("dino", "ibot", "koleo", "gram")


@dataclass
class Training(Resumable):
    """What the loop turns, and where it is."""

    settings: DinoSettings
    accelerator: Accelerator
    timetable: Timetable
    student: torch.nn.Module
    teacher: DinoNetwork
    gram_teacher: ViTRegModel | None
    cls_targets: torch.nn.Module
    patch_targets: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    feature_loaders: Sequence[Any]  # of labelled images and of those to be classified
    num_classes: int
    saver: Saver
    log: TrainingLog
    fixed: dict[str, Any]  # what a run that continues this one must have in common with it
    totals: Tensor  # losses, steps and seconds since the last evaluation; on the device, as reading makes a GPU wait
    step: int = 0  # updates of the weights so far
    position: int = 0  # training samples taken so far, by all processes
    curve: list[dict[str, Any]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, evaluate, and write backbone, processor, results and picture to the output folder."""
    started = time.perf_counter()
    settings = parse_settings(DinoSettings, "self-supervision", argv=argv)
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

    data = load_images(settings)
    unreadable = gather_object(find_unreadable(data, accelerator.process_index, accelerator.num_processes))
    data = without_unreadable(data, unreadable, settings.on_corrupt_image)
    square = {"height": settings.image_size, "width": settings.image_size}
    processor = ViTRegImageProcessor(size=square, resample=2, size_divisor=settings.patch_size)
    with StopRequest(accelerator) as stop:
        run = create_training(settings, accelerator, data, processor, stop)
        if checkpoint is not None:
            changes = settings.resume_with_changes
            run.resume(load_checkpoint(accelerator, checkpoint, run.fixed, run.scheduler, run.saver.modules, changes))
        start_trackers(
            *(accelerator, "vitreg-dino", settings.output_folder, settings.hyperparameters()), step=run.step
        )
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


def train(run: Training, batches: Iterator[CropBatch]) -> None:
    """What is left of the training. The curve starts with the untrained network."""
    settings, total = run.settings, run.timetable.total_steps
    run.curve = run.curve or [{"step": 0, "knn_accuracy": nearest_neighbours(run)}]
    for step in range(run.step, total):
        started = time.perf_counter()
        with run.log.waiting():
            taken = list(islice(batches, settings.gradient_accumulation_steps))
        seed_step(settings.seed, step, run.accelerator.process_index)  # a loader that starts draws a number, too
        train_step(run, taken)
        run.totals[-1] += time.perf_counter() - started
        if run.step % settings.eval_steps == 0 or run.step == total:
            with run.log.paused():
                run.curve = [*run.curve, describe_stretch(run)]
            run.log.log_metrics(run.step, {"knn_accuracy": run.curve[-1]["knn_accuracy"]})
            run.totals = torch.zeros_like(run.totals)
        run.saver.after_step(run.step, run.progress)


def train_step(run: Training, batches: Sequence[CropBatch]) -> None:
    """One update of student and teacher."""
    accelerator, settings, total = run.accelerator, run.settings, run.timetable.total_steps
    warmup = round(settings.warmup_teacher_ratio * total)
    temperature = linear(settings.warmup_teacher_temperature, settings.teacher_temperature, run.step, warmup)
    set_weight_decay(run.optimizer, cosine(settings.weight_decay, settings.weight_decay_end, run.step, total))
    refresh_gram_teacher(run)
    sums, norm, statistics = torch.zeros(len(LOSSES), device=accelerator.device), None, {}
    learning_rate = max(group["lr"] for group in run.optimizer.param_groups)
    for batch in batches:
        masks = masks_of(run, batch)  # on the CPU, whose generator the seed of the step has set
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        masks = masks if masks is None else masks.to(accelerator.device)
        targets = targets_of(run, batch, masks, temperature)
        with accelerator.accumulate(run.student):
            seen = run.student(batch.global_crops, batch.local_crops, masks, hide=True)
            losses = losses_of(run, seen, masks, *targets)
            accelerator.backward(weighted(losses, settings))
            if accelerator.sync_gradients:
                norm = clip_gradients(accelerator, run.student, settings.max_grad_norm)
                if run.log.due(run.step + 1):
                    statistics = statistics_of(run)
            run.optimizer.step()
            run.optimizer.zero_grad()
        sums += losses.detach() / len(batches)
    if not accelerator.optimizer_step_was_skipped:
        run.scheduler.step()
        momentum = cosine(settings.teacher_momentum, 1.0, run.step, total)
        update_teacher(run.teacher, bare_model(accelerator, run.student), momentum)
    images = run.timetable.images_per_step
    run.step, run.position = run.step + 1, run.position + images
    run.totals[:-1] += torch.cat([sums, sums.new_ones(1)]).to(run.totals)
    norm = None if accelerator.optimizer_step_was_skipped else norm
    run.log.update(run.step, weighted(sums, settings), learning_rate, images, batches, norm, statistics)


def masks_of(run: Training, batch: CropBatch) -> PatchMasks | None:
    """Which patches the student does not see."""
    settings, side = run.settings, run.settings.image_size // run.settings.patch_size
    low, high = settings.mask_ratio
    crops = len(batch.global_crops)
    return draw_masks(crops, (side, side), settings.mask_share, (low, high)) if settings.ibot_weight else None


@torch.no_grad()
def targets_of(
    run: Training, batch: CropBatch, masks: PatchMasks | None, temperature: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the teacher sees in global crops: CLS `(2, B, K)`, masked patches `(M, K)`, patches for the Gram loss."""
    with run.accelerator.autocast():
        seen = run.teacher(batch.global_crops, None, masks, hide=False)
        anchor = None
        if run.gram_teacher is not None and run.step >= gram_start(run):
            anchor = run.gram_teacher(batch.global_crops, return_dict=True).patch_tokens
    cls = run.cls_targets(seen.cls_scores.flatten(0, 1), temperature).unflatten(0, seen.cls_scores.shape[:2])
    return cls, None if masks is None else run.patch_targets(seen.patch_scores, temperature), anchor


def losses_of(
    run: Training,
    seen: NetworkOutput,
    masks: PatchMasks | None,
    cls_targets: Tensor,
    patch_targets: Tensor | None,
    anchor: Tensor | None,
) -> Tensor:
    """Each of `LOSSES`, `(4,)`, 0 for those that are off. Registers have none."""
    settings, zero = run.settings, cls_targets.new_zeros(())
    dino = dino_loss(seen.cls_scores, cls_targets, settings.student_temperature)
    ibot = koleo = gram = zero
    if masks is not None:
        scores, targets = cast(Tensor, seen.patch_scores), cast(Tensor, patch_targets)
        ibot = ibot_loss(scores, targets, masks.weights, len(masks.masked), settings.student_temperature)
    if settings.koleo_weight:
        koleo = torch.stack([koleo_loss(features) for features in seen.cls_tokens]).sum()
    if anchor is not None:
        gram = gram_loss(seen.patch_tokens, anchor)
    return torch.stack([dino, ibot, koleo, gram])


def weighted(losses: Tensor, settings: DinoSettings) -> Tensor:
    """The sum that is minimised, of each of `LOSSES`."""
    return torch.stack([getattr(settings, f"{name}_weight") * losses[i] for i, name in enumerate(LOSSES)]).sum()


def statistics_of(run: Training) -> dict[str, Tensor]:
    """Gradients and registers of the student, for the log."""
    backbone = bare_model(run.accelerator, run.student).backbone
    return {**gradient_norms(backbone), **register_statistics(backbone)}


def gram_start(run: Training) -> int:
    """The step from which similarities of patches are kept."""
    return round(run.settings.gram_start_ratio * run.timetable.total_steps)


def refresh_gram_teacher(run: Training) -> None:
    """Keep the teacher of this step as the Gram teacher, if it is due."""
    since, every = run.step - gram_start(run), run.settings.gram_refresh_steps
    if run.gram_teacher is not None and (since == 0 or (since > 0 and every and since % every == 0)):
        run.gram_teacher.load_state_dict(run.teacher.backbone.state_dict())


# Evaluation


def nearest_neighbours(run: Training) -> float:
    """Share of held-out images that their neighbours among the training images classify, by the teacher's CLS."""
    (train, train_labels), (test, test_labels) = (features(run, loader) for loader in run.feature_loaders)
    k = min(run.settings.knn_neighbours, len(train))
    return knn_accuracy(train, train_labels, test, test_labels, run.num_classes, [k])[k]


@torch.no_grad()
def features(run: Training, loader: Any) -> tuple[Tensor, Tensor]:
    """CLS of the teacher and label of all images, in every process."""
    gathered = []
    for batch in loader:
        with run.accelerator.autocast():
            cls = run.teacher.backbone(batch["pixel_values"], return_dict=True).cls_token
        gathered.append(run.accelerator.gather_for_metrics((cls.float(), batch["labels"])))
    cls_tokens, labels = zip(*gathered, strict=True)
    return torch.cat(cls_tokens), torch.cat(labels)


def describe_stretch(run: Training) -> dict[str, Any]:
    """The entry of the steps since the last evaluation in the curve; to be called by every process."""
    *losses, steps, seconds = run.accelerator.reduce(run.totals, reduction="mean").tolist()
    means = {f"{name}_loss": total / steps for name, total in zip(LOSSES, losses, strict=True)}
    speed = {"images_per_second": steps * run.timetable.images_per_step / seconds, "seconds": seconds}
    return {"step": run.step, "knn_accuracy": nearest_neighbours(run), **means, **speed}


# What the loop is put together from


def create_training(
    settings: DinoSettings,
    accelerator: Accelerator,
    data: ImageClassificationData,
    processor: ViTRegImageProcessor,
    stop: StopRequest,
) -> Training:
    """Student, teacher, optimizer, schedule and what saves them, prepared for this launch."""
    batch_size, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    images_per_step = batch_size * accumulated * accelerator.num_processes
    timetable = Timetable(
        images_per_step, len(data.train), settings.num_train_epochs, settings.steps_per_epoch, settings.max_steps
    )
    seed_weights(settings.seed)
    student = DinoNetwork(
        settings.model_config(),
        *(settings.num_prototypes, settings.head_hidden_size, settings.head_bottleneck_size),
        settings.patch_head if settings.ibot_weight else "none",
    )
    if settings.gradient_checkpointing:
        recompute_activations(student.backbone)
    teacher = cast(DinoNetwork, create_teacher(student)).to(accelerator.device)
    gram_teacher = cast(ViTRegModel, create_teacher(teacher.backbone)) if settings.gram_weight else None
    by_depth = settings.layer_decay, settings.patch_embedding_factor
    groups = parameter_groups(student, settings.weight_decay, *by_depth, settings.decay_tokens)
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = AdamW(groups, lr=settings.learning_rate, betas=betas, fused=one_kernel(accelerator))
    total, highest = timetable.total_steps, settings.learning_rate
    warmup = round(settings.warmup_ratio * total) if settings.warmup_steps is None else settings.warmup_steps
    scheduler = learning_rates(
        *(optimizer, warmup, total, settings.warmup_learning_rate / highest, settings.min_learning_rate / highest),
        rest_steps=round(settings.freeze_last_layer_ratio * total),
    )
    cls_targets, patch_targets = (
        target_rule(settings.targets, settings.num_prototypes).to(accelerator.device) for _ in range(2)
    )
    collate, size = Collate(EvaluationTransform(processor)), settings.per_device_eval_batch_size
    workers: dict[str, Any] = {"num_workers": settings.dataloader_num_workers, "worker_init_fn": outlive_stop}
    loaders = [DataLoader(images, size, collate_fn=collate, **workers) for images in (data.train, data.evaluation)]
    run_student, run_optimizer, *loaders = accelerator.prepare(student, optimizer, *loaders)
    states: dict[str, torch.nn.Module | None] = {"teacher": teacher, "gram_teacher": gram_teacher}
    states |= {"cls_targets": cls_targets, "patch_targets": patch_targets}
    saver = Saver(
        accelerator,
        settings.checkpoint_folder,
        scheduler,
        {name: module for name, module in states.items() if module is not None and module.state_dict()},
        stop,
        settings.save_steps,
        settings.save_total_limit,
        settings.logging_steps,
    )
    facts = {"seed": settings.seed, "settings": settings.hyperparameters()}
    guard = LossGuard(settings.loss_spike_factor)
    log = TrainingLog(accelerator, settings.output_folder, settings.logging_steps, total, guard, facts)
    return Training(
        *(settings, accelerator, timetable, run_student, teacher, gram_teacher, cls_targets, patch_targets),
        *(run_optimizer, scheduler, loaders, len(data.class_names), saver, log),
        settings.fixed(**describe_launch(accelerator), train_images=len(data.train)),
        no_totals(len(LOSSES) + 2, accelerator.device),
    )


def train_batches(
    run: Training, data: ImageClassificationData, processor: ViTRegImageProcessor
) -> Iterator[CropBatch]:
    """The training batches of this process from where the training is."""
    settings, accelerator = run.settings, run.accelerator
    (global_low, global_high), (local_low, local_high) = settings.global_crops_scale, settings.local_crops_scale
    crops: Any = MultiCrop(  # gives the crops of an image in place of the image
        *(processor, settings.num_local_crops, settings.local_crop_size),
        *((global_low, global_high), (local_low, local_high)),
        *(bool(settings.horizontal_flip), bool(settings.color_augmentation)),
    )
    sampler = BatchStream(
        SampleStream(len(data.train), settings.seed),
        settings.per_device_train_batch_size,
        (run.timetable.total_steps - run.step) * settings.gradient_accumulation_steps,
        *(run.position, accelerator.process_index, accelerator.num_processes),
    )
    loader = DataLoader(
        TrainingImages(data.train, crops, settings.seed),
        batch_sampler=sampler,
        collate_fn=MultiCropCollate(processor),
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=outlive_stop,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


def describe(run: Training, data: ImageClassificationData, skipped: Sequence[str]) -> dict[str, Any]:
    """The content of `results.json`."""
    settings, backbone = run.settings, run.teacher.trained_backbone()
    first, last = run.curve[0]["knn_accuracy"], run.curve[-1]["knn_accuracy"]
    images_per_step = run.timetable.images_per_step
    return {
        "model": {
            "name": f"vitreg-{settings.source_name()}-dino",
            "parameters": backbone.num_parameters(),
            **{name: getattr(backbone.config, name) for name in MODEL_SETTINGS},
            "weights": fingerprint(backbone.state_dict().items()),
        },
        "hyperparameters": {**settings.hyperparameters(), "total_train_batch_size": images_per_step},
        "data": describe_data(data, skipped),
        "metrics": {
            "knn_accuracy": last,
            "untrained_knn_accuracy": first,
            "neighbours": settings.knn_neighbours,
            "n": len(data.evaluation),
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
    folder, metrics = run.settings.output_folder, results["metrics"]
    with staged_folder(folder) as staging:
        run.teacher.trained_backbone().save_pretrained(staging)
        processor.save_pretrained(staging)
        knn_curve(results, staging / "knn_curve.png")
        write_results(results, staging / "results.json")
    print(
        f"k-NN      {metrics['knn_accuracy']:.4f} of {metrics['n']} held-out images, untrained "
        f"{metrics['untrained_knn_accuracy']:.4f}, {results['seconds']['train']:.1f} s of training"
    )
    print(f"model     {folder} (with image processor)")
    for label, file in (("results", "results.json"), ("picture", "knn_curve.png")):
        print(f"{label:9} {folder / file}")


if __name__ == "__main__":
    exit_with_a_sentence(main)
