"""Keys of texts: one for each list of texts, another for each salt."""

import torch

from lago_fast.priors.text_keys import encoded, seed_of, text_keys


def test_no_two_lists_of_texts_are_encoded_alike() -> None:
    lists = [("a", "b"), ("ab",), ("ab", ""), ("", "ab"), ("a", "b", ""), (), ("",), ("b", "a"), ("a\0b",)]
    assert len({encoded(*texts) for texts in lists}) == len(lists)
    assert encoded("\ud83d") != encoded("\ude00"), "half of a pair is a text as well"


def test_a_key_depends_on_the_text_and_the_salt_alone() -> None:
    texts = [encoded(f"text {i}") for i in range(1000)]
    keys = text_keys(texts, seed_of("a"))
    assert keys.shape == (1000, 2)
    assert keys.dtype == torch.int64
    assert len(keys.unique(dim=0)) == 1000
    assert len(keys.flatten().unique()) == 2000, "both halves are of the text"
    assert torch.equal(keys.flip(0), text_keys(texts[::-1], seed_of("a")))
    assert not (keys == text_keys(texts, seed_of("b"))).any()
    assert text_keys([], seed_of("a")).shape == (0, 2)
