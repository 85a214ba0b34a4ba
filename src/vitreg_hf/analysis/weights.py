# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Which weights a number was measured on."""

import hashlib

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A short code that changes with the weights, the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        parameter = parameter.cpu()  # devices add up in different orders
        numbers = parameter.double() if parameter.is_floating_point() else parameter.long()
        digest.update(f"{name} {tuple(parameter.shape)} {numbers.sum().item()} {numbers.abs().sum().item()}".encode())
    return digest.hexdigest()[:16]
