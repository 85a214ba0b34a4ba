"""Named outputs, hidden states, attention maps, and the forms in which they are handed out."""

import copy
import pickle

import pytest
import torch
from torch.nn.parallel import scatter_gather
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
    ViTRegPreTrainedModel,
)

FAMILY = [
    ViTRegModel,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegBackbone,
]
BACKENDS = ["eager", "sdpa", "flex_attention"]


class Outer(ViTRegPreTrainedModel):
    """Another model around ours, with recorded outputs of its own."""

    _can_record_outputs = {"hidden_states": torch.nn.Linear}

    def __init__(self, config):
        super().__init__(config)
        self.inner = ViTRegModel(config)
        self.projection = torch.nn.Linear(config.hidden_size, 2)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values, **kwargs):
        return BaseModelOutput(last_hidden_state=self.projection(self.inner(pixel_values).cls_token))


pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model_class", FAMILY)
def test_tokens_are_reachable_by_name_from_every_head(make_config, model_class):
    outputs = model_class(make_config()).eval()(pixels)
    assert outputs.cls_token.shape == (2, 32)
    assert outputs.register_tokens.shape == (2, 4, 32)
    assert outputs.patch_tokens.shape == (2, 15, 32)
    assert outputs.patch_map.shape == (2, 32, 5, 3)
    torch.testing.assert_close(outputs.patch_map.flatten(2).transpose(1, 2), outputs.patch_tokens)


def test_named_tokens_are_views_after_the_final_norm(make_config):
    outputs = ViTRegModel(make_config()).eval()(pixels)
    tokens = outputs.last_hidden_state
    parts = [outputs.cls_token[:, None], outputs.register_tokens, outputs.patch_tokens]
    assert torch.equal(torch.cat(parts, dim=1), tokens)
    for part in [*parts, outputs.patch_map]:
        assert part.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()


def test_kinds_that_do_not_exist_are_none(make_config):
    outputs = ViTRegModel(make_config(num_register_tokens=0)).eval()(pixels)
    assert outputs.register_tokens is None
    assert ViTRegModel(make_config(use_cls_token=False, pooling="mean")).eval()(pixels).cls_token is None


