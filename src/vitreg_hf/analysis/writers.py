# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the largest value of the residual stream comes from: token, channel, and the branch that wrote it.

Shapes: N tokens, D channels, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitreg_hf.analysis.channels import largest_ffn_writer, written_by
from vitreg_hf.analysis.extract import Subject, read
from vitreg_hf.analysis.recorder import Readers

_ROUNDING = 0.02  # of the largest value, that sums in 16 bits may be off


@dataclass(frozen=True)
class LargestValue:
    """The largest magnitude of the residual stream of one input.

    Attributes:
        value: signed.
        over_median: its magnitude over the median magnitude of its state.
        state: where it is reached: after this many blocks.
        position, channel: its place.
        ffn_layer: block, from 1, whose FFN does most for it.
        before, attention, ffn: what that block got, and what its two branches added at this place.
        adds_up: whether states are sums of branches there, as in pre-norm blocks; a norm after the sum changes them.
    """

    value: float
    over_median: float
    state: int
    position: int
    channel: int
    ffn_layer: int
    before: float
    attention: float
    ffn: float
    adds_up: bool


def follow_largest(subject: Subject, inputs: Tensor | Mapping[str, Tensor]) -> LargestValue:
    """Find the largest value of the residual stream of one input, and the FFN that does most for it (2402.17762).

    Raises:
        ValueError: if there is more than one input.
    """

    def keep(layer: int, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError(f"Expected one input, got {len(x)}")
        return x.float().cpu()

    recorded = read(subject, inputs, Readers(hidden=keep, attention_update=keep, ffn_update=keep))
    states = torch.stack(recorded.hidden)[:, 0]  # (L + 1, N, D)
    state, token, channel = (int(i) for i in np.unravel_index(int(states.abs().argmax()), tuple(states.shape)))
    triples = zip(recorded.hidden[:-1], recorded.attention_updates, recorded.ffn_updates)
    parts = [written_by(*triple, torch.tensor([[0, token, channel]])) for triple in triples]
    layer, value = int(largest_ffn_writer(parts).layer), states[state, token, channel]
    missing = states[1:, token, channel] - torch.cat([part.after for part in parts])
    return LargestValue(
        value=value.item(),
        over_median=(value.abs() / states[state].abs().median()).item(),
        state=state,
        position=token,
        channel=channel,
        ffn_layer=layer + 1,
        before=parts[layer].before.item(),
        attention=parts[layer].attention.item(),
        ffn=parts[layer].ffn.item(),
        adds_up=bool(missing.abs().max() < _ROUNDING * value.abs()),
    )
