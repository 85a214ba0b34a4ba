# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Use a trained classifier: pipelines, Auto classes, and a picture of what CLS and the registers attend to.

    python examples/inference.py --model_dir outputs/digits
    python examples/inference.py --model_dir outputs/photos --images a.jpg b.png --top_k 3 --output_dir outputs/seen
    python examples/inference.py --model_dir outputs/digits --compare_with outputs/digits-plain

Without `--images` it takes a few digits of the test set. `--compare_with` draws CLS of a second model, say one without
registers, beside the first. It prints the best classes of every image and the shapes of
the features, and writes `attention.png`; about ten seconds on one CPU core, most of them imports.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

import vitreg_hf  # noqa: F401 - registers the model family with Transformers
from vitreg_hf.analysis.extract import prefix_attention
from vitreg_hf.analysis.figures import attention_figure
from vitreg_hf.training.data import load_digits


def main(argv: Sequence[str] | None = None) -> None:
    """Classify images, extract their features, and draw attention."""
    options = parse(argv)
    images, names = (open_images(options.images), options.images) if options.images else some_digits()
    names = [Path(name).name for name in names]
    folder = Path(options.output_dir or options.model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.images:
        images[0].save(folder / "digit.png")
        print(f"an image to try: {folder / 'digit.png'}")

    classify = pipeline("image-classification", model=options.model_dir, top_k=options.top_k)
    predictions = classify(images)
    for name, classes in zip(names, predictions, strict=True):
        print(f"{name}: " + ", ".join(f"{one['label']} {one['score']:.3f}" for one in classes))

    extract = pipeline("image-feature-extraction", model=options.model_dir)
    features = np.array([extract(image)[0] for image in images])
    print(f"features of all tokens (images, tokens, channels): {features.shape}")

    processor = AutoImageProcessor.from_pretrained(options.model_dir)
    model = AutoModelForImageClassification.from_pretrained(options.model_dir).eval()
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixel_values)
    for field in ("cls_token", "register_tokens", "patch_tokens", "patch_map"):
        tokens = getattr(outputs, field)
        print(f"{field}: {'none' if tokens is None else tuple(tokens.shape)}")

    attention = prefix_attention(model, pixel_values)
    maps, token_names = attention.mean_over_heads(), attention.token_names
    if options.compare_with:
        other = AutoModel.from_pretrained(options.compare_with).eval()
        other_maps = prefix_attention(other, pixel_values).mean_over_heads()
        maps = torch.cat([other_maps[:, :1], maps], dim=1)
        token_names = [f"CLS, other model\nwith {other.config.num_register_tokens} registers", *token_names]
    seen = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    best = [f"predicted: {classes[0]['label']} ({classes[0]['score']:.0%})" for classes in predictions]
    path = folder / "attention.png"
    attention_figure(
        seen.permute(0, 2, 3, 1).numpy(),
        maps,
        path,
        token_names=token_names,
        captions=[f"{name}\n{guess}" for name, guess in zip(names, best, strict=True)],
        title=f"{Path(options.model_dir).resolve().name}: attention in the last layer (layer {attention.layer + 1})",
        equal_share=attention.equal_share(),
    )
    print(f"picture: {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="outputs/digits", help="folder of a trained model")
    parser.add_argument("--images", nargs="+", help="image files; default: digits of the test set")
    parser.add_argument("--top_k", type=int, default=3, help="classes printed per image")
    parser.add_argument("--compare_with", help="folder of a model for the same images, whose CLS is drawn beside")
    parser.add_argument("--output_dir", help="folder of the picture; default: that of the model")
    options = parser.parse_args(argv)
    for name in ("model_dir", "compare_with"):
        folder = getattr(options, name)
        if folder is not None and not (Path(folder) / "config.json").is_file():
            parser.error(f"expected a folder with a trained model in --{name}, got {folder!r}")
    if missing := [name for name in options.images or () if not Path(name).is_file()]:
        parser.error(f"expected existing files in --images, got {', '.join(missing)}")
    if options.top_k < 1:
        parser.error(f"expected --top_k of 1 or more, got {options.top_k}")
    return options


def open_images(files: Sequence[str]) -> list[PIL.Image.Image]:
    """Images as they are; the processor brings any mode to RGB."""
    return [PIL.Image.open(file) for file in files]


def some_digits(count: int = 5) -> tuple[list[PIL.Image.Image], list[str]]:
    """The first test images of different classes, and what they show."""
    test = load_digits().evaluation
    first: dict[int, PIL.Image.Image] = {}
    for pixels, label in (test[index] for index in range(len(test))):
        first.setdefault(label, PIL.Image.fromarray(np.moveaxis(pixels.numpy(), 0, -1)))
        if len(first) == count:
            break
    return list(first.values()), [f"a scanned {test.class_names[label]}" for label in first]


if __name__ == "__main__":
    main()
