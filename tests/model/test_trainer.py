"""`transformers.Trainer` on the family: metrics of an evaluation, and accumulation of gradients."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from vitreg_hf import ViTRegForImageClassification, ViTRegForSemanticSegmentation


class Images(Dataset):
    def __init__(self, labels):
        self.pixels = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(1))
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def trainer(model, folder, data, **arguments):
    own = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**own, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float(np.mean(np.argmax(p.predictions, axis=1) == p.label_ids))},
    )


def test_metrics_are_computed_from_logits(make_config, tmp_path):
    model = ViTRegForImageClassification(make_config()).eval()
    data = Images(torch.tensor([0, 1, 2, 3, 4, 0]))
    metrics = trainer(model, tmp_path, data).evaluate()
    expected = (model(data.pixels).logits.argmax(-1) == data.labels).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (ViTRegForImageClassification, torch.arange(8) % 5),
        (ViTRegForImageClassification, torch.eye(8)[:, :5]),  # several labels
        (ViTRegForSemanticSegmentation, (torch.arange(8 * 32 * 32) % 5).view(8, 32, 32)),
    ],
    ids=["one-label", "several-labels", "segmentation"],
)
def test_accumulated_gradients_are_those_of_one_batch(make_config, tmp_path, head, labels):
    norms = []
    for steps in (1, 4):
        torch.manual_seed(0)
        model, data = head(make_config()), Images(labels)
        batch = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        run = trainer(model, tmp_path, data, logging_steps=1, max_grad_norm=1e9, learning_rate=0.0, **batch)
        run.train()
        norms.append(run.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
