# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a pass may do that is watched by nobody: no gradient, no compiler, no hook."""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.modules.module as _of_all  # where hooks of all modules are kept
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

_CACHED_BYTES, _FEWEST_TOKENS = 2**23, 1024  # per thread


def is_tracing() -> bool:
    """Whether this pass is compiled, exported or traced, so that sizes may be symbols and values are unknown."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def are_all_watched() -> bool:
    """Whether hooks of all modules see values. Those with which PyTorch counts operations only follow the modules."""
    hooks = (*_of_all._global_forward_hooks.values(), *_of_all._global_forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks)


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody sees what goes into these modules or comes out of them, or has put something in their place."""
    return are_all_watched() or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)  # Accelerate replaces it
        for module in modules
    )


def is_transformed() -> bool:
    """Whether operations go elsewhere first: to `torch.func`, forward derivatives, or a mode that sees each."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def may_overwrite(values: Tensor, *modules: nn.Module) -> bool:
    """Whether values that these modules have just made may be written over, which on CPUs saves more than the pass:
    memory of this size is asked of the system anew each time, which fills it with zeros first."""
    return not (values.requires_grad or is_tracing() or is_transformed() or is_watched(*modules))


def in_cache(batch_size: int, num_tokens: int, bytes_per_token: int) -> int:
    """How many images of a batch a CPU should take at once, so that what a block makes of them stays in its caches and
    in memory that it has already: about 8 MB per thread, or a thousand tokens, below which matrix products get slower.
    In pieces of nearly one size."""
    tokens = max(_CACHED_BYTES // bytes_per_token, _FEWEST_TOKENS) * torch.get_num_threads()
    pieces = -(-batch_size // max(round(tokens / num_tokens), 1))
    return -(-batch_size // pieces)


def by_pieces(run: Callable[..., Any], inputs: Sequence[Tensor | None], at_once: int) -> dict[str, Any]:
    """The outputs of a pass, by name, on `at_once` images of a batch after the other; every one is a tensor by image.

    Args:
        run: the pass, of whose output the names are the same for all pieces.
        inputs: of the batch, `(B, ...)`, or None.
    """
    pieces = zip(*(repeat(None) if one is None else one.split(at_once) for one in inputs), strict=False)
    outputs = [run(*own) for own in pieces]
    return {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
