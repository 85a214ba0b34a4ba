"""`transformers.Trainer` fine-tunes a ViTReg, for people who prefer it to the scripts.

A classifier of digits below five becomes one of the others, better than from random weights in as many steps.
"""

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor
from vitreg_hf.training.data import load_digits

CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
CONFIG |= {"initializer_range": 0.1, "layerscale_value": 1.0}


class Digits(Dataset):
    """Scans of some digits, as Trainer wants them: dictionaries of what the model takes."""

    def __init__(self, split, digits, processor):
        chosen = [split[index] for index in range(len(split)) if int(split[index][1]) in digits]
        images, labels = zip(*chosen, strict=True)
        self.pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        self.labels = torch.tensor([digits.index(label) for label in labels])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


@pytest.fixture(scope="module")
def processor():
    return ViTRegImageProcessor(size={"height": 32, "width": 32})


def fit(model, folder, digits, processor, epochs):
    data = load_digits()
    train, test = (Digits(split, digits, processor) for split in (data.train, data.evaluation))
    arguments = TrainingArguments(
        *(str(folder),),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        weight_decay=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        compute_metrics=lambda p: {"accuracy": float(np.mean(np.argmax(p.predictions, axis=1) == p.label_ids))},
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.evaluate()["eval_accuracy"]


def test_trainer_fine_tunes_to_other_classes(processor, tmp_path):
    torch.manual_seed(0)
    labels = {index: str(index) for index in range(5)}
    source = ViTRegForImageClassification(ViTRegConfig(**CONFIG, id2label=labels))
    assert fit(source, tmp_path / "source", [0, 1, 2, 3, 4], processor, epochs=10) > 0.9

    others = {index: str(index + 5) for index in range(5)}
    tuned = AutoModelForImageClassification.from_pretrained(
        tmp_path / "source", id2label=others, label2id={name: index for index, name in others.items()}
    )
    torch.nn.init.trunc_normal_(tuned.classifier.weight, std=0.1)  # as many classes as before, but other ones
    random = ViTRegForImageClassification(ViTRegConfig(**CONFIG, id2label=others))
    accuracies = [fit(m, tmp_path / n, [5, 6, 7, 8, 9], processor, 3) for m, n in ((tuned, "tuned"), (random, "new"))]
    assert accuracies[0] > 0.75
    assert accuracies[0] > accuracies[1] + 0.03

    classify = pipeline("image-classification", model=str(tmp_path / "tuned"))
    image = PIL.Image.fromarray(load_digits().evaluation[0][0].movedim(0, -1).numpy())
    assert {answer["label"] for answer in classify(image)} <= {"5", "6", "7", "8", "9"}
