# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The command that converts checkpoints of other sources, and back."""

import argparse
from pathlib import Path
from typing import Any

from vitreg_hf.cli.options import add_command, add_overwrite

_DTYPES = ("float32", "float16", "bfloat16")


def add_converting(commands: Any) -> None:
    """Add convert."""
    told = "a checkpoint of another source to ViTReg, or back with --to"
    convert = add_command(commands, "convert", _convert, told, output=False)
    convert.add_argument("source", help="Hub id, folder, .safetensors file, or file of torch.save")
    convert.add_argument("out", type=Path, help="new folder")
    convert.add_argument("--layout", help="layout of the source, where it is not recognised (docs/checkpoints.md)")
    convert.add_argument("--revision", help="branch, tag or commit of a repository")
    convert.add_argument("--head", type=Path, help="file of the linear classifier of a DINOv2 or DINOv3 backbone")
    convert.add_argument("--architecture", help="model of timm, where the source does not name it")
    convert.add_argument(
        "--heads", type=int, help="attention heads, where the source does not say (default: width / 64)"
    )
    convert.add_argument("--eps", type=float, help="epsilon of all norms, where a .pth differs from its layout")
    convert.add_argument("--keep-mask-token", action="store_true", help="for self-supervision, which masks patches")
    convert.add_argument("--dtype", choices=_DTYPES, help="type of the weights (default: that of the source)")
    convert.add_argument(
        "--verify",
        nargs="?",
        type=Path,
        const=True,
        metavar="IMAGES",
        help="before saving, compare with the source's own implementation on images of a folder (default: two photos)",
    )
    convert.add_argument(
        "--to", metavar="LAYOUT", help="the other way: write a ViTReg checkpoint in this layout (docs/checkpoints.md)"
    )
    add_overwrite(convert, "replace OUT as a whole, if it holds a checkpoint and nothing else")


def _convert(options: argparse.Namespace) -> None:
    if options.to is None:
        _from_source(options)
    else:
        _to_source(options)


def _from_source(options: argparse.Namespace) -> None:
    import torch

    from vitreg_hf.conversion.convert import convert_checkpoint, save_conversion
    from vitreg_hf.conversion.writing import check_new

    check_new(options.out, options.overwrite, (options.source, options.head))
    conversion = convert_checkpoint(
        options.source,
        layout=options.layout,
        revision=options.revision,
        head=options.head,
        architecture=options.architecture,
        num_attention_heads=options.heads,
        layer_norm_eps=options.eps,
        use_mask_token=options.keep_mask_token,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    print(conversion.report)
    found = None if options.verify is None else _verified(conversion, options.verify)
    print(f"saved:   {save_conversion(conversion, options.out, options.overwrite, found).folder}")


def _verified(conversion: Any, images: Path | bool) -> dict[str, Any]:
    from vitreg_hf.conversion.verify import images_of, verify_conversion

    found = verify_conversion(conversion, None if isinstance(images, bool) else images_of(images))
    print(found)
    if not found.is_equal:
        raise ValueError(f"Expected the outputs of {found.source}, got others: nothing was saved")
    return found.to_dict()


def _to_source(options: argparse.Namespace) -> None:
    from vitreg_hf.conversion.back import export_checkpoint

    reading_alone = {
        **{"--head": options.head, "--verify": options.verify, "--layout": options.layout, "--eps": options.eps},
        **{"--heads": options.heads, "--keep-mask-token": options.keep_mask_token, "--dtype": options.dtype},
    }
    if told := [name for name, value in reading_alone.items() if value]:
        raise ValueError(f"Expected options that --to reads, got {', '.join(told)}")
    written = export_checkpoint(
        options.source,
        options.out,
        layout=options.to,
        architecture=options.architecture,
        revision=options.revision,
        overwrite=options.overwrite,
    )
    print(f"saved:   {written}")
