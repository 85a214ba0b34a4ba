"""Stands in for `tests/utils/test_configuration_utils.py`: the fields every config has, at non-default values."""

from dataclasses import fields

from transformers import PreTrainedConfig

_NON_DEFAULT = {
    "architectures": ["AnyModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "register"},
    "is_encoder_decoder": True,
    "label2id": {"register": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "multi_label_classification",
    "return_dict": False,
}
_KNOWN = {field.name for field in fields(PreTrainedConfig)} | set(PreTrainedConfig().to_dict())
config_common_kwargs = {name: value for name, value in _NON_DEFAULT.items() if name in _KNOWN or name == "dtype"}
