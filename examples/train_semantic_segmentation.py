# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Train semantic segmentation on patch tokens, frozen or tuned, with the loop in sight.

    accelerate launch examples/train_semantic_segmentation.py
    accelerate launch examples/train_semantic_segmentation.py --init_from MODEL --tuning linear
    accelerate launch examples/train_semantic_segmentation.py --init_from MODEL --tuning full --train_dir photos ...

One linear layer reads the class of every pixel off the patch tokens, behind BatchNorm, as DINOv2 evaluates features.
`--tuning linear` leaves the model as it is, `--tuning full` trains it too. Without arguments a small model is trained
from random weights on scenes of scanned digits, which need no download. Images are resized to a square as the image
processor does, and scored there.

Measured on the 150 held-out scenes, 60 epochs: 20.6 % mean IoU from random weights (2.7 minutes of one core; all
background would be 7.8 %), 25.2 % when the classifier of clean digits (`train_image_classification.py`) is tuned. Its
frozen tokens tell nothing here (7.9 %; untrained ones 8.1 %): it never saw colours, noise or dark ink. Tokens that did
learn on scenes, frozen under a new linear layer, give 19.2 % after 6 epochs.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from vitreg_hf import ViTRegConfig, ViTRegForSemanticSegmentation, ViTRegImageProcessor
from vitreg_hf.analysis.figures.segmentation import segmentation_figure
from vitreg_hf.model.fingerprint import fingerprint
from vitreg_hf.training.batch_size import recompute_activations
from vitreg_hf.training.checkpointing import agreed_checkpoint, load_checkpoint, no_totals
from vitreg_hf.training.command_line import parse_settings
from vitreg_hf.training.finetuning import load_backbone, processor_for, resized_positions
from vitreg_hf.training.guards import LossGuard, TrainingDiverged
from vitreg_hf.training.launch import create_accelerator, describe_launch
from vitreg_hf.training.optim import create_optimizer, create_schedule, one_kernel
from vitreg_hf.training.results import hardware, staged_folder, versions, write_results
from vitreg_hf.training.running import Resumable, Saver, StopRequest, exit_with_a_sentence, outlive_stop
from vitreg_hf.training.sampling import BatchStream, SampleStream
from vitreg_hf.training.seeding import seed_step, seed_weights
from vitreg_hf.training.segmentation_augmentation import CollateScenes, SceneEvaluation, SceneTransform
from vitreg_hf.training.segmentation_data import (
    SegmentationData,
    TrainingScenes,
    load_columns,
    load_pairs,
    load_scenes,
)
from vitreg_hf.training.segmentation_metrics import MeanIoU
from vitreg_hf.training.segmentation_settings import SegmentationSettings
from vitreg_hf.training.sharding import bare_model, clip_gradients, spare_copy, whole_model
from vitreg_hf.training.timetable import Timetable
from vitreg_hf.training.trackers import check_trackers, start_trackers, tracker_folder
from vitreg_hf.training.training_log import TrainingLog

_DRAWN = 6  # held-out images in the picture


