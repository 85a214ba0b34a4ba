"""Recording one forward pass: masks, edits, prefix maps, and nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from vitreg_hf import ViTRegForImageClassification, ViTRegModel
from vitreg_hf.analysis import recorder
from vitreg_hf.analysis.extract import classify, prefix_attention, read, subject_of
from vitreg_hf.analysis.recorder import Attended, AttentionCall, Readers, recording
from vitreg_hf.analysis.sinks import received_attention

PIXELS = (2, 3, 32, 48)


def slow_probabilities(query, key, scaling, allowed):
    """One softmax per query, over the keys that it may attend to; query head h reads key head h // groups."""
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    probabilities = torch.zeros(batch, heads, tokens, key.shape[2])
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                keys = [j for j in range(key.shape[2]) if allowed[b, i, j]]
                if keys:
                    logits = torch.stack([query[b, h, i] @ key[b, h // groups, j] * scaling for j in keys])
                    probabilities[b, h, i, keys] = logits.softmax(0)
    return probabilities


# One call of attention


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", ["nothing", "future", "boolean", "added"])
def test_probabilities_equal_a_loop_over_queries(key_heads, masked):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, key_heads, 5, 8)
    allowed = torch.ones(2, 5, 5, dtype=torch.bool)
    mask = None
    if masked == "future":
        allowed = allowed.tril()
    elif masked != "nothing":
        allowed[1, :, 3:] = False
        allowed[0, 2] = False  # a query that may attend to nothing
        mask = allowed[:, None] if masked == "boolean" else torch.where(allowed[:, None], 0.0, -torch.inf)
    call = AttentionCall(query, key, torch.randn(2, key_heads, 5, 8), 0.5, mask, masked == "future")
    expected = slow_probabilities(query, key, 0.5, allowed)
    torch.testing.assert_close(call.probabilities(), expected)
    torch.testing.assert_close(call.probabilities(2), expected[:, :, :2])
    torch.testing.assert_close(call.of_input(1).probabilities(), expected[1:])


def test_shared_values_are_repeated_for_their_heads():
    value = torch.randn(1, 2, 3, 8)
    values = AttentionCall(torch.randn(1, 6, 3, 8), value, value, 1.0).values()
    assert values.shape == (1, 6, 3, 8)
    for head in range(6):
        torch.testing.assert_close(values[:, head], value[:, head // 3])


def test_what_attention_returns_is_probabilities_times_values():
    config = hf.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8,
        vocab_size=9,
    )  # fmt: skip
    subject = subject_of(hf.LlamaModel(config), device="cpu")
    readers = Readers(attention=lambda layer, call: call, attention_update=lambda layer, update: update)
    recorded = read(subject, {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}, readers)
    call = recorded.attention[0]
    assert (call.key.shape[1], call.query.shape[1]) == (2, 4)
    assert call.probabilities().triu(1).max() == 0
    assert call.probabilities()[0, :, 0, 0].tolist() == [1.0] * 4
    mixed = (call.probabilities() @ call.values()).transpose(1, 2).flatten(2)
    with torch.inference_mode():
        torch.testing.assert_close(subject.model.layers[0].self_attn.o_proj(mixed), recorded.attention_updates[0])


@pytest.mark.parametrize("at_once", [1, 10, 70, 2**18])
@pytest.mark.parametrize("masked", ["nothing", "future", "boolean", "added"])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_attention_by_blocks_equals_attention_at_once(monkeypatch, key_heads, masked, at_once):
    """To 1e-6, whether a block holds some queries of a head, some heads of an image, or everything."""
    monkeypatch.setattr(recorder, "_AT_ONCE_ON_CPU", at_once)
    query, (key, value) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, key_heads, 5, 8)
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    allowed[1, ..., 3:] = False
    masks = {"boolean": allowed, "added": torch.where(allowed, 0.0, -torch.inf)}
    call = AttentionCall(query, key, value, 0.5, masks.get(masked), masked == "future")
    output, received = call.attended()
    expected = F.scaled_dot_product_attention(
        query, key, value, masks.get(masked), is_causal=masked == "future", scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(received, received_attention(call.probabilities()), rtol=0, atol=1e-6)


def test_a_query_that_may_attend_to_nothing_gives_and_gets_nothing():
    query = torch.randn(1, 1, 3, 8)
    allowed = torch.tensor([[[[True, True, False], [False, False, False], [True, False, False]]]])
    output, received = AttentionCall(query, query, query, 1.0, allowed).attended()
    assert output[0, 0, 1].abs().max() == 0
    assert received.sum().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("changed", [{}, {"attention_bias_kv": True}, {"num_register_tokens": 0}])
def test_a_reader_that_attends_itself_changes_nothing_else(make_config, changed):
    """States of every block within 1e-5 of those of PyTorch's attention."""
    model, pixels = ViTRegModel(make_config(**changed)), torch.randn(PIXELS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_" in name:
                parameter.normal_()
    subject = subject_of(model, device="cpu")

    def attend(layer, call):
        output, received = call.attended()
        return Attended((layer, received), output)

    ours = read(subject, pixels, Readers(hidden=lambda _, state: state, attention=attend))
    expected = read(subject, pixels, Readers(hidden=lambda _, state: state, attention=lambda _, call: call))
    torch.testing.assert_close(torch.stack(ours.hidden), torch.stack(expected.hidden), rtol=0, atol=1e-5)
    for index, ((layer, received), call) in enumerate(zip(ours.attention, expected.attention, strict=True)):
        assert layer == index
        torch.testing.assert_close(received, call.probabilities().mean(dim=-2), rtol=0, atol=1e-6)


# Readers


def test_readers_get_layers_in_order_and_only_what_they_return_is_kept(make_config):
    subject = subject_of(ViTRegModel(make_config()), device="cpu")
    order = Readers(
        hidden=lambda layer, tokens: ("hidden", layer),
        attention=lambda layer, call: ("attention", layer),
        attention_update=lambda layer, update: ("update", layer),
        ffn_update=lambda layer, update: ("ffn", layer),
    )
    recorded = read(subject, torch.randn(PIXELS), order)
    assert recorded.hidden == [("hidden", layer) for layer in range(4)]
    assert recorded.attention == [("attention", layer) for layer in range(3)]
    assert recorded.attention_updates == [("update", layer) for layer in range(3)]
    assert recorded.ffn_updates == [("ffn", layer) for layer in range(3)]
    nothing = read(subject, torch.randn(PIXELS), Readers())
    assert nothing.hidden == nothing.attention == nothing.attention_updates == nothing.ffn_updates == []


def test_edit_replaces_what_a_block_gets(make_config):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(PIXELS)
    subject = subject_of(model, device="cpu")
    shift = torch.randn(32)
    recorded = read(
        subject,
        pixels,
        Readers(hidden=lambda layer, x: x, edit=lambda layer, x: x * 0.5 + shift if layer == 1 else x),
    )
    start = read(subject, pixels, Readers(hidden=lambda layer, x: x)).hidden[0]
    with torch.no_grad():
        tokens, states = start, [start]
        for index, block in enumerate(model.layers):
            tokens = block(tokens * 0.5 + shift if index == 1 else tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            states.append(tokens)
    for ours, expected in zip(recorded.hidden, states, strict=True):
        torch.testing.assert_close(ours, expected)
    unedited = read(subject, pixels, Readers(hidden=lambda layer, x: x)).hidden
    torch.testing.assert_close(unedited[1], states[1])
    assert (unedited[2] - states[2]).abs().max() > 0.1


def test_edits_reach_the_logits(make_config):
    subject, pixels = subject_of(ViTRegForImageClassification(make_config()), device="cpu"), torch.randn(PIXELS)
    with torch.no_grad():
        own = subject.model(pixels).logits
    torch.testing.assert_close(classify(subject, pixels), own)
    same = classify(subject, pixels, Readers(edit=lambda layer, x: x))
    edited = classify(subject, pixels, Readers(edit=lambda layer, x: torch.zeros_like(x)))
    torch.testing.assert_close(same, own)
    assert (edited - own).abs().max() > 1e-3
    torch.testing.assert_close(edited[0], edited[1])  # without tokens, images look alike
    with pytest.raises(ValueError, match="classification head, got ViTRegModel"):
        classify(subject_of(ViTRegModel(make_config()), device="cpu"), pixels)


# Nothing stays


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("own_family", [True, False])
def test_nothing_stays_in_the_model(make_config, own_family, implementation, fails):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTRegModel(make_config()) if own_family else hf.ViTModel(hf.ViTConfig(**small, patch_size=8))
    model.set_attn_implementation(implementation)
    subject, pixels = subject_of(model, device="cpu"), torch.randn(1, 3, 32, 32)
    pixels = pixels if own_family else torch.randn(1, 3, 224, 224)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(pixels).last_hidden_state
    hooks = hooks_of(model)

    def reader(layer, given):
        if fails:
            raise RuntimeError("reader failed")

    everything = Readers(reader, reader, reader, reader)
    if fails:
        with pytest.raises(RuntimeError, match="reader failed"):
            read(subject, pixels, everything)
    else:
        assert len(read(subject, pixels, everything).attention) == len(subject.anatomy.blocks)
    assert hooks_of(model) == hooks
    assert model.config._attn_implementation == implementation
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, before)


def test_attention_that_is_not_fused_is_noticed(make_config):
    model = ViTRegModel(make_config()).eval()
    model.set_attn_implementation("eager")
    readers = Readers(attention=lambda layer, call: None)
    with (
        pytest.raises(ValueError, match="each of 3 blocks to call scaled_dot_product_attention once, got 0 calls"),
        torch.no_grad(),
        recording(subject_of(model, device="cpu").anatomy, readers),
    ):
        model(torch.randn(PIXELS))


def test_training_mode_is_refused(make_config):
    subject = subject_of(ViTRegModel(make_config()), device="cpu")
    subject.model.train()
    with pytest.raises(ValueError, match=r"in training mode: call model\.eval"):
        read(subject, torch.randn(PIXELS), Readers())


# Prefix


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prefix_attention_equals_what_the_model_itself_returns(make_config, implementation):
    model, pixels = ViTRegModel(make_config()).eval(), torch.randn(PIXELS)
    with torch.no_grad():
        own = model(pixels, output_prefix_attentions=True).prefix_attentions
    model.set_attn_implementation(implementation)
    for layer, expected in enumerate(own):
        maps = prefix_attention(model, pixels, layer).maps
        assert maps.shape == (2, 4, 5, 4, 6)
        on_patches = expected[..., -24:] if expected.ndim == 4 else expected.flatten(-2)
        torch.testing.assert_close(maps.flatten(-2), on_patches, atol=1e-6, rtol=0)


def test_shares_of_prefix_attention(make_config):
    attention = prefix_attention(ViTRegModel(make_config()).eval(), torch.randn(PIXELS))
    assert attention.equal_share() == pytest.approx(1 / (5 + 24))
    share = attention.share_on_patches()
    assert share.shape == (2, 5)
    assert 0 < share.min() <= share.max() < 1


def test_a_model_without_prefix_has_no_prefix_attention():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**small, image_size=32, patch_size=8)).eval()
    with pytest.raises(ValueError, match="CLS or registers, got one with neither"):
        prefix_attention(model, torch.randn(1, 3, 32, 32))
