# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a Vision Transformer with registers to classify images, with the loop in sight.

    accelerate launch examples/train_image_classification.py
    accelerate launch examples/train_image_classification.py --train_dir photos/train --validation_dir photos/val ...
    accelerate launch examples/train_image_classification.py --dataset_name someone/photos --streaming ...
    accelerate launch examples/train_image_classification.py --train_shards 'tars/train-{000..146}.tar' \\
        --validation_shards tars/validation.tar --class_names_file classes.txt --max_steps 100000 ...
    accelerate launch examples/train_image_classification.py --init_from checkpoint --tuning linear ...
    accelerate launch examples/train_image_classification.py --init_from checkpoint --tuning registers ...

Without arguments it trains random weights on the handwritten digits that scikit-learn ships: about a minute on one CPU
core, and about 98 % of the 360 test images are classified correctly. `examples/README.md` has the numbers, and the
commands for several processes, mixed precision, interrupted trainings and own images.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from vitreg_hf import ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.analysis.figures import training_curve
from vitreg_hf.analysis.figures.augmentations import Sample, augmentation_sheet
from vitreg_hf.analysis.images import as_seen
from vitreg_hf.hub.card_checks import check_license
from vitreg_hf.hub.cards import card_of, save_card
from vitreg_hf.hub.publish import PublishError, check_access, publish
from vitreg_hf.model.fingerprint import fingerprint
from vitreg_hf.register_neurons.adding import add_registers
from vitreg_hf.register_neurons.averages import mean_patch
from vitreg_hf.training.augmentation import TrainingTransform, mixing
from vitreg_hf.training.augmented_samples import augmented_samples
from vitreg_hf.training.checkpointing import agreed_checkpoint, load_checkpoint, no_totals
from vitreg_hf.training.classification_data import (
    Images,
    checked,
    describe_stream,
    held_out,
    open_images,
    training_batches,
    training_transform,
)
from vitreg_hf.training.classification_run import Training
from vitreg_hf.training.classification_settings import ImageClassificationSettings
from vitreg_hf.training.classifiers import check_model, create_model, create_processor, fit_batch_size
from vitreg_hf.training.command_line import parse_settings
from vitreg_hf.training.curve import should_stop
from vitreg_hf.training.finetuning import train_mode
from vitreg_hf.training.guards import LossGuard, TrainingDiverged
from vitreg_hf.training.labelled_images import ImageClassificationData
from vitreg_hf.training.launch import create_accelerator, describe_launch
from vitreg_hf.training.lora import merge_lora
from vitreg_hf.training.losses import classification_loss
from vitreg_hf.training.metrics import Accuracy, TopKAccuracy
from vitreg_hf.training.optim import create_ema, create_optimizer, create_schedule, one_kernel
from vitreg_hf.training.results import describe_data, describe_training, staged_folder, write_results
from vitreg_hf.training.running import Saver, StopRequest, exit_with_a_sentence
from vitreg_hf.training.seeding import seed_step
from vitreg_hf.training.sharding import bare_model, clip_gradients, shard_like, spare_copy, whole_model
from vitreg_hf.training.speed import describe_speed
from vitreg_hf.training.step_statistics import gradient_norms, register_statistics, token_statistics
from vitreg_hf.training.timetable import Timetable
from vitreg_hf.training.trackers import check_trackers, start_trackers, tracker_folder
from vitreg_hf.training.training_log import TrainingLog


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, and write model, processor, card, results and pictures to the output folder."""
    started = time.perf_counter()
    settings = parse_settings(ImageClassificationSettings, "image-classification", argv=argv)
    check_model(settings)
    if settings.hub_license is not None:
        check_license(settings.hub_license)
    if settings.push_to_hub:
        settings.hub_model_id = check_access(settings.hub_model_id or f"vitreg-{settings.source_name()}")
    trackers = check_trackers(settings.report_to)
    accelerator = create_accelerator(
        settings.mixed_precision,
        settings.gradient_accumulation_steps,
        settings.per_device_train_batch_size,
        trackers,
        tracker_folder(settings.output_folder),
        settings.max_grad_norm,
    )
    checkpoint = agreed_checkpoint(accelerator, settings.resume_from_checkpoint, settings.checkpoint_folder)

    data = open_images(settings)
    model = create_model(settings, data.class_names, lambda loaded: with_more_registers(loaded, settings, data))
    data, unreadable = checked(data, settings, accelerator, model.config.num_channels)
    if unreadable:
        accelerator.print(f"left out  {len(unreadable)} images that cannot be decoded (listed in results.json)")
    processor = create_processor(settings, model.config)
    transform = training_transform(settings, processor)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = f"{learning:,} of {model.num_parameters():,} weights"
    images = f"{data.train.num_images or 'an unknown number of'} images of {len(data.class_names)} classes"
    accelerator.print(f"trains    {weights} on {images}")

    with StopRequest(accelerator) as stop:
        run = create_training(settings, accelerator, model, data, processor, stop)
        if checkpoint is not None:
            changes = settings.resume_with_changes
            run.resume(load_checkpoint(accelerator, checkpoint, run.fixed, run.scheduler, run.saver.modules, changes))
        if settings.replay is not None:
            print(run.replayed(Path(settings.replay)))
            return
        project, hyperparameters = f"vitreg-{settings.source_name()}", settings.hyperparameters()
        start_trackers(accelerator, project, settings.output_folder, hyperparameters, run.step)
        try:
            metrics = train(run, train_batches(run, data, transform))
        except TrainingDiverged as error:
            sys.exit("\n".join([str(error), *error.__notes__, "--replay FOLDER looks into it; a checkpoint goes on"]))

    trained: Any = whole_model(accelerator, run.model if run.ema is None else run.ema.module, run.spare)
    skipped = sorted({*unreadable, *run.all_skipped()})
    if accelerator.is_main_process:
        if settings.tuning == "lora":
            merge_lora(trained)
        results = describe(run, trained, processor, metrics, describe_data(data, skipped), started)
        save(settings, trained, processor, results, data, transform)
    accelerator.end_training()
    if settings.push_to_hub and accelerator.is_main_process:
        push(settings)


def train(run: Training, batches: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
    """What is left of the training; returns the metrics of its last evaluation."""
    settings, metrics = run.settings, None
    with run.log:
        for epoch in range(len(run.curve), run.timetable.total_epochs):
            if should_stop(run.curve, settings.early_stopping_patience):
                break
            train_epoch(run, batches, epoch)
            with run.log.paused():
                started = time.perf_counter()
                metrics = evaluate(run)
                run.curve = [*run.curve, run.entry_of_epoch(metrics, time.perf_counter() - started)]
                run.totals = torch.zeros_like(run.totals)
                run.log.log_metrics(run.step, {f"eval_{name}": value for name, value in metrics.items()})
                if settings.save_every_epochs and (epoch + 1) % settings.save_every_epochs == 0:
                    run.saver.save(run.progress())
        run.log.flush()
    return metrics or evaluate(run)  # a finished training was resumed


def train_epoch(run: Training, batches: Iterator[dict[str, Tensor]], epoch: int) -> None:
    """The steps of one epoch that are left."""
    train_mode(bare_model(run.accelerator, run.model), run.settings.tuning)
    started = time.perf_counter()
    for step in range(run.step, run.timetable.end_of(epoch + 1)):
        with run.log.waiting():
            taken = list(islice(batches, run.settings.gradient_accumulation_steps))
        seed_step(run.settings.seed, step, run.accelerator.process_index)  # a loader that starts draws a number, too
        done = train_step(run, taken, with_statistics=run.log.due(step + 1))
        images = run.timetable.images_per_step
        run.step, run.position = step + 1, run.position + images
        now = time.perf_counter()
        run.totals += torch.cat([done.sums, done.sums.new_tensor([now - started])]).to(run.totals)
        started = now
        loss, rate = done.sums[0] / done.sums[2], run.optimizer.param_groups[-1]["lr"]
        run.log.update(run.step, loss, rate, images, taken, done.gradient_norm, done.statistics)
        run.saver.after_step(run.step, run.progress)


class Step(NamedTuple):
    """What an update of the weights leaves to tell of it."""

    sums: Tensor  # of this process: loss, right answers, images
    gradient_norm: Tensor | None
    statistics: dict[str, Tensor]


def train_step(run: Training, batches: Sequence[dict[str, Tensor]], with_statistics: bool) -> Step:
    """One update of the weights, from one or more batches of this process."""
    accelerator, settings, module = run.accelerator, run.settings, bare_model(run.accelerator, run.model)
    sums = no_totals(3, accelerator.device)
    statistics: dict[str, Tensor] = {}
    norm = None
    for batch in batches:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        images, labels = batch["pixel_values"], batch["labels"]
        inputs, targets = run.mixed(images, labels)
        with accelerator.accumulate(run.model):
            outputs = run.model(pixel_values=inputs, output_hidden_states=with_statistics)
            loss = run.loss(outputs.logits, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = clip_gradients(accelerator, run.model, settings.max_grad_norm)
                if with_statistics:
                    layout = module.base_model.layout
                    statistics = gradient_norms(module) | register_statistics(module)
                    statistics |= token_statistics(outputs, layout)
            run.optimizer.step()
            run.optimizer.zero_grad()
        right = (outputs.logits.argmax(dim=-1) == labels).sum()
        sums += torch.stack([loss.detach() * len(labels), right, torch.tensor(len(labels), device=right.device)])
    if accelerator.optimizer_step_was_skipped:  # fp16 overflowed, and has been scaled down
        return Step(sums, None, statistics)
    run.scheduler.step()
    if run.ema is not None:
        run.ema.update_parameters(module)
    return Step(sums, norm, statistics)


@torch.no_grad()
def evaluate(run: Training) -> dict[str, float | int]:
    """Loss and accuracy on the held-out images, of the averaged weights if there are any."""
    model = run.model if run.ema is None else run.ema
    model.eval()
    accuracy, top5, loss, count = Accuracy(), TopKAccuracy(k=5), 0.0, 0
    bar = tqdm(total=run.held_out.num_images, desc="Evaluating", unit="image", leave=False, delay=1,
               disable=not run.accelerator.is_main_process)  # fmt: skip
    with bar:
        for batch in run.held_out:
            with run.accelerator.autocast():
                logits = model(pixel_values=batch["pixel_values"], output_tokens=False).logits
            logits, labels = run.held_out.gather(logits.float(), batch["labels"])
            accuracy.add_batch(predictions=logits.argmax(dim=-1).cpu(), references=labels.cpu())
            top5.add_batch(predictions=logits.cpu(), references=labels.cpu())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            bar.update(len(labels))
    if count == 0:
        raise ValueError("Expected images to evaluate on, got none")
    metrics = {**accuracy.compute(), "loss": loss / count, "n": count}
    return metrics | top5.compute() if logits.shape[-1] > 5 else metrics


# What the loop is put together from


def with_more_registers(
    model: ViTRegForImageClassification, settings: ImageClassificationSettings, data: Images
) -> ViTRegForImageClassification:
    """The model with the registers that are to be added, which start as the mean patch of the first images."""
    if not settings.add_registers:
        return model
    images = data.with_channels(model.config.num_channels) if isinstance(data, ImageClassificationData) else data
    transform = training_transform(settings, create_processor(settings, model.config))
    first = augmented_samples(images, settings, transform, images=64, passes=1)
    average = mean_patch(model, torch.cat([sample.versions for sample in first]))
    return add_registers(model, settings.add_registers, average, settings.seed)


def create_training(
    settings: ImageClassificationSettings,
    accelerator: Accelerator,
    model: ViTRegForImageClassification,
    data: Images,
    processor: ViTRegImageProcessor,
    stop: StopRequest,
) -> Training:
    """Model, optimizer, schedule, averaged weights and what saves them, prepared for this launch."""
    loss = classification_loss(settings.loss, settings.label_smoothing_factor)
    mix = mixing(len(data.class_names), settings.mixup_alpha, settings.cutmix_alpha)
    spare = spare_copy(accelerator, model)
    if settings.auto_find_batch_size:
        model.to(accelerator.device)
    ema = None if settings.ema_decay is None else create_ema(model, settings.ema_decay)
    if settings.auto_find_batch_size:
        fit_batch_size(settings, accelerator, model, processor, loss, mix)
    images_per_batch = settings.per_device_train_batch_size * accelerator.num_processes
    length = settings.num_train_epochs, settings.steps_per_epoch, settings.max_steps
    timetable = Timetable(images_per_batch * settings.gradient_accumulation_steps, data.train.num_images, *length)
    optimizer = create_optimizer(model, settings, one_kernel(accelerator))
    scheduler = create_schedule(optimizer, timetable.total_steps, settings)
    run_model, run_optimizer = accelerator.prepare(model, optimizer)
    if ema is not None:
        shard_like(ema.module, run_model)
        ema.to(accelerator.device)
    saver = Saver(
        accelerator,
        settings.checkpoint_folder,
        scheduler,
        {} if ema is None else {"ema": ema},
        stop,
        settings.save_steps,
        settings.save_total_limit,
        settings.logging_steps,
    )
    guard = LossGuard(settings.loss_spike_factor)
    facts = {"seed": settings.seed, "settings": settings.hyperparameters()}
    log = TrainingLog(accelerator, settings.output_folder, settings.logging_steps, timetable.total_steps, guard, facts)
    images = {"train_images": data.train.num_images, "classes": data.class_names, **describe_stream(data)}
    fixed, skipped = settings.fixed(**describe_launch(accelerator), **images), set[str]()
    evaluated = held_out(data, settings, accelerator, processor, skipped)
    return Training(
        *(settings, accelerator, timetable, run_model, ema, spare, run_optimizer, scheduler, loss, mix),
        *(evaluated, saver, log, fixed, skipped),
    )


def train_batches(run: Training, data: Images, transform: TrainingTransform) -> Iterator[dict[str, Any]]:
    """The training batches of this process from where the training is."""
    left = (run.timetable.total_steps - run.step) * run.settings.gradient_accumulation_steps
    return training_batches(data, run.settings, run.accelerator, transform, run.position, left, run.skipped)


def describe(
    run: Training,
    model: PreTrainedModel,
    processor: ViTRegImageProcessor,
    metrics: dict[str, Any],
    data: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """The content of `results.json`."""
    settings = run.settings
    results = {
        **describe_training(settings, run.accelerator, model, run.curve, run.timetable.total_epochs),
        "data": {**data, "evaluation_images": metrics["n"]},
        "metrics": metrics,
        "steps": run.log.records,
        "speed": describe_speed(model, processor, settings.per_device_eval_batch_size),
        "license": settings.hub_license,
        "command": shlex.join(["python", *sys.argv]),
    }
    results["model"]["weights"] = fingerprint(model.state_dict().items())
    results["seconds"]["total"] = max(time.perf_counter() - started, results["seconds"]["train"])
    return results


def save(
    settings: ImageClassificationSettings,
    model: PreTrainedModel,
    processor: ViTRegImageProcessor,
    results: dict[str, Any],
    data: Images,
    transform: TrainingTransform,
) -> None:
    """Write everything into the output folder at once, and say what is where."""
    folder, pictures = settings.output_folder, ["training_curve.png"]
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        training_curve(results, staging / "training_curve.png")
        if transform.is_random:
            pictures.append("augmentations.png")
            draw_augmentation(settings, data, transform, staging / "augmentations.png")
        write_results(results, staging / "results.json")
        save_card(card_of(staging, settings.hub_model_id or str(folder)), staging)
    metrics, seconds = results["metrics"], results["seconds"]
    print(
        f"accuracy  {metrics['accuracy']:.4f} on {metrics['n']} held-out images, {seconds['train']:.1f} s of training"
    )
    print(f"model     {folder} (with image processor)")
    for label, file in (("card", "README.md"), ("results", "results.json"), *(("picture", one) for one in pictures)):
        print(f"{label:9} {folder / file}")


def draw_augmentation(
    settings: ImageClassificationSettings, data: Images, transform: TrainingTransform, path: Path
) -> None:
    """A picture of a few training images and what the model is shown of them."""
    samples = augmented_samples(data, settings, transform)
    rows = [
        [Sample(one.image.permute(1, 2, 0).numpy()), *map(Sample, as_seen(one.versions, transform.processor))]
        for one in samples
    ]
    mixed = " (before images are mixed)" if settings.mixup_alpha or settings.cutmix_alpha else ""
    augmentation_sheet(
        rows,
        path,
        column_names=["original", *(f"augmented, pass {number}" for number in range(1, len(rows[0])))],
        captions=[f"class: {data.class_names[one.label]}" for one in samples],
        title=f"Training images of {settings.source_name()}, and what the model is shown of them in each pass over\n"
        f"the data{mixed}: {', '.join(transform.names)}",
    )


def push(settings: ImageClassificationSettings) -> None:
    """Publish the output folder in one commit; `vitreg push` does the same to any folder, at any time."""
    repository = str(settings.hub_model_id)
    try:
        published = publish(
            settings.output_folder, repository, private=settings.hub_private_repo, revision=settings.hub_revision
        )
    except (PublishError, ValueError) as error:
        sys.exit(f"trained, but not published: {error}\nvitreg push {settings.output_folder} {repository}")
    print(f"published {published.url}")


if __name__ == "__main__":
    exit_with_a_sentence(main)
