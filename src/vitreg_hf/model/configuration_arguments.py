# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a config is made of: arguments of a call, which must be fields, and saved files, checked first."""

import difflib
import os
from dataclasses import fields
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .configuration_checks import MOST_BYTES, check_saved

# Arguments that PreTrainedConfig takes without declaring them as fields, or that a saved config carries back.
_UNDECLARED_ARGUMENTS = {
    *("num_labels", "name_or_path", "torch_dtype", "output_attentions", "attn_implementation"),
    *("experts_implementation", "model_type", "auto_map", "stage_names", "out_features", "out_indices"),
    *("quantization_config", "gradient_checkpointing"),
}

# Overrides of a loaded config that PreTrainedConfig.from_dict sees to itself.
_LEFT_TO_BASE = {"num_labels", "attn_implementation", "experts_implementation", "output_attentions"} | {
    *("torch_dtype", "dtype", "name_or_path"),
}


class CheckedArguments(PreTrainedConfig):
    """A config that refuses misspelt fields in a call, and files that no config is saved as."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from a saved dictionary.

        A saved dictionary may carry attributes that this version does not know, and keeps them; a call may not.
        Overrides in `kwargs` are checked like the arguments of a call.

        Returns:
            The config, or `(config, unused kwargs)` with `return_unused_kwargs=True`.

        Raises:
            ValueError: if the dictionary is larger or deeper than any config, or a field is wrong.
        """
        check_saved(config_dict)
        saved = {"model_type": cls.model_type, **config_dict}
        overrides = {name: kwargs.pop(name) for name in cls._accepted_arguments() & kwargs.keys() - _LEFT_TO_BASE}
        stages = {"out_features", "out_indices"}
        if overrides.keys() & stages:
            left_out = stages
        elif saved.get("out_features") == [
            f"stage{saved.get('num_hidden_layers')}"
        ]:  # the last stage follows the depth
            left_out = stages if saved.get("out_indices") != [-1] else {"out_features"}
        else:
            left_out = set()
        kept = {name: value for name, value in saved.items() if name not in left_out}
        return super().from_dict({**kept, **overrides}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        if (size := os.path.getsize(json_file)) > MOST_BYTES:
            raise ValueError(f"Expected a config file of at most {MOST_BYTES} bytes, got {size} in {json_file}")
        try:
            saved = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(
                f"Expected a config file of a few levels, got one nested too deep: {json_file}"
            ) from error
        check_saved(saved)
        return saved

    @classmethod
    def _accepted_arguments(cls) -> set[str]:
        return {f.name for f in fields(cls)} | _UNDECLARED_ARGUMENTS

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        accepted = self._accepted_arguments()
        if "model_type" in kwargs:  # a saved dictionary, which may come from another version
            for name in kwargs.keys() - accepted:
                if hasattr(type(self), name):  # it would hide a method or a property
                    raise ValueError(f"Expected fields of {type(self).__name__} in a saved config, got {name!r}")
            return
        for name in kwargs:
            if name in accepted or name.startswith("_"):
                continue
            close = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Expected a field of {type(self).__name__}, got {name!r}{hint}")
