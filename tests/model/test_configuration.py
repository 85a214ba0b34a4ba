import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from vitreg_hf import ViTRegConfig, ViTRegModel
from vitreg_hf.model.outputs import ViTRegTokens


def test_defaults_are_a_base_model_with_four_registers():
    config = ViTRegConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.num_register_tokens, config.num_prefix_tokens) == (3072, 4, 5)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (1024, 16), (37, 1), (200, 2)])
def test_heads_follow_the_width_when_left_out(width, heads):
    assert ViTRegConfig(hidden_size=width).num_attention_heads == heads
    assert ViTRegConfig(hidden_size=width).intermediate_size == 4 * width


WRONG_VALUES = [
    ({"hidden_size": -1}, "Expected hidden_size to be a positive integer, got -1"),
    ({"num_hidden_layers": 0}, "Expected num_hidden_layers to be a positive integer, got 0"),
    ({"num_channels": 0}, "Expected num_channels to be a positive integer, got 0"),
    ({"intermediate_size": -4}, "Expected intermediate_size to be a positive integer, got -4"),
    ({"head_dim": 0}, "Expected head_dim to be a positive integer, got 0"),
    ({"num_register_tokens": -1}, "Expected num_register_tokens to be zero or more, got -1"),
    ({"num_attention_heads": 7}, r"Expected num_attention_heads to be a divisor of hidden_size \(768\).*got 7"),
    ({"hidden_dropout_prob": 1.0}, r"Expected hidden_dropout_prob to be a probability in \[0, 1\), got 1.0"),
    ({"drop_path_rate": float("nan")}, "Expected drop_path_rate to be a probability.*got nan"),
    ({"initializer_range": 0.0}, "Expected initializer_range to be a positive finite number, got 0.0"),
    ({"token_initializer_range": 0.0}, "Expected token_initializer_range to be a positive finite number, got 0.0"),
    ({"layer_norm_eps": -1e-6}, "Expected layer_norm_eps to be a positive finite number"),
    ({"layerscale_value": float("inf")}, "Expected layerscale_value to be None or a finite number, got inf"),
    ({"position_interpolation_offset": -0.1}, "Expected position_interpolation_offset to be zero or more, got -0.1"),
    ({"image_size": 0}, "Expected image_size to be a positive integer or a pair"),
    ({"image_size": [32, 32, 32]}, "Expected image_size to be a positive integer or a pair"),
    ({"image_size": (224, 225)}, r"Expected image_size to be a multiple of patch_size \(16\), got \(224, 225\)"),
    ({"patch_size": -16}, "Expected patch_size to be a positive integer or a pair"),
    ({"pooling": "max"}, "Expected pooling to be one of cls, mean, cls_mean, cls_register_mean, got 'max'"),
    ({"drop_path_schedule": "cosine"}, "Expected drop_path_schedule to be one of linear, uniform, got 'cosine'"),
    (
        {"position_interpolation_mode": "nearest"},
        "Expected position_interpolation_mode to be one of bicubic, bilinear",
    ),
    ({"hidden_act": "wish"}, "Expected hidden_act to be one of .*gelu.*got 'wish'"),
    ({"use_cls_token": False}, "Expected pooling to be mean, as use_cls_token=False.*got 'cls'"),
    ({"pooling": "cls_register_mean", "num_register_tokens": 0}, "Expected num_register_tokens to be at least 1"),
    ({"output_prefix_attentions": [12]}, "Expected output_prefix_attentions to be layers of 12, got 12"),
    (
        {"num_registers": 4},
        "Expected a field of ViTRegConfig, got 'num_registers'; did you mean 'num_register_tokens'",
    ),
    ({"xyzzy": 4}, "Expected a field of ViTRegConfig, got 'xyzzy'$"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_wrong_values_say_what_was_expected_and_what_came(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTRegConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_test_time_registers": 1},
        {"num_test_time_registers": 2, "register_neurons": [[0, 0]]},
        {"register_neurons": [[12, 0]]},
        {"register_neurons": [[0, 3072]]},
        {"register_neurons": [[0, 1], [0, 1]]},
        {"register_neurons": [[0]]},
        {"register_neurons": [[0, 0]], "test_time_register_init": "ones"},
        {"register_neurons": [[0, 0]], "register_neuron_reduction": "mean"},
    ],
)
def test_register_neurons_that_are_none_are_refused(fields):
    with pytest.raises(ValueError, match=r"Expected .*(neuron|register)"):
        ViTRegConfig(**fields)


@pytest.mark.parametrize("fields", [{"hidden_size": "768"}, {"num_register_tokens": 4.0}, {"qkv_bias": 1}])
def test_wrong_types_are_errors_of_strict_dataclasses(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        ViTRegConfig(**fields)


def test_save_and_load_keep_every_field(tmp_path):
    config = ViTRegConfig(
        image_size=(64, 32), patch_size=[8, 16], layerscale_value=1e-5, num_labels=7, output_prefix_attentions=[-1]
    )
    config.save_pretrained(tmp_path)
    assert ViTRegConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is ViTRegConfig


def test_a_call_made_of_a_saved_dictionary_is_accepted():
    config = ViTRegConfig(hidden_size=64, out_indices=[1, 12])
    assert ViTRegConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_a_file_may_carry_attributes_of_another_version(tmp_path):
    ViTRegConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 3}))
    assert ViTRegConfig.from_pretrained(tmp_path).from_the_future == 3


def test_a_composite_may_hold_attributes_of_another_version():
    saved = {**ViTRegConfig().to_dict(), "from_the_future": 3}
    assert ViTRegConfig(**saved).from_the_future == 3  # how composite configs make their parts


def test_what_trainer_leaves_out_are_the_named_tokens():
    fields = ["hidden_states", "attentions", *ViTRegTokens.__dataclass_fields__]
    assert ViTRegConfig.keys_to_ignore_at_inference == fields


def test_overrides_at_loading_are_checked(tmp_path):
    ViTRegConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected pooling to be one of"):
        ViTRegConfig.from_pretrained(tmp_path, pooling="max")


def test_fields_set_later_are_checked_when_a_model_is_made(make_config):
    config = make_config()
    config.pooling = "max"
    with pytest.raises(ValueError, match="Expected pooling to be one of"):
        ViTRegModel(config)


def test_output_attentions_survives_sdpa_and_reload(tmp_path, make_config):
    config = make_config(attn_implementation="sdpa")
    config.output_attentions = True
    ViTRegModel(config).save_pretrained(tmp_path)
    loaded = ViTRegModel.from_pretrained(tmp_path)
    assert loaded.config.output_attentions
    assert loaded.config._attn_implementation == "sdpa"


def test_backbone_stages_follow_the_depth():
    config = ViTRegConfig(num_hidden_layers=3, out_features=["stage1", "stage3"])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert config.out_indices == [1, 3]
    with pytest.raises(ValueError, match="out_features must be a subset"):
        ViTRegConfig(num_hidden_layers=3, out_features=["stage4"])


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [0.0, 0.1, 0.2, 0.3]), ("uniform", [0.3, 0.3, 0.3, 0.3])])
def test_drop_path_schedules(schedule, rates):
    config = ViTRegConfig(num_hidden_layers=4, drop_path_rate=0.3, drop_path_schedule=schedule)
    assert config.drop_path_rates == pytest.approx(rates)


def test_head_dim_frees_the_width_from_the_heads():
    config = ViTRegConfig(hidden_size=100, num_attention_heads=3, head_dim=16)
    assert config.attention_head_dim == 16
    assert ViTRegConfig(hidden_size=96, num_attention_heads=3).attention_head_dim == 32
