# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What the two image processors of the family share: reading images, geometry, label maps, padding, predicted maps.

Shapes: C channels, H height, W width of an image, in pixels. From `read_image` on every image is channels-first,
`(C, H, W)`, either uint8 grey levels 0..255 or float32 in whatever range the caller chose.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    infer_channel_dimension_format,
    load_image,
)

from .patch_budget import PatchBudget
from .processor_checks import MOST_MAGNITUDE, check_extent, check_file_size

IGNORED_LABEL = 255
LEVELS_16_TO_8_BIT = 257  # 65535 / 255: scales the full 16 bit range onto the full 8 bit range


# ---- reading -------------------------------------------------------------------------------------------------------


def open_image(source: str | os.PathLike[str]) -> PIL.Image.Image:
    """Open a file, a URL or base64 data. A file keeps its mode and gets its EXIF orientation applied.

    Raises:
        ValueError: if a file is missing, cannot be decoded or has more pixels than Pillow takes for safe
            (`PIL.Image.MAX_IMAGE_PIXELS`), a URL cannot be read, or the text is neither a path nor base64.
    """
    text = os.fspath(source)
    if not text.startswith(("http://", "https://", "data:image/")) and os.path.exists(text):
        return _open_file(text)
    try:
        image = load_image(text)  # base64 without a header is the only other thing left
        check_file_size(image)
        return image
    except Exception as error:  # of the network, of Pillow, or of Transformers, which repeats the whole text
        shown = text if len(text) < 300 else f"{text[:300]}..."
        reason = str(error.__context__ or error)[:300]
        raise ValueError(f"expected an existing image file, a URL or base64 data, got {shown!r}: {reason}") from error


def _open_file(path: str) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            check_file_size(image)
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more on broken data
        raise ValueError(f"expected a readable image file, got {path!r}: {error}") from error


def flatten_images(images: Any, image_ndim: int) -> list[Any]:
    """Flatten nested lists, and split arrays of `image_ndim + 1` dimensions (batches), into a list of single images.

    Raises:
        ValueError: if a leaf is no PIL image, numpy array or torch tensor.
    """
    if isinstance(images, (list, tuple)):
        return [leaf for item in images for leaf in flatten_images(item, image_ndim)]
    if isinstance(images, PIL.Image.Image):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == image_ndim + 1 else [images]
    raise ValueError(
        f"expected a PIL image, array, tensor, path or URL, or lists of them, got {type(images).__name__}"
    )


def read_image(image: Any, do_convert_rgb: bool, input_data_format: str | ChannelDimension | None = None) -> Tensor:
    """Turn a PIL image, numpy array or torch tensor into a contiguous channels-first tensor `(C, H, W)`.

    Args:
        image: any PIL mode, or `(H, W)`, `(H, W, C)` or `(C, H, W)` values: 8 or 16 bit integers, booleans, floats.
        do_convert_rgb: bring PIL images and arrays of 1 and 4 (alpha last) channels to 3; others stay as they are.
        input_data_format: where the channels of a three-dimensional array are; inferred if `None`.

    Returns:
        uint8 grey levels, or float32 for float arrays, on the device the image was on.

    Raises:
        ValueError: if values or dimensions do not fit, or a PIL image has more pixels than Pillow takes for safe.
    """
    if isinstance(image, PIL.Image.Image):
        check_file_size(image)
        pixels, input_data_format = torch.from_numpy(_pil_pixels(image, do_convert_rgb)), ChannelDimension.LAST
    else:
        pixels = _as_tensor(image)
    if 0 in pixels.shape:
        raise ValueError(f"expected an image with pixels, got shape {tuple(pixels.shape)}")
    pixels = _channels_first(_as_levels(pixels), input_data_format)
    return (_to_rgb(pixels) if do_convert_rgb else pixels).contiguous()


