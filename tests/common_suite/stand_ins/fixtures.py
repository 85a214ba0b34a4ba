"""Stands in for `utils/fetch_hub_objects_for_ci.py`: pictures drawn here, instead of fetched from the Hub.

The mixins ask for a photograph (`.jpg`) to compare the processor backends on, and for label maps (`.png`).
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 480, 640
_FOLDER = Path(__file__).resolve().parent / "pictures"


def url_to_local_path(url: str, return_url_if_not_found: bool = True) -> str:
    """A file with a picture for this address; the same address gives the same picture."""
    path = _FOLDER / url.rpartition("/")[2]
    if not path.is_file():
        _FOLDER.mkdir(exist_ok=True)
        picture = _label_map() if path.suffix == ".png" else _photograph()
        # Several processes may draw it at once: each its own file, renamed when complete.
        handle, name = tempfile.mkstemp(dir=_FOLDER, suffix=path.suffix)
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG" if path.suffix == ".png" else "JPEG", quality=95)
        os.replace(name, path)
    return str(path)


def _photograph() -> Image.Image:
    """Soft waves of different lengths in three colours, and a disc with a sharp edge."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / 100.0
    red = np.sin(2.1 * x + 0.7 * y)
    green = np.sin(0.9 * x - 3.3 * y + 1.0) * np.cos(1.7 * x)
    blue = np.cos(4.7 * np.hypot(x - 2.0, y - 3.0))
    colours = np.stack([red, green, blue], axis=-1)
    colours[np.hypot(x - 4.5, y - 1.5) < 0.8] *= -0.5
    return Image.fromarray(np.uint8(127.5 + 120.0 * colours))


def _label_map() -> Image.Image:
    """Class indices from 0 to 149 in 30 x 40 pixel blocks."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.uint8((y // 30 * 16 + x // 40) % 150))
