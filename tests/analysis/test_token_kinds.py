# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Kinds of tokens of texts and of Vision Transformers."""

import pytest
import torch

from vitreg_hf.analysis.token_kinds import TextKind, VisionKind, count_by_kind, kinds_of, real_tokens, vision_kinds

CLS, SEP, FIRST, PUNCTUATION, NEWLINE, OTHER, PADDING = TextKind


def test_a_wordpiece_sentence():
    tokens = ["[CLS]", "the", "cat", "##s", ",", "##,", "[UNK]", "[MASK]", ".", "[SEP]"]
    kinds = kinds_of([tokens], causal=False, cls="[CLS]", sep="[SEP]")
    expected = [CLS, OTHER, OTHER, OTHER, PUNCTUATION, PUNCTUATION, OTHER, OTHER, PUNCTUATION, SEP]
    assert kinds.dtype == torch.int64
    assert kinds.tolist() == [expected]


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("Ġ.", PUNCTUATION),
        (".Ċ", PUNCTUATION),
        ("Ċ", NEWLINE),
        ("ĊĊ", NEWLINE),
        ("Ġ", OTHER),
        ("Ġcat", OTHER),
        ("ĠâĢĶ", PUNCTUATION),  # the three bytes of an em dash
        ("âĢ", OTHER),  # two of them are no character
        ("ĠÃ©", OTHER),  # the two bytes of é
        ("▁,", PUNCTUATION),
        ("▁", OTHER),
        ("▁cat", OTHER),
        ("▁“", PUNCTUATION),
        ("<0x0A>", NEWLINE),
        ("«", PUNCTUATION),
        ("é", OTHER),
        ("##", PUNCTUATION),  # a heading to byte-level BPE
        ("###", PUNCTUATION),
        ("##é", OTHER),
        ("...", PUNCTUATION),
        (".com", OTHER),
        ("'s", OTHER),
        ("$", OTHER),  # a symbol, not punctuation, to Unicode
        ("", OTHER),
    ],
)
def test_a_token_of_any_style(token, kind):
    assert kinds_of([["a", token]], causal=False).tolist() == [[OTHER, kind]]


def test_every_byte_has_its_spelling():
    """The alphabet of byte-level BPE against characters of one to four bytes, spelled by its rule."""
    readable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling, shift = {}, 0
    for byte in range(256):
        spelling[byte] = chr(byte) if byte in readable else chr(256 + shift)
        shift += byte not in readable
    for character, kind in [
        ("…", PUNCTUATION),
        ("⸭", PUNCTUATION),
        ("؟", PUNCTUATION),
        ("。", PUNCTUATION),
        ("𐄀", PUNCTUATION),
        ("ж", OTHER),
    ]:
        token = "".join(spelling[byte] for byte in f" {character}".encode())
        assert kinds_of([["a", token]], causal=False)[0, 1] == kind, character


def test_the_first_token_counts_as_such_only_where_the_model_is_causal():
    text = [["Ġ.", "Ġthe", "Ġ."]]
    assert kinds_of(text, causal=True).tolist() == [[FIRST, OTHER, PUNCTUATION]]
    assert kinds_of(text, causal=False).tolist() == [[PUNCTUATION, OTHER, PUNCTUATION]]


def test_bos_is_first_wherever_it_stands_and_yields_to_cls():
    assert kinds_of([["<s>", "a", "<s>"]], causal=True, bos="<s>").tolist() == [[FIRST, OTHER, FIRST]]
    roberta = kinds_of([["<s>", "a", "</s>"]], causal=False, cls="<s>", bos="<s>", sep="</s>")
    assert roberta.tolist() == [[CLS, OTHER, SEP]]
    assert kinds_of([["<s>", "a"]], causal=True, cls="<s>").tolist() == [[CLS, OTHER]]


def test_padding_is_what_the_mask_or_a_shorter_text_says():
    assert kinds_of([["a", ".", "b"], ["c"], []], causal=True).tolist() == [
        [FIRST, PUNCTUATION, OTHER],
        [FIRST, PADDING, PADDING],
        [PADDING, PADDING, PADDING],
    ]
    end = "<|endoftext|>"
    mask = torch.tensor([[False, True, True], [True, True, False]])
    kinds = kinds_of([[end, end, "."], [".", ".", end]], causal=True, bos=end, token_mask=mask)
    assert kinds.tolist() == [[PADDING, FIRST, PUNCTUATION], [FIRST, PUNCTUATION, PADDING]]