def _pil_pixels(image: PIL.Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """Pixels of any PIL mode as uint8 `(H, W)` or `(H, W, C)`; transparency stays a fourth channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_levels(image)
    colours = "RGBA" if image.has_transparency_data else "RGB"
    # an image that is not to be converted keeps its own channels, but palette indices are no intensities
    own_channels = {"1": "L", "P": colours, "PA": colours}.get(image.mode, image.mode)
    mode = colours if do_convert_rgb else own_channels
    return np.array(image if image.mode == mode else image.convert(mode))


def _grey_levels(image: PIL.Image.Image) -> np.ndarray:
    """8 bit grey levels `(H, W)` of a 16 bit ("I;16", "I") or float ("F") image; Pillow itself would clip them."""
    values = np.array(image)
    step = 1 if image.mode == "F" else LEVELS_16_TO_8_BIT
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255 * step):
        raise ValueError(f"expected values 0..{255 * step} in a PIL image of mode {image.mode!r}, got {low}..{high}")
    levels = np.rint(values / step).astype(np.uint8)
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return levels


def _as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """A tensor over the same memory where torch can have it: writable, native byte order, positive strides."""
    if isinstance(array, Tensor):
        return array.detach()
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _as_levels(values: Tensor) -> Tensor:
    """Bring integers and booleans to uint8 levels and floats to float32, without ever clipping."""
    if values.dtype == torch.uint8:
        return values
    if values.is_floating_point():
        if not bool((values.abs() <= MOST_MAGNITUDE).all()):  # not true of NaN either
            raise ValueError(f"expected finite pixel values of at most {MOST_MAGNITUDE:g}, got others")
        return values.to(torch.float32)
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.dtype == torch.uint16:
        return (values.to(torch.float32) / LEVELS_16_TO_8_BIT).round().to(torch.uint8)
    wide = values.to(torch.int64)  # torch cannot compare uint32
    low, high = wide.min().item(), wide.max().item()
    if low < 0 or high > 255:
        raise ValueError(f"expected {values.dtype} pixels in 0..255, got {low}..{high}; 16 bit data must be uint16")
    return values.to(torch.uint8)


def _channels_first(pixels: Tensor, data_format: str | ChannelDimension | None) -> Tensor:
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ValueError(f"expected an image of 2 or 3 dimensions, got shape {tuple(pixels.shape)}")
    if data_format is None:
        data_format = _guess_data_format(pixels)
    return pixels.movedim(-1, 0) if ChannelDimension(data_format) == ChannelDimension.LAST else pixels


def _guess_data_format(pixels: Tensor) -> ChannelDimension:
    """Transformers' rule for 1, 3 and 4 channels; for any other count the smaller of the outer axes."""
    first, last = pixels.shape[0], pixels.shape[-1]
    if {first, last} & {1, 3, 4}:
        return infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))  # type: ignore[arg-type]  # reads the shape
    return ChannelDimension.FIRST if first <= last else ChannelDimension.LAST


def _to_rgb(pixels: Tensor) -> Tensor:
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    return _over_white(pixels) if pixels.shape[0] == 4 else pixels


def _over_white(rgba: Tensor) -> Tensor:
    """Composite `(4, H, W)` with straight alpha over white: `(3, H, W)` of the same dtype."""
    eight_bit = rgba.dtype == torch.uint8
    if not eight_bit and not (rgba.min() >= 0 and rgba.max() <= 1):
        raise ValueError(f"expected float RGBA values in 0..1, got {rgba.min().item()}..{rgba.max().item()}")
    white = 255.0 if eight_bit else 1.0
    alpha = rgba[3:].float() / white
    blended = rgba[:3].float() * alpha + white * (1 - alpha)
    return blended.round().to(torch.uint8) if eight_bit else blended


def read_label_map(source: Any) -> Tensor:
    """Class indices of a segmentation map as int64 `(H, W)`: palette indices and 16 bit values are kept as they are.

    Raises:
        ValueError: if the map has more than one channel or no integer values.
    """
    if isinstance(source, PIL.Image.Image):
        check_file_size(source)
    values = _as_tensor(np.array(source) if isinstance(source, PIL.Image.Image) else source)
    if values.ndim != 2 or values.is_floating_point():
        raise ValueError(
            f"expected a segmentation map of integers with one channel, got {values.dtype} {tuple(values.shape)}"
        )
    return values.to(torch.int64)


# ---- geometry ------------------------------------------------------------------------------------------------------


def resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Height and width after resizing to `size`: a shortest edge (and perhaps a longest), a box, a fixed size, or a
    budget of patches.

    Raises:
        ValueError: if `size` has none of these, or the image would have no pixels or too many.
    """
    if isinstance(size, PatchBudget):
        resized = size.of(height, width)
    elif size.shortest_edge:
        resized = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    elif size.max_height and size.max_width:
        resized = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    elif size.height and size.width:
        resized = size.height, size.width
    else:
        raise ValueError(
            f"expected size with shortest_edge, height and width, or max_height and max_width, got {size}"
        )
    return check_extent(f"a resized image (it has {height} x {width} pixels)", *resized)


def resize_nearest(image: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour resize of `(..., H, W)` in integer arithmetic: Pillow and torch break ties differently."""
    rows = (2 * torch.arange(height, device=image.device) + 1) * image.shape[-2] // (2 * height)
    columns = (2 * torch.arange(width, device=image.device) + 1) * image.shape[-1] // (2 * width)
    return image[..., rows[:, None], columns]


