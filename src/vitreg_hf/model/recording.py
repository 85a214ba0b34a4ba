# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Recording of hidden states and attention, by the hooks that Transformers installs for its `capture_outputs`.

Installed when first needed, these hooks would take a lock that `torch.compile` cannot trace, so they are installed
when a model is made. What follows from that is settled here: another model around this one that installs them again,
and pickling, since they are local functions.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

_HOOK = "output_capturing_hook"


def _key(hook: Any) -> str | None:
    """What a hook records, or None if it is another kind of hook."""
    if getattr(hook, "__name__", None) != _HOOK:
        return None
    names = hook.__code__.co_freevars
    return hook.__closure__[names.index("key")].cell_contents


def selected(asked: bool | int | Sequence[int], count: int, name: str) -> set[int]:
    """Indices of the layers that an argument `name` asks for: all or none, one, or some of them, of `count`."""
    if isinstance(asked, bool):
        return set(range(count)) if asked else set()
    listed = [asked] if isinstance(asked, int) else asked
    if not all(-count <= layer < count for layer in listed):
        raise ValueError(f"Expected layers from {-count} to {count - 1} in {name}, got {list(listed)}")
    return {layer % count for layer in listed}


def aligned(recorded: Sequence[Tensor] | None, layers: set[int], count: int) -> tuple[Tensor | None, ...] | None:
    """One entry per layer, so that an index is a layer; None where the layer was not asked for."""
    if not recorded:
        return None
    entries = iter(recorded)
    return tuple(next(entries) if index in layers else None for index in range(count))


class RecordedModule(nn.Module):
    """A module whose output is recorded; it is pickled and copied without the hooks that do so."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        hooks = state["_forward_hooks"]
        state["_forward_hooks"] = type(hooks)((number, hook) for number, hook in hooks.items() if _key(hook) is None)
        return state

    def keep_one_hook_per_output(self) -> None:
        """Remove recording hooks that stand here twice, which would record everything twice."""
        seen = set()
        for number, hook in list(self._forward_hooks.items()):
            key = _key(hook)
            if key in seen:
                del self._forward_hooks[number]
            elif key is not None:
                seen.add(key)


def is_watched_inside(model: nn.Module) -> bool:
    """Whether somebody sees what modules of a model take or give, other than by asking the model for it."""
    return any(
        module._forward_pre_hooks or any(_key(hook) is None for hook in module._forward_hooks.values())
        for module in model.modules()
    )


class RecordingMixin:
    """For a model whose modules are recorded: hooks from the start, once each, also in copies.

    Transformers marks a model when it has installed the hooks on it. A model with recorded outputs of its own that
    contains this one installs them once more and marks it again, which is when the second ones are removed.
    """

    def post_init(self) -> None:
        """Finish making the model."""
        super().post_init()  # type: ignore[misc]
        maybe_install_capturing_hooks(self)  # type: ignore[arg-type]

    @property
    def _output_capturing_hooks_installed(self) -> bool:
        return self.__dict__.get("_hooks_installed", False)

    @_output_capturing_hooks_installed.setter
    def _output_capturing_hooks_installed(self, installed: bool) -> None:
        self.__dict__["_hooks_installed"] = installed
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, RecordedModule):
                module.keep_one_hook_per_output()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_hooks_installed": False})  # type: ignore[misc]
        maybe_install_capturing_hooks(self)  # type: ignore[arg-type]