def test_hidden_states_stand_before_the_final_norm(make_config):
    model = ViTRegModel(make_config()).eval()
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    torch.testing.assert_close(model.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert not torch.allclose(outputs.hidden_states[-1], outputs.last_hidden_state)


@pytest.mark.parametrize("model_class", FAMILY)
def test_usual_fields_come_first(make_config, model_class):
    outputs = model_class(make_config()).eval()(
        pixels, output_hidden_states=True, output_attentions=True, output_prefix_attentions=True
    )
    names = list(outputs.keys())
    assert names.index("attentions") < names.index("cls_token") < names.index("prefix_attentions")


@pytest.mark.parametrize("model_class", FAMILY)
@pytest.mark.parametrize("in_config", [True, False])
def test_return_dict_false_gives_a_tuple_of_the_same(make_config, model_class, in_config):
    model = model_class(make_config()).eval()
    expected = model(pixels, output_attentions=True).to_tuple()
    if in_config:
        model.config.return_dict = False
        got = model(pixels, output_attentions=True)
    else:
        got = model(pixels, output_attentions=True, return_dict=False)
    assert isinstance(got, tuple)
    assert len(got) == len(expected)
    torch.testing.assert_close(got[0], expected[0])


@pytest.mark.parametrize("model_class", FAMILY)
def test_data_parallel_can_gather(make_config, model_class, monkeypatch):
    """Two replicas' outputs, gathered as DataParallel does, with the copy between devices faked."""
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *parts: torch.cat(parts, dim))
    model = model_class(make_config()).eval()
    flags = {"output_hidden_states": True, "output_attentions": True, "output_prefix_attentions": [1]}
    gathered = scatter_gather.gather([model(pixels[:1], **flags), model(pixels[1:], **flags)], "cpu")
    whole = model(pixels, **flags)
    assert type(gathered) is type(whole)
    assert list(gathered) == list(whole)
    for name in ("cls_token", "patch_map"):
        torch.testing.assert_close(gathered[name], whole[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gathered.attentions[0], whole.attentions[0], atol=1e-5, rtol=1e-5)
    assert gathered.prefix_attentions[0] is None
    torch.testing.assert_close(gathered.prefix_attentions[1], whole.prefix_attentions[1], atol=1e-5, rtol=1e-5)


class TestAttentions:
    @staticmethod
    def by_hand(model, state, layer):
        """Softmax of scaled products, with nothing of the model's code but its projections."""
        attention = model.layers[layer].attention
        normed = model.layers[layer].norm1(state)
        query, key = (
            projection(normed).unflatten(-1, (4, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", query, key) / 8**0.5, dim=-1)

    @pytest.mark.parametrize("backend", BACKENDS)
    @torch.no_grad()
    def test_true_probabilities_under_every_backend(self, make_config, backend):
        model = ViTRegModel(make_config(attn_implementation=backend)).eval()
        outputs = model(pixels, output_attentions=True, output_hidden_states=True)
        assert len(outputs.attentions) == 3
        for layer, attention in enumerate(outputs.attentions):
            assert attention.shape == (2, 4, 20, 20)
            torch.testing.assert_close(attention, self.by_hand(model, outputs.hidden_states[layer], layer))

    @pytest.mark.parametrize("backend", BACKENDS)
    @torch.no_grad()
    def test_prefix_attention_is_the_prefix_of_full_attention(self, make_config, backend):
        model = ViTRegModel(make_config(attn_implementation=backend)).eval()
        outputs = model(pixels, output_attentions=True, output_prefix_attentions=True)
        for full, prefix in zip(outputs.attentions, outputs.prefix_attentions, strict=True):
            assert prefix.shape == (2, 4, 5, 20)
            torch.testing.assert_close(prefix, full[:, :, :5])

    def test_without_cls_the_prefix_is_the_registers(self, make_config):
        model = ViTRegModel(make_config(use_cls_token=False, pooling="mean")).eval()
        outputs = model(pixels, output_attentions=True, output_prefix_attentions=True)
        torch.testing.assert_close(outputs.prefix_attentions[0], outputs.attentions[0][:, :, :4])

    @pytest.mark.parametrize(("asked", "present"), [([0, 2], {0, 2}), ([-1], {2}), ((1,), {1}), (1, {1}), ([], set())])
    def test_chosen_layers_keep_their_index(self, make_config, asked, present):
        model = ViTRegModel(make_config()).eval()
        every = model(pixels, output_prefix_attentions=True).prefix_attentions
        some = model(pixels, output_prefix_attentions=asked).prefix_attentions
        if not present:
            assert some is None
            return
        assert {layer for layer, attention in enumerate(some) if attention is not None} == present
        for layer in present:
            assert torch.equal(some[layer], every[layer])

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_probabilities_are_those_before_dropout(self, make_config, backend):
        model = ViTRegModel(make_config(attention_probs_dropout_prob=0.5, attn_implementation=backend)).train()
        outputs = model(pixels, output_attentions=True, output_prefix_attentions=True)
        for attention in (outputs.attentions[0], outputs.prefix_attentions[0]):
            assert (attention > 0).all()
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))

    def test_asked_for_in_the_config(self, make_config):
        config = make_config(output_attentions=True, output_prefix_attentions=[1], output_hidden_states=True)
        outputs = ViTRegForImageClassification(config).eval()(pixels)
        assert len(outputs.attentions) == 3
        assert len(outputs.hidden_states) == 4
        assert [a is None for a in outputs.prefix_attentions] == [True, False, True]
        overruled = ViTRegForImageClassification(config).eval()(pixels, output_attentions=False)
        assert overruled.attentions is None

    def test_asking_changes_no_output(self, make_config):
        model = ViTRegModel(make_config()).eval()
        plain = model(pixels).last_hidden_state
        asked = model(pixels, output_attentions=True, output_prefix_attentions=True).last_hidden_state
        assert torch.equal(plain, asked)

    def test_prefix_attention_holds_no_map_of_all_tokens(self, make_config):
        """The largest tensor beside the fused kernel has prefix x tokens entries per head, not tokens x tokens."""
        model = ViTRegModel(make_config()).eval()
        tokens = 5 + 32 * 32
        sizes = []

        class Record(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                sizes.extend(
                    r.numel() for r in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(r)
                )
                return result

        with torch.no_grad(), Record():
            model(torch.randn(1, 3, 256, 256), output_prefix_attentions=True)
        assert max(sizes) < tokens * tokens


class TestIntermediateLayers:
    """DINOv2's `get_intermediate_layers`, written out from its definition."""

    @staticmethod
    def reference(model, n, reshape, return_class_token, norm):
        states = model(pixels, output_hidden_states=True).hidden_states[1:]
        wanted = range(len(states) - n, len(states)) if isinstance(n, int) else n
        states = [model.layernorm(states[i]) if norm else states[i] for i in wanted]
        patches = [state[:, 5:] for state in states]
        if reshape:
            patches = [p.reshape(2, 5, 3, 32).permute(0, 3, 1, 2) for p in patches]
        return tuple(zip(patches, [s[:, 0] for s in states], strict=True)) if return_class_token else tuple(patches)

    @pytest.mark.parametrize("n", [1, 3, [0, 2]])
    @pytest.mark.parametrize("reshape", [True, False])
    @pytest.mark.parametrize("return_class_token", [True, False])
    @pytest.mark.parametrize("norm", [True, False])
    def test_same_as_the_definition(self, make_config, n, reshape, return_class_token, norm):
        model = ViTRegModel(make_config()).eval()
        arguments = {"reshape": reshape, "return_class_token": return_class_token, "norm": norm}
        expected = self.reference(model, n, **arguments)
        torch.testing.assert_close(model.get_intermediate_layers(pixels, n, **arguments), expected)

    @pytest.mark.parametrize("n", [0, 4, [3], []])
    def test_layers_that_do_not_exist(self, make_config, n):
        with pytest.raises(ValueError, match="Expected n to be 1 to 3 or layers of 0 to 2"):
            ViTRegModel(make_config()).get_intermediate_layers(pixels, n)

    def test_cls_of_a_model_without(self, make_config):
        model = ViTRegModel(make_config(use_cls_token=False, pooling="mean"))
        with pytest.raises(ValueError, match="Expected a model with a CLS token"):
            model.get_intermediate_layers(pixels, return_class_token=True)


class TestRecording:
    @staticmethod
    def counts(model):
        outputs = model(pixels, output_hidden_states=True, output_attentions=True, output_prefix_attentions=[1])
        return len(outputs.hidden_states), len(outputs.attentions), [a is None for a in outputs.prefix_attentions]

    wanted = (4, 3, [True, False, True])

    @pytest.mark.parametrize("model_class", FAMILY)
    def test_copies(self, make_config, model_class):
        model = model_class(make_config()).eval()
        assert self.counts(copy.deepcopy(model)) == self.wanted
        assert self.counts(copy.deepcopy(copy.deepcopy(model))) == self.wanted

    @pytest.mark.parametrize("model_class", FAMILY)
    def test_pickled_models(self, make_config, model_class):
        model = model_class(make_config()).eval()
        loaded = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(loaded(pixels)[0], model(pixels)[0])
        assert self.counts(loaded) == self.wanted
        assert self.counts(model) == self.wanted

    def test_inside_a_model_that_records_too(self, make_config):
        outer = Outer(make_config()).eval()
        for _ in range(2):
            outer(pixels, output_hidden_states=True)
            assert self.counts(outer.inner) == self.wanted
