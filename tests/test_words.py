"""The nearest known word, and what other tools call our settings."""

from common.config import Config
from common.config_file import known_keys
from common.words import ELSEWHERE, FIXED, nearest

import pytest
from hypothesis import given
from hypothesis import strategies as st

KEYS = known_keys(Config)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("learning_rate", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("lr", "train.lr"),
        ("batch_size", "train.questions_per_step"),
        ("max_length", "window.context"),
        ("r", "lora.rank"),
        ("lora_alpha", "lora.alpha"),
        ("num_train_epochs", "train.epochs"),
        ("eval_steps", "train.eval_every"),
        ("LEARNING_RATE", "train.lr"),
        ("model.max_requests", "api.max_requests"),
        ("train.seed", "seed"),
        ("trian.lrs", "train.lr"),
    ],
)
def test_a_word_of_another_tool_or_a_slip_names_our_key(word, key):
    assert nearest(word, KEYS) == f' — did you mean "{key}"?'


def test_every_name_of_another_tool_means_a_key_that_exists():
    assert set(ELSEWHERE.values()) <= set(KEYS)


@pytest.mark.parametrize("word", FIXED)
def test_what_other_tools_let_choose_and_is_fixed_here_is_said(word):
    assert nearest(word, KEYS) == nearest(f"train.{word}", KEYS) == f"; {FIXED[word]}"
    assert not any(key.rpartition(".")[2] == word for key in KEYS)


def test_a_word_that_is_far_from_all_names_none():
    assert nearest("xyzzy", ["train.lr"]) == ""
    assert nearest("learning_rate", ["other"]) == ""  # not offered where it is none of the known ones


@given(st.text())
def test_any_text_has_a_nearest_word_among_the_known_or_none(word):
    end = nearest(word, KEYS)
    assert end == "" or end.startswith("; ") or end.removeprefix(' — did you mean "').removesuffix('"?') in KEYS
