"""Trees from disk are those that would be built, and a file is never taken for another's."""

from dataclasses import replace

from common.config import Prompt, Window
from common.data import cache, prompt, tokens, trees
from common.data.squad import read
from common.data.trees import build_trees
from tests.conftest import ROOT

import pytest
from transformers import AutoTokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "trees")
    monkeypatch.setattr(tokens, "MANY", 1)
    return tmp_path / "trees"


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def examples():
    return read(str(ROOT / "demo" / "train.json"), "train").examples[:20]


def test_what_is_read_is_what_was_built(folder, tokenizer, examples, monkeypatch):
    for train in (True, False):
        built = cache.build_trees(examples, tokenizer, Window(context=220), train=train)
        assert built == build_trees(examples, tokenizer, Window(context=220), train=train)
        with monkeypatch.context() as patch:
            patch.setattr(trees, "build_trees", None)  # nothing is built again
            assert cache.build_trees(examples, tokenizer, Window(context=220), train=train) == built


def test_whatever_decides_the_trees_makes_another_file(folder, tokenizer, examples, smollm2_base, monkeypatch):
    other = AutoTokenizer.from_pretrained(smollm2_base)
    shorter = [replace(examples[0], question="Which?"), *examples[1:]]
    cache.build_trees(examples, tokenizer, Window(), train=True)
    cache.build_trees(examples, tokenizer, Window(), train=False)
    cache.build_trees(examples, tokenizer, Window(context=300), train=True)
    cache.build_trees(shorter, tokenizer, Window(), train=True)
    cache.build_trees(examples, other, Window(), train=True)
    by_other = cache.build_trees(examples, tokenizer, Window(), train=True, window_tokenizer=other)
    assert by_other == build_trees(examples, tokenizer, Window(), train=True, window_tokenizer=other)
    assert by_other != build_trees(examples, tokenizer, Window(), train=True)
    monkeypatch.setattr(prompt, "QUESTION", "\n\nQ: {}\n\nAnswer:")
    cache.build_trees(examples, tokenizer, Window(), train=True)
    assert len(list(folder.iterdir())) == 7


def test_a_prompts_options_and_a_tokenizers_eos_make_another_file_and_a_template_where_it_is_used(
    folder, examples, tiny_base
):
    def made(options: Prompt = Prompt(), **changes: str) -> str:
        """The name of the one new file, or nothing."""
        tokenizer, before = AutoTokenizer.from_pretrained(tiny_base), set(folder.glob("*"))
        for key, value in ({"chat_template": "{{ messages[0]['content'] }}"} | changes).items():
            setattr(tokenizer, key, value)
        built = cache.build_trees(examples, tokenizer, Window(), train=True, options=options)
        assert built == build_trees(examples, tokenizer, Window(), train=True, options=options)
        return "".join(file.name for file in set(folder.glob("*")) - before)

    other_template = "{{ messages[0]['content'] }}."
    assert made() != ""
    assert made() == made(chat_template=other_template) == ""
    assert made(Prompt(order="both")) != ""
    assert made(eos_token="<pad>") != ""
    assert made(Prompt(chat=True)) != ""
    assert made(Prompt(chat=True)) == ""
    assert made(Prompt(chat=True), chat_template=other_template) != ""


def test_a_code_that_was_changed_or_other_tokenizers_make_another_file(
    folder, tokenizer, examples, tmp_path, monkeypatch
):
    for module in (cache, prompt):
        copy = tmp_path / f"{module.__name__}.py"
        copy.write_text((ROOT / "common" / "data" / f"{module.__name__.rpartition('.')[2]}.py").read_text())
        monkeypatch.setattr(module, "__file__", str(copy))
    for n in range(1, 5):
        for _ in range(2):
            cache.build_trees(examples, tokenizer, Window(), train=True)
            assert len(list(folder.iterdir())) == n
        if n < 3:
            copy = tmp_path / f"{(cache, prompt)[n - 1].__name__}.py"
            copy.write_text(copy.read_text() + "# changed\n")
        monkeypatch.setattr(cache.tokenizers, "__version__", "9.9" if n == 3 else cache.tokenizers.__version__)


def test_a_broken_file_is_made_anew_and_a_folder_that_cannot_be_written_is_done_without(folder, tokenizer, examples):
    built = cache.build_trees(examples, tokenizer, Window(), train=True)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (b"", whole[: len(whole) // 2], bytes(flipped)):
        assert broken != whole
        file.write_bytes(broken)
        assert cache.build_trees(examples, tokenizer, Window(), train=True) == built
        assert file.read_bytes() == whole
    file.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    assert cache.build_trees(examples, tokenizer, Window(), train=True) == built


def test_a_disk_that_is_full_leaves_no_partial_file(folder, tokenizer, examples, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(cache.np, "savez", full)
    built = cache.build_trees(examples, tokenizer, Window(), train=True)
    assert built == build_trees(examples, tokenizer, Window(), train=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("many", "kept"), [(20, True), (21, False)])
def test_few_questions_are_not_kept(folder, tokenizer, examples, monkeypatch, many, kept):
    assert len(examples) == 20
    monkeypatch.setattr(tokens, "MANY", many)
    built = cache.build_trees(examples, tokenizer, Window(), train=True, window_tokenizer=tokenizer)
    assert built == build_trees(examples, tokenizer, Window(), train=True)
    assert folder.exists() == kept