def resize_with_pillow(
    channels: np.ndarray, height: int, width: int, resample: PILImageResampling, reducing_gap: float | None = None
) -> np.ndarray:
    """Resize `(C, H, W)` one channel after the other, so that any channel count works and floats stay floats."""
    images = [PIL.Image.fromarray(channel) for channel in channels]
    resized = [image.resize((width, height), resample, reducing_gap=reducing_gap) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def center_crop(image: Tensor, size: SizeDict, fill: int = 0) -> Tensor:
    """Crop `(..., H, W)` to the middle `size`; an edge that is too short is first padded with `fill`, evenly."""
    if not (size.height and size.width):
        raise ValueError(f"expected crop_size with height and width, got {size}")
    check_extent("a crop", size.height, size.width)
    missing_rows, missing_columns = max(size.height - image.shape[-2], 0), max(size.width - image.shape[-1], 0)
    left, top = missing_columns // 2, missing_rows // 2
    image = F.pad(image, (left, missing_columns - left, top, missing_rows - top), value=fill)
    top, left = (image.shape[-2] - size.height) // 2, (image.shape[-1] - size.width) // 2
    return image[..., top : top + size.height, left : left + size.width]


def padded_size(
    sizes: Sequence[tuple[int, int]], pad_size: SizeDict | None, size_divisor: int | None
) -> tuple[int, int]:
    """Height and width a batch of images of `sizes` is padded to: `pad_size` or the largest, rounded up."""
    height, width = (max(edges) for edges in zip(*sizes, strict=True))
    if pad_size is not None:
        if not (pad_size.height and pad_size.width):
            raise ValueError(f"expected pad_size with height and width, got {pad_size}")
        height, width = pad_size.height, pad_size.width
    step = size_divisor or 1
    return check_extent("a padded image", -(-height // step) * step, -(-width // step) * step)


def fit_label_map(
    labels: Tensor, do_reduce_labels: bool, do_resize: bool, size: SizeDict, do_center_crop: bool, crop_size: SizeDict
) -> Tensor:
    """Take a label map `(H, W)` the way of its image: nearest resize, then crop, the ignored label outside the image.

    With `do_reduce_labels` labels are first lowered by one; 0, the background, becomes the ignored label, which stays.
    """
    if do_reduce_labels:
        labels = torch.where((labels == 0) | (labels == IGNORED_LABEL), IGNORED_LABEL, labels - 1)
    if do_resize:
        labels = resize_nearest(labels, *resized_size(labels.shape[0], labels.shape[1], size))
    return center_crop(labels, crop_size, fill=IGNORED_LABEL) if do_center_crop else labels


def pad_label_map(labels: Tensor, height: int, width: int) -> Tensor:
    """Pad a label map `(H, W)` on the right and at the bottom with the ignored label."""
    return F.pad(labels, (0, width - labels.shape[-1], 0, height - labels.shape[-2]), value=IGNORED_LABEL)


def like(image: np.ndarray | Tensor, labels: Tensor) -> np.ndarray | Tensor:
    """Labels as what the image is: a numpy array, or a tensor on the same device."""
    return labels.to(image.device) if isinstance(image, Tensor) else labels.numpy()


# ---- predicted maps ------------------------------------------------------------------------------------------------


def segmentation_scores(
    logits: Tensor, target_sizes: Sequence[Any] | Tensor | None, pixel_mask: Tensor | np.ndarray | None
) -> list[Tensor]:
    """Logits of each image, float32 `(labels, height, width)`, without padding and resized to its target size.

    Args:
        logits: `(batch, labels, h, w)`.
        target_sizes: (height, width) per image; `None` keeps the resolution of the logits.
        pixel_mask: `(batch, H, W)`, nonzero on the image; `None` if the batch was not padded.

    Raises:
        ValueError: if there are not as many target sizes or masks as images.
    """
    for name, given in (("target_sizes", target_sizes), ("pixel_mask", pixel_mask)):
        if given is not None and len(given) != len(logits):
            raise ValueError(f"expected {len(logits)} {name}, one per image of the logits, got {len(given)}")
    targets = [None] * len(logits) if target_sizes is None else target_sizes
    masks = [None] * len(logits) if pixel_mask is None else torch.as_tensor(pixel_mask).bool()
    return [_upsample(*one_image) for one_image in zip(logits, targets, masks, strict=True)]


def _upsample(logits: Tensor, target_size: Any, mask: Tensor | None) -> Tensor:
    """Cut `(labels, h, w)` to what the mask shows, then resize bilinearly (`align_corners=False`)."""
    rows, columns = logits.shape[-2:] if mask is None else _shown(logits, mask)
    logits = logits[:, : math.ceil(rows), : math.ceil(columns)].float()
    if target_size is None:
        return logits
    height, width = check_extent("a segmentation map", *(int(edge) for edge in target_size))
    # grid_sample rather than interpolate: the image may end inside the last row or column of logits
    y = (torch.arange(height, device=logits.device) + 0.5) * (2 * rows / height / logits.shape[-2]) - 1
    x = (torch.arange(width, device=logits.device) + 0.5) * (2 * columns / width / logits.shape[-1]) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(logits[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


def _shown(logits: Tensor, mask: Tensor) -> tuple[float, float]:
    """Rows and columns of the logits that the image in the top left of the mask takes up, fractions included."""
    height, width = int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())
    return height * logits.shape[-2] / mask.shape[-2], width * logits.shape[-1] / mask.shape[-1]
