# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""A page that shows what a model makes of an image: classes, attention of CLS and registers, norms of patches.

    python examples/demo_app.py --model_dir outputs/digits
    python examples/demo_app.py --model_dir facebook/dinov2-with-registers-base --images_dir photos --port 8000

Then open the address that it prints, by default http://127.0.0.1:7860. Images to click come from `--images_dir`, by
default from `held_out` beside the model, where `artifacts.py` leaves them. It needs `pip install -e ".[demo]"`, is up
after eight seconds on one CPU core, most of them imports, and takes a second per image with the digits model, most of
it for drawing. Only this machine can open the page and nothing leaves it, unless `--share on` asks Gradio for a public
address. What was uploaded is deleted at the end.
"""

import argparse
import html
import os
import socket
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

import vitreg_hf  # noqa: F401 - registers the model family with Transformers
from vitreg_hf.analysis.extract import Subject, classify, load_vision, read
from vitreg_hf.analysis.figures.maps import map_sheet, norm_maps
from vitreg_hf.analysis.figures.overlay import attention_overlay
from vitreg_hf.analysis.images import as_seen, find_images, open_upright, preprocess
from vitreg_hf.analysis.recorder import AttentionCall, Readers
from vitreg_hf.analysis.token_norms import CUTOFF_RULES, cutoff, patch_norms

TITLE = "What a Vision Transformer looks at"
ABOUT = f"""# {TITLE}
A Vision Transformer cuts an image into square *patches* and computes with one *token* (a vector) per patch, and with a
token called **CLS** that sums the image up. **Registers** are a few more tokens, learned and without a place in the
image: scratch space, so that the model need not overwrite patches of background for that
([Darcet et al., 2024](https://arxiv.org/abs/2309.16588))."""
START = "<p>Choose an image and press Analyse, or click an example. Attention and norms appear below.</p>"
DONE = "<p>Attention and norms are below. Look into other layers and single heads, too.</p>"
STYLE = """
#upload img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.seen { display: flex; flex-wrap: wrap; gap: 12px 32px; align-items: center; font-size: 16px; line-height: 1.5; }
.seen figure { margin: 0; flex: 1 1 1200px; }
.seen figure.narrow { flex: 1 1 560px; max-width: 720px; }
.seen img { width: 100%; background: white; }
.seen div { flex: 1 1 320px; }
.alert { border-left: 4px solid #b3261e; background: #fdecea; color: #611a15; padding: 12px 16px; font-size: 16px; }
"""
HOST = "127.0.0.1"  # this machine only
TOP_CLASSES, EXAMPLES, LARGEST_UPLOAD = 5, 10, "50mb"


# ---- what a model makes of an image --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model makes of one image.

    Attributes:
        image: RGB `(H, W, 3)` as the model saw it.
        classes: probability per class, the likeliest first; None for a model without a classification head.
        names: one per token before the patches: CLS, then registers; empty if there are none.
        attention: of these tokens on patches, probabilities `(layers, heads, tokens, rows, columns)`.
        norms: L2 norm of each patch token after each layer, `(layers, rows, columns)`.
    """

    image: NDArray[np.uint8]
    classes: dict[str, float] | None
    names: tuple[str, ...]
    attention: Tensor
    norms: Tensor

    def maps(self, layer: int, head: int) -> NDArray[np.float32]:
        """Attention `(tokens, rows, columns)` of a layer, from 1, and of a head, from 1, or 0 for their mean."""
        of_layer = self.attention[layer - 1]
        return (of_layer[head - 1] if head else of_layer.mean(dim=0)).numpy()


def look(subject: Subject, image: PIL.Image.Image) -> Seen:
    """Run the model on an image and keep what the page shows.

    Raises:
        ValueError: if the image processor makes of the image what the model cannot take.
    """
    pixels, layout = preprocess([image], subject.preprocess), subject.layout
    grid = subject.grid(pixels)

    def attention(_: int, call: AttentionCall) -> Tensor:
        return layout.attention_to_patches(call.probabilities(layout.num_prefix)[0], grid).cpu()

    def norms(_: int, hidden: Tensor) -> Tensor:
        return patch_norms(hidden, layout)[0].unflatten(0, grid).cpu()

    recorded = read(subject, pixels, Readers(hidden=norms, attention=attention))
    return Seen(
        as_seen(pixels, subject.preprocess)[0],
        classes_of(subject, pixels),
        tuple(subject.anatomy.prefix_names),
        torch.stack(recorded.attention),
        torch.stack(recorded.hidden[1:]),  # the first is what the first layer gets
    )


def classes_of(subject: Subject, pixels: Tensor) -> dict[str, float] | None:
    """Probability per class, the likeliest first; None for a model without a classification head."""
    if not type(subject.model).__name__.endswith("ForImageClassification"):
        return None
    config: Any = subject.model.config
    logits = classify(subject, pixels)[0].float()
    several = config.problem_type == "multi_label_classification" or len(logits) == 1
    probabilities, order = (logits.sigmoid() if several else logits.softmax(dim=0)).sort(descending=True)
    classes: dict[str, float] = {}
    for index, probability in zip(order.tolist(), probabilities.tolist(), strict=True):
        classes.setdefault(config.id2label[index], probability)  # ImageNet has two classes called "crane"
    return classes


# ---- what the page says of it --------------------------------------------------------------------------------------


def attention_html(seen: Seen, layer: int, head: int) -> str:
    """What CLS and each register attend to in a layer, from 1, by one head, from 1, or 0 for the mean of heads."""
    if not seen.names:
        return "<h2>Attention</h2><p>This model has neither CLS nor registers whose attention could be drawn.</p>"
    maps, heads = seen.maps(layer, head), seen.attention.shape[1]
    which = f"head {head} of {heads}" if head else f"mean of {heads} heads"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.png"
        if head:
            columns = [(name, values[None], "inferno") for name, values in zip(seen.names, maps, strict=True)]
            label = f"attention to a patch\n(probability, {which})"
            map_sheet(columns, seen.image[None], path, captions=[""], title="", label=label)
        else:
            attention_overlay(seen.image, maps, token_names=seen.names, title="").save(path)
        picture = figure(path, f"What {', '.join(seen.names)} attend to in layer {layer}, {which}")
    shares = ", ".join(f"{name} {values.sum():.0%}" for name, values in zip(seen.names, maps, strict=True))
    return f"""<h2>What CLS and registers attend to: layer {layer} of {len(seen.attention)}, {which}</h2>
        <div class='seen'>{picture}<div>Of its attention each token spends on patches: {shares}. The rest goes to CLS
        and registers. Attention is a probability: that of a token adds up to 100 %.</div></div>"""


def norms_html(seen: Seen, layer: int) -> str:
    """How long the patch tokens are after a layer, from 1, and which of them are outliers."""
    norms = seen.norms[layer - 1].numpy()
    limit, median, largest = cutoff(norms.ravel()), float(np.median(norms)), float(norms.max())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "norms.png"
        norm_maps(seen.image[None], norms[None], limit, path, captions=[""], title="")
        picture = figure(path, f"Norm of each patch token after layer {layer}, and patches above the cutoff", "narrow")
    return f"""<h2>Patch norms: after layer {layer} of {len(seen.norms)}</h2><div class='seen'>{picture}<div>
        <p><b>Outliers: {(norms > limit).sum()} of {norms.size} patches.</b> An outlier has a norm above {limit:.3g},
        {CUTOFF_RULES["median"]:g} times the median of this image ({median:.3g}). The largest norm is {largest:.3g},
        {largest / median:.2g} times the median.</p>
        <p>The norm of a patch is the length (L2) of its token, in units of the model. Large models trained without
        registers overwrite a few patches, mostly of background, whose norms are then many times those of the others:
        the artifacts that registers remove.</p></div></div>"""


def figure(path: Path, description: str, kind: str = "") -> str:
    """A PNG inside the page, with a description for those who do not see it."""
    source = f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
    return f"<figure class='{kind}'><img src='{source}' alt='{html.escape(description)}'></figure>"


def facts(subject: Subject, seen: Seen) -> str:
    """The model in one paragraph."""
    (height, width), (layers, heads) = subject.layout.patch_size, seen.attention.shape[:2]
    weights = sum(parameter.numel() for parameter in subject.model.parameters())
    registers = sum(name.startswith("register") for name in seen.names)
    prefix = [*seen.names[: len(seen.names) - registers], f"{registers} registers"]
    tokens = f"{', '.join(prefix)} and {seen.norms[0].numel()} patches"
    return (
        f"**{subject.name}**: {layers} layers of {heads} attention heads, {weights:,} parameters. Tokens: {tokens} of "
        f"{height} x {width} pixels, for images that it sees at {seen.image.shape[0]} x {seen.image.shape[1]}."
    )


# ---- the page ------------------------------------------------------------------------------------------------------


def page(subject: Subject, examples: Sequence[Path]) -> Any:
    """The page of one model, as `gradio.Blocks`, with images to click."""
    import gradio as gr  # here, so that everything above does without

    grey = look(subject, PIL.Image.new("RGB", (256, 256), "grey"))  # counts layers and heads; a bad model fails here
    layers, heads = grey.attention.shape[:2]

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        seen = gr.State()
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                upload = gr.Image(label="Image", sources=["upload", "clipboard"], height=250, elem_id="upload")
                button = gr.Button("Analyse", variant="primary")
                message = gr.HTML(START)
            with gr.Column(scale=3, min_width=320):
                gr.Markdown(facts(subject, grey))
                files = [[str(file)] for file in examples]
                clickable = gr.Examples(files, upload, label="Or click an example", visible=bool(files))
            with gr.Column(scale=3, min_width=320):
                label = f"The {TOP_CLASSES} likeliest classes, with probabilities"
                classes = gr.Label(label=label, num_top_classes=TOP_CLASSES)
        with gr.Row():
            layer = gr.Slider(1, layers, value=layers, step=1, label="Layer", info="of attention and norms")
            choices = [("mean of heads", 0), *((f"head {head}", head) for head in range(1, heads + 1))]
            head = gr.Dropdown(choices, value=0, label="Attention head", info="one, or the mean of all")
        attention, norms = gr.HTML(), gr.HTML()

        def analyse(upload: dict[str, Any] | None) -> tuple[str, Any, Seen | None]:
            return answer(subject, upload)

        pictures: dict[str, Any] = {"fn": drawn, "inputs": [seen, layer, head], "outputs": [attention, norms]}
        for start in (button.click, clickable.load_input_event.then):
            # Without preprocessing: Gradio would decode the file, and a broken one would end in a traceback. It still
            # refuses paths of files that were not uploaded.
            analysed = start(analyse, upload, [message, classes, seen], preprocess=False, concurrency_id="model")
            analysed.then(**pictures)
        for control in (layer, head):
            control.change(**pictures, trigger_mode="always_last", show_progress="hidden")
    return blocks


def answer(subject: Subject, upload: dict[str, Any] | None) -> tuple[str, dict[str, float] | str | None, Seen | None]:
    """What to tell of an upload, as HTML; its classes; and all that there is to draw, None if there is an error."""
    try:
        seen = look(subject, opened(upload))
    except ValueError as error:
        return f"<p class='alert' role='alert'>{html.escape(str(error))}</p>", None, None
    return DONE, seen.classes or "no classification head", seen


def opened(upload: dict[str, Any] | None) -> PIL.Image.Image:
    """The image that was uploaded.

    Raises:
        ValueError: with the name that the file had where it came from, if there is none or it cannot be read.
    """
    if not upload or not upload.get("path"):
        raise ValueError("Expected an image, got none: choose one, or click an example")
    try:
        return open_upright(Path(upload["path"]))
    except ValueError as error:
        raise ValueError(str(error).replace(upload["path"], upload.get("orig_name") or "the upload")) from error


def drawn(seen: Seen | None, layer: float, head: int) -> tuple[str, str]:
    """Attention and norms as HTML; nothing as long as there is nothing to draw."""
    return (attention_html(seen, int(layer), head), norms_html(seen, int(layer))) if seen else ("", "")


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve its page until interrupted."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
        page(options.subject, options.examples).launch(
            server_name=HOST,
            server_port=options.port,
            share=options.share == "on",
            max_file_size=LARGEST_UPLOAD,
            css=STYLE,
            footer_links=[],
            ssr_mode=False,  # which would need Node.js
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line, with what it names: the model as `subject`, the files as `examples`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="outputs/digits", help="folder of a trained model, or its Hub id")
    parser.add_argument("--images_dir", help="folder of images to click; default: held_out in that of the model")
    parser.add_argument("--port", type=int, default=7860, help="port of the page on this machine")
    parser.add_argument("--share", choices=("on", "off"), default="off", help="on: also a public address, by Gradio")
    options = parser.parse_args(argv)
    if not 1 <= options.port <= 65535:
        parser.error(f"expected --port from 1 to 65535, got {options.port}")
    try:
        socket.create_server((HOST, options.port)).close()
    except OSError as error:
        parser.error(f"expected a free port in --port, got {options.port}: {error.strerror}")
    folder = Path(options.model_dir)
    if folder.exists() and not (folder / "config.json").is_file():
        parser.error(f"expected a folder with a trained model in --model_dir, got {options.model_dir!r}")
    held_out = folder / "held_out"
    images = options.images_dir or (held_out if held_out.is_dir() else None)
    try:
        options.examples = find_images(images).first(EXAMPLES).files if images else ()
        options.subject = load_vision(options.model_dir)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(
            f"expected a trained model in --model_dir, a folder or Hub id, got {options.model_dir!r}: {error}"
        )
    return options


if __name__ == "__main__":
    main()