def test_mistakes_in_texts_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        kinds_of([], causal=True)
    with pytest.raises(ValueError, match="at least one token"):
        kinds_of([[], []], causal=True)
    with pytest.raises(ValueError, match="CLS and SEP, got 'x' for both"):
        kinds_of([["a"]], causal=True, cls="x", sep="x")
    for mask in (torch.ones(1, 2).bool(), torch.ones(1, 1)):
        with pytest.raises(ValueError, match=r"boolean token_mask \(1, 1\)"):
            kinds_of([["a"]], causal=True, token_mask=mask)
    with pytest.raises(ValueError, match="past the end of a text"):
        kinds_of([["a", "b"], ["a"]], causal=True, token_mask=torch.ones(2, 2).bool())


def test_a_vision_transformer():
    outliers = torch.tensor([[False, True, False], [False, False, False]])
    cls, register, outlier, normal = VisionKind
    expected = [[cls, register, register, normal, outlier, normal], [cls, register, register, normal, normal, normal]]
    assert vision_kinds(1, 2, outliers).tolist() == expected
    assert vision_kinds(0, 0, outliers).tolist() == [row[3:] for row in expected]
    assert vision_kinds(0, 0, outliers).dtype == torch.int64


def test_mistakes_in_vision_kinds_are_refused():
    with pytest.raises(ValueError, match="0 or more, got -1 CLS"):
        vision_kinds(-1, 0, torch.zeros(1, 2).bool())
    with pytest.raises(ValueError, match="-2 registers"):
        vision_kinds(1, -2, torch.zeros(1, 2).bool())
    for mask in (torch.zeros(2).bool(), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=r"boolean mask \(B, P\)"):
            vision_kinds(1, 0, mask)


def test_counts_are_added_up_by_kind_without_padding():
    kinds = torch.tensor([[CLS, SEP, OTHER, OTHER, SEP, 99], [SEP, SEP, SEP, SEP, SEP, OTHER]])
    mask = torch.tensor([[True] * 5 + [False], [False] * 4 + [True] * 2])
    per_token = torch.tensor([[1, 0, 2, 3, 40, 500], [9, 9, 9, 9, 7, 0]])
    counts = count_by_kind(per_token, kinds, len(TextKind), mask)
    assert counts.tolist() == [[1, 40, 0, 0, 0, 5, 0], [0, 7, 0, 0, 0, 0, 0]]
    tokens = count_by_kind(torch.ones(2, 6), kinds, len(TextKind), mask)
    assert tokens.tolist() == [[1, 2, 0, 0, 0, 2, 0], [0, 1, 0, 0, 0, 1, 0]]


def test_all_tokens_are_real_without_a_mask():
    assert torch.equal(real_tokens(None, torch.zeros(2, 7), 3), torch.ones(2, 3).bool())


def test_mistakes_in_counts_are_refused():
    counts = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"counts per token \(B, N\)"):
        count_by_kind(torch.ones(1, 2, 3), torch.zeros(1, 2).long(), 2)
    for kinds in (torch.zeros(1, 3).long(), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=r"integer kinds \(1, 2\)"):
            count_by_kind(counts, kinds, 2)
    for kind in (-1, 2):
        with pytest.raises(ValueError, match="kinds from 0 to 1"):
            count_by_kind(counts, torch.full((1, 2), kind), 2)
    with pytest.raises(ValueError, match="at least one input"):
        count_by_kind(torch.ones(0, 2), torch.zeros(0, 2).long(), 2)
    for mask in (torch.ones(1, 3).bool(), torch.ones(1, 2)):
        with pytest.raises(ValueError, match=r"boolean token_mask \(1, 2\)"):
            count_by_kind(counts, torch.zeros(1, 2).long(), 2, mask)
    with pytest.raises(ValueError, match="padding alone"):
        count_by_kind(counts, torch.zeros(1, 2).long(), 2, torch.zeros(1, 2).bool())
