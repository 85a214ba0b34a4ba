# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What kind of token stands where: in a text, and in the sequence of a Vision Transformer.

Shapes: B inputs, N tokens, P patches, K kinds. `token_mask` `(B, N)` is True for real tokens, not padding.
"""

import unicodedata
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class TextKind(IntEnum):
    """Kinds of text tokens that attention sinks are known to sit on, and the rest."""

    CLS = 0
    SEP = 1
    FIRST = 2  # the first token of a causal model whatever it is, and BOS wherever it stands
    PUNCTUATION = 3
    NEWLINE = 4  # line breaks and nothing else: delimiters, but not punctuation to Unicode
    OTHER = 5
    PADDING = 6


class VisionKind(IntEnum):
    """Kinds of tokens of a Vision Transformer."""

    CLS = 0
    REGISTER = 1
    OUTLIER_PATCH = 2
    NORMAL_PATCH = 3


def kinds_of(
    token_strings: Sequence[Sequence[str]],
    *,
    causal: bool,
    cls: str | None = None,
    sep: str | None = None,
    bos: str | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Kind of every token of a batch of texts.

    A string that names several kinds (RoBERTa's CLS is its BOS) counts as the first of CLS, SEP, FIRST.

    Args:
        token_strings: the tokens of each text as the vocabulary spells them, with the markers of WordPiece (`##`),
            byte-level BPE (`Ġ`, `Ċ`) or SentencePiece (`▁`). Shorter texts are filled up on the right.
        causal: whether the first real token of every text is `FIRST`, as it is where no token sees a later one.
        cls: spelling of the class token, None if the vocabulary has none.
        sep: spelling of the separator, None if the vocabulary has none.
        bos: spelling of the token that begins a text, None if the vocabulary has none.
        token_mask: `(B, N)`, True for real tokens, N the length of the longest text. Without it every string given is
            real: a padding token cannot be told by its spelling, which is often that of the end of a text.

    Returns:
        `TextKind` of each token, int64 `(B, N)`.

    Raises:
        ValueError: if there is no token, if CLS and SEP are spelled alike, if `token_mask` is no boolean `(B, N)`, or
            calls a token real that a shorter text does not have.
    """
    length = max((len(tokens) for tokens in token_strings), default=0)
    if length == 0:
        raise ValueError("Expected at least one token, got none")
    if cls is not None and cls == sep:
        raise ValueError(f"Expected different spellings of CLS and SEP, got {cls!r} for both")
    given = torch.tensor([[i < len(tokens) for i in range(length)] for tokens in token_strings])
    real = given if token_mask is None else _checked(token_mask, given)
    special = {bos: TextKind.FIRST, sep: TextKind.SEP, cls: TextKind.CLS}  # of equal spellings the last one stays
    kinds = torch.full(given.shape, TextKind.PADDING, dtype=torch.int64)
    for row, tokens in enumerate(token_strings):
        places = real[row].nonzero().flatten().tolist()
        for place in places:
            kinds[row, place] = special.get(tokens[place], _kind_of_text(tokens[place]))
        if causal and places and kinds[row, places[0]] not in (TextKind.CLS, TextKind.SEP):
            kinds[row, places[0]] = TextKind.FIRST
    return kinds


def _checked(token_mask: Tensor, given: Tensor) -> Tensor:
    if token_mask.shape != given.shape or token_mask.dtype != torch.bool:
        got = f"{token_mask.dtype} {tuple(token_mask.shape)}"
        raise ValueError(f"Expected a boolean token_mask {tuple(given.shape)}, got {got}")
    real = token_mask.cpu()
    if bool((real & ~given).any()):
        raise ValueError("Expected real tokens only where a text has one, got True past the end of a text")
    return real


def _kind_of_text(token: str) -> TextKind:
    text = _readable(token)
    visible = "".join(text.split())
    if not visible:
        return TextKind.NEWLINE if "\n" in text or "\r" in text else TextKind.OTHER
    punctuation = all(unicodedata.category(character).startswith("P") for character in visible)
    return TextKind.PUNCTUATION if punctuation else TextKind.OTHER


# Byte-level BPE spells each byte as one character: printable ones as themselves, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER_BYTES = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHER_BYTES)}