@dataclass
class Training(Resumable):
    """What the loop turns, and where it is."""

    settings: SegmentationSettings
    accelerator: Accelerator
    timetable: Timetable
    model: torch.nn.Module
    spare: PreTrainedModel | None  # what a sharded model is gathered into
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    eval_loader: Any
    saver: Saver
    log: TrainingLog
    fixed: dict[str, Any]  # what a run that continues this one must have in common with it
    totals: Tensor  # of this epoch and process: loss, batches, images, seconds
    step: int = 0  # updates of the weights so far
    position: int = 0  # training samples taken so far, by all processes
    curve: list[dict[str, Any]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, and write model, processor, results and picture to the output folder."""
    started = time.perf_counter()
    settings = parse_settings(SegmentationSettings, argv=argv)
    accelerator = create_accelerator(
        *(settings.mixed_precision, settings.gradient_accumulation_steps, settings.per_device_train_batch_size),
        *(check_trackers(settings.report_to), tracker_folder(settings.output_folder), settings.max_grad_norm),
    )
    checkpoint = agreed_checkpoint(accelerator, settings.resume_from_checkpoint, settings.checkpoint_folder)
    data = load_data(settings)
    seed_weights(settings.seed)
    model = create_model(settings, data.class_names)
    if settings.gradient_checkpointing:
        recompute_activations(model)
    processor = create_processor(settings, model.config)

    with StopRequest(accelerator) as stop:
        run = create_training(settings, accelerator, model, data, processor, stop)
        if checkpoint is not None:
            changes = settings.resume_with_changes
            run.resume(load_checkpoint(accelerator, checkpoint, run.fixed, run.scheduler, {}, changes))
        start_trackers(
            accelerator, "vitreg-segmentation", settings.output_folder, settings.hyperparameters(), run.step
        )
        try:
            with run.log:
                metrics = train(run, train_batches(run, data, processor))
        except TrainingDiverged as error:
            sys.exit("\n".join([str(error), *error.__notes__]))

    trained: Any = whole_model(accelerator, run.model, run.spare)
    if accelerator.is_main_process:
        results = describe(run, trained, data, metrics)
        results["seconds"]["total"] = max(time.perf_counter() - started, results["seconds"]["train"])
        save(run, trained, data, processor, results)
    accelerator.end_training()


def train(run: Training, batches: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
    """What is left of the training; returns the metrics of its last evaluation."""
    settings, metrics = run.settings, None
    for epoch in range(len(run.curve), run.timetable.total_epochs):
        train_mode(run)
        started = time.perf_counter()
        for step in range(run.step, run.timetable.end_of(epoch + 1)):
            with run.log.waiting():
                taken = list(islice(batches, settings.gradient_accumulation_steps))
            seed_step(settings.seed, step, run.accelerator.process_index)  # a loader that starts draws a number, too
            run.totals[:3] += train_step(run, taken)
            run.totals[3] += time.perf_counter() - started
            started = time.perf_counter()
            run.saver.after_step(run.step, run.progress)
        with run.log.paused():
            metrics = evaluate(run)
            run.curve = [*run.curve, describe_epoch(run, metrics)]
            run.totals = torch.zeros_like(run.totals)
            if settings.save_every_epochs and (epoch + 1) % settings.save_every_epochs == 0:
                run.saver.save(run.progress())
    return metrics or evaluate(run)  # a finished training was resumed


def train_mode(run: Training) -> None:
    """Dropout and statistics of batches for what is trained; a frozen backbone computes what it will at the end."""
    run.model.train()
    if run.settings.tuning == "linear":
        bare_model(run.accelerator, run.model).vitreg.eval()


def train_step(run: Training, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """One update of the weights; returns the summed loss, batches and images of this process."""
    accelerator, settings, norm = run.accelerator, run.settings, None
    losses = []
    for batch in batches:
        images = send_to_device(batch, accelerator.device, non_blocking=True)
        with accelerator.accumulate(run.model):
            loss = run.model(pixel_values=images["pixel_values"], labels=images["labels"]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = clip_gradients(accelerator, run.model, settings.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        losses.append(loss.detach())
    skipped, rate = accelerator.optimizer_step_was_skipped, max(map(float, run.scheduler.get_last_lr()))
    if not skipped:
        run.scheduler.step()
    run.step, run.position = run.step + 1, run.position + run.timetable.images_per_step
    mean = torch.stack(losses).mean()
    run.log.update(run.step, mean, rate, run.timetable.images_per_step, batches, None if skipped else norm)
    images = sum(len(batch["labels"]) for batch in batches)
    return torch.stack([mean * len(losses), mean.new_tensor(len(losses)), mean.new_tensor(images)])


@torch.no_grad()
def evaluate(run: Training) -> dict[str, Any]:
    """Mean IoU and accuracy of pixels on the held-out images, at the size that the model gets."""
    run.model.eval()
    metric = MeanIoU(bare_model(run.accelerator, run.model).config.num_labels)
    for batch in run.eval_loader:
        predicted = predict(run.model, batch["pixel_values"], run.accelerator)
        pair = run.accelerator.gather_for_metrics((predicted.int(), batch["labels"].int()))
        metric.add_batch(predictions=pair[0], references=pair[1])
    return metric.compute() | {"n": len(run.eval_loader.dataset)}


def predict(model: torch.nn.Module, pixel_values: Tensor, accelerator: Accelerator) -> Tensor:
    """Class of every pixel, `(B, H, W)`."""
    with accelerator.autocast():
        logits = model(pixel_values=pixel_values).logits.float()
    size = pixel_values.shape[-2:]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)


def describe_epoch(run: Training, metrics: dict[str, Any]) -> dict[str, Any]:
    """The entry of an epoch in the curve; to be called by every process."""
    loss, batches, images, seconds = run.accelerator.reduce(run.totals, reduction="sum").tolist()
    numbers = {"mean_iou": metrics["mean_iou"], "pixel_accuracy": metrics["pixel_accuracy"]}
    run.log.log_metrics(run.step, {f"eval_{name}": value for name, value in numbers.items()})
    return {
        "epoch": len(run.curve) + 1,
        "step": run.step,
        "train_loss": loss / batches,
        **{f"eval_{name}": value for name, value in numbers.items()},
        "images_per_second": images * run.accelerator.num_processes / seconds,
        "seconds": seconds / run.accelerator.num_processes,
    }


# What the loop is put together from


def load_data(settings: SegmentationSettings) -> SegmentationData:
    """The images and masks that the settings name; those that go in pairs are checked to do so."""
    names, reduced = settings.names_of_classes(), settings.reduce_labels
    columns = (settings.image_column_name, settings.mask_column_name, reduced)
    if settings.train_dir is not None:
        data = load_pairs(settings.train_dir, settings.validation_dir, names, reduced)
    elif settings.train_file is not None:
        data = load_columns(settings.train_file, names, None, settings.validation_file, *columns)
    elif settings.dataset_name is not None:
        data = load_columns(settings.dataset_name, names, settings.dataset_config_name, None, *columns)
    else:
        data = load_scenes()
    if settings.max_train_samples is None:
        return data
    return SegmentationData(**{**vars(data), "train": data.train.sample(settings.max_train_samples)})


def create_model(settings: SegmentationSettings, class_names: Sequence[str]) -> ViTRegForSemanticSegmentation:
    """A linear layer on the tokens of a model that is loaded, or of one with random weights."""
    labels: dict[str, Any] = {"id2label": dict(enumerate(class_names))}
    labels["label2id"] = {name: index for index, name in enumerate(class_names)}
    head = {**labels, "segmentation_batch_norm": settings.batch_norm, "drop_path_rate": settings.drop_path_rate}
    if settings.init_from is None:
        return ViTRegForSemanticSegmentation(ViTRegConfig(**{**settings.model_config().to_dict(), **head}))
    backbone = load_backbone(settings.init_from)
    size = settings.chosen_image_size or backbone.config.image_size
    model = ViTRegForSemanticSegmentation(ViTRegConfig.from_dict(backbone.config.to_dict(), image_size=size, **head))
    weights = backbone.state_dict()
    if (positions := resized_positions(backbone, model.config.position_grid)) is not None:
        weights["embeddings.position_embeddings"] = positions
    model.vitreg.load_state_dict(weights)
    model.vitreg.requires_grad_(settings.tuning == "full")
    return model


def create_processor(settings: SegmentationSettings, config: ViTRegConfig) -> ViTRegImageProcessor:
    """How images are prepared: whole, in the size of the model; colours as a loaded model knows them."""
    processor = processor_for(settings.init_from, config, crops=False, eval_crop_ratio=1.0)
    processor.do_reduce_labels = settings.reduce_labels
    return processor


def create_training(
    settings: SegmentationSettings,
    accelerator: Accelerator,
    model: ViTRegForSemanticSegmentation,
    data: SegmentationData,
    processor: ViTRegImageProcessor,
    stop: StopRequest,
) -> Training:
    """Model, optimizer, schedule, log and what saves them, prepared for this launch."""
    batch_size, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    images_per_step = batch_size * accumulated * accelerator.num_processes
    timetable = Timetable(
        images_per_step, len(data.train), settings.num_train_epochs, settings.steps_per_epoch, settings.max_steps
    )
    optimizer = create_optimizer(model, settings, one_kernel(accelerator))
    scheduler = create_schedule(optimizer, timetable.total_steps, settings)
    spare = spare_copy(accelerator, model)
    collate = CollateScenes(SceneEvaluation(unreduced(processor)))
    eval_loader = DataLoader(data.evaluation, settings.per_device_eval_batch_size, collate_fn=collate)
    run_model, run_optimizer, eval_loader = accelerator.prepare(model, optimizer, eval_loader)
    saving = (stop, settings.save_steps, settings.save_total_limit, settings.logging_steps)
    log = TrainingLog(
        *(accelerator, settings.output_folder, settings.logging_steps, timetable.total_steps),
        *(LossGuard(settings.loss_spike_factor), {"seed": settings.seed}),
    )
    return Training(
        *(settings, accelerator, timetable, run_model, spare, run_optimizer, scheduler, eval_loader),
        *(Saver(accelerator, settings.checkpoint_folder, scheduler, {}, *saving), log),
        settings.fixed(**describe_launch(accelerator), train_images=len(data.train), classes=data.class_names),
        totals=no_totals(4, accelerator.device),
    )


def unreduced(processor: ViTRegImageProcessor) -> ViTRegImageProcessor:
    """The processor for masks as the data hands them out, whose labels count from 0 already."""
    return ViTRegImageProcessor(**{**processor.to_dict(), "do_reduce_labels": False})


def train_batches(
    run: Training, data: SegmentationData, processor: ViTRegImageProcessor
) -> Iterator[dict[str, Tensor]]:
    """The training batches of this process from where the training is."""
    settings, accelerator = run.settings, run.accelerator
    transform = SceneTransform(processor, settings.scale, bool(settings.horizontal_flip))
    sampler = BatchStream(
        SampleStream(len(data.train), settings.seed),
        settings.per_device_train_batch_size,
        (run.timetable.total_steps - run.step) * settings.gradient_accumulation_steps,
        *(run.position, accelerator.process_index, accelerator.num_processes),
    )
    loader = DataLoader(
        TrainingScenes(data.train, transform.augment, settings.seed),
        batch_sampler=sampler,
        collate_fn=CollateScenes(transform),
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=outlive_stop,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


# What is left behind


def describe(run: Training, model: PreTrainedModel, data: SegmentationData, metrics: dict[str, Any]) -> dict[str, Any]:
    """The content of `results.json`."""
    settings, config = run.settings, model.config
    shape = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens")
    iou = dict(zip(data.class_names, metrics["iou"], strict=True))
    return {
        "model": {
            "name": f"vitreg-{settings.source_name()}",
            "parameters": model.num_parameters(),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **{name: getattr(config, name) for name in shape},
            "weights": fingerprint(model.state_dict().items()),
        },
        "hyperparameters": {**settings.hyperparameters(), "total_train_batch_size": run.timetable.images_per_step},
        "data": {
            "source": data.source,
            "hub_id": data.hub_id,
            "license": data.license,
            "classes": data.class_names,
            "train_images": len(data.train),
            "evaluation_images": len(data.evaluation),
            "evaluation_split": data.evaluation_split,
            "held_out_by": data.held_out_by,
        },
        "metrics": {**metrics, "iou": iou},
        "curve": run.curve,
        "steps": run.log.records,
        "versions": versions(),
        "hardware": hardware(run.accelerator),
        "seconds": {"train": sum(entry["seconds"] for entry in run.curve)},
        "command": shlex.join(["python", *sys.argv]),
    }


def save(
    run: Training,
    model: PreTrainedModel,
    data: SegmentationData,
    processor: ViTRegImageProcessor,
    results: dict[str, Any],
) -> None:
    """Write everything into the output folder at once, and say what is where."""
    folder, metrics = run.settings.output_folder, results["metrics"]
    said = f"mean IoU {100 * metrics['mean_iou']:.1f} %, pixels {100 * metrics['pixel_accuracy']:.1f} %"
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        draw(run, model, data, processor, staging / "predictions.png", f"{data.source}, held out: {said}")
        write_results(results, staging / "results.json")
    print(f"{said} on {metrics['n']} held-out images, {results['seconds']['train']:.1f} s of training")
    print(f"model     {folder} (with image processor)")
    for label, file in (("results", "results.json"), ("picture", "predictions.png")):
        print(f"{label:9} {folder / file}")


def draw(
    run: Training,
    model: PreTrainedModel,
    data: SegmentationData,
    processor: ViTRegImageProcessor,
    path: Any,
    title: str,
) -> None:
    """Some held-out images beside the truth and what the model says."""
    pairs = [data.evaluation[index] for index in range(min(_DRAWN, len(data.evaluation)))]
    batch = CollateScenes(SceneEvaluation(unreduced(processor)))(pairs)
    pixels = batch["pixel_values"]
    with torch.no_grad():
        predicted = predict(model.eval(), pixels.to(model.device, model.dtype), run.accelerator).cpu()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    truths, said = (list(maps.numpy().astype(np.int64)) for maps in (batch["labels"], predicted))
    segmentation_figure(list(seen), truths, said, data.class_names, path, title=title)


if __name__ == "__main__":
    exit_with_a_sentence(main)
