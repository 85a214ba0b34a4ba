# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Which weights a number was measured on."""

import hashlib
from collections.abc import Iterable

from torch import Tensor


def fingerprint(state_dict: Iterable[tuple[str, Tensor]]) -> str:
    """A short code that changes with the weights, the same on every device.

    Args:
        state_dict: names and tensors in the order of the model, as `model.state_dict().items()`.
    """
    digest = hashlib.sha256()
    for name, parameter in state_dict:
        parameter = parameter.cpu()  # devices add up in different orders
        numbers = parameter.double() if parameter.is_floating_point() else parameter.long()
        digest.update(f"{name} {tuple(parameter.shape)} {numbers.sum().item()} {numbers.abs().sum().item()}".encode())
    return digest.hexdigest()[:16]