def _readable(token: str) -> str:
    """The text that a token stands for.

    The style needs no telling: a word of another style that is valid UTF-8 when read as bytes is all ASCII and stays
    as it is, but for mojibake.
    """
    if token == "<0x0A>":  # SentencePiece's byte for a line break
        return "\n"
    if token.startswith("##") and len(token) > 2:
        return token[2:]
    if all(character in _BYTE_OF for character in token):
        try:
            return bytes(_BYTE_OF[character] for character in token).decode("utf-8")
        except UnicodeDecodeError:
            return token
    return token.replace("▁", " ")


def vision_kinds(num_cls: int, num_registers: int, outlier_mask: Tensor) -> Tensor:
    """Kind of every token of a Vision Transformer whose order is `[CLS][registers][patches]`.

    Args:
        num_cls: 1, or 0 for a model without CLS.
        num_registers: trained and test-time registers together.
        outlier_mask: `(B, P)`, True for patches that carry an artifact, row-major.

    Returns:
        `VisionKind` of each token, int64 `(B, num_cls + num_registers + P)`.

    Raises:
        ValueError: if a count is negative, or the mask is no boolean `(B, P)`.
    """
    if num_cls < 0 or num_registers < 0:
        raise ValueError(f"Expected counts of 0 or more, got {num_cls} CLS and {num_registers} registers")
    if outlier_mask.ndim != 2 or outlier_mask.dtype != torch.bool:
        raise ValueError(f"Expected a boolean mask (B, P), got {outlier_mask.dtype} {tuple(outlier_mask.shape)}")
    patches = torch.full_like(outlier_mask, VisionKind.NORMAL_PATCH, dtype=torch.int64)
    patches = patches.masked_fill(outlier_mask, VisionKind.OUTLIER_PATCH)
    cls = patches.new_full((len(patches), num_cls), VisionKind.CLS)
    registers = patches.new_full((len(patches), num_registers), VisionKind.REGISTER)
    return torch.cat([cls, registers, patches], dim=1)


# Real tokens and their kinds in sums


def real_tokens(token_mask: Tensor | None, like: Tensor, num_tokens: int) -> Tensor:
    """The mask of real tokens `(B, N)`, checked, on the device of `like` `(B, ...)`; all are real if it is None.

    Raises:
        ValueError: if there is no input, the mask is no boolean `(B, N)`, or an input has no real token.
    """
    shape = (len(like), num_tokens)
    if 0 in shape:
        raise ValueError(f"Expected at least one input of at least one token, got shape {tuple(like.shape)}")
    if token_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    if token_mask.shape != shape or token_mask.dtype != torch.bool:
        raise ValueError(f"Expected a boolean token_mask {shape}, got {token_mask.dtype} {tuple(token_mask.shape)}")
    if not bool(token_mask.any(dim=1).all()):
        raise ValueError("Expected a real token in every input, got an input of padding alone")
    return token_mask.to(like.device)


def one_hot_kinds(kinds: Tensor, num_kinds: int, real: Tensor) -> Tensor:
    """Which kind each token is, int64 0 or 1 `(B, N, K)`, all 0 at padding; ValueError for wrong `kinds`."""
    if kinds.shape != real.shape or kinds.is_floating_point():
        raise ValueError(f"Expected integer kinds {tuple(real.shape)}, got {kinds.dtype} {tuple(kinds.shape)}")
    known = kinds.to(real.device).long().masked_fill(~real, 0)
    if bool(((known < 0) | (known >= num_kinds)).any()):
        raise ValueError(f"Expected kinds from 0 to {num_kinds - 1}, got {known.min().item()} to {known.max().item()}")
    return one_hot(known, num_kinds) * real[..., None]


def count_by_kind(per_token: Tensor, kinds: Tensor, num_kinds: int, token_mask: Tensor | None = None) -> Tensor:
    """Add up what is counted per token `(B, N)` for each kind of token.

    Args:
        per_token: such as the outliers in each token; ones, to count the tokens themselves.
        kinds: kind of each token, integers `(B, N)` from 0 to `num_kinds - 1`; at padding they are not looked at.
        num_kinds: K.
        token_mask: `(B, N)`. None: all tokens are real.

    Returns:
        Integers `(B, K)`.

    Raises:
        ValueError: if a shape differs, a kind is out of range, or for a wrong `token_mask`.
    """
    if per_token.ndim != 2:
        raise ValueError(f"Expected counts per token (B, N), got shape {tuple(per_token.shape)}")
    real = real_tokens(token_mask, per_token, per_token.shape[1])
    return (one_hot_kinds(kinds, num_kinds, real) * per_token.long()[..., None]).sum(dim=1)
