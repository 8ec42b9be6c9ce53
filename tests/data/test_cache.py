"""Trees from disk are those that would be built, and a file is never taken for another's."""

import shutil
import subprocess
import sys
from dataclasses import replace

from common.config import Prompt, Window
from common.data import cache, prompt, tokens, trees
from common.data.squad import Dataset, read
from common.data.tokens import Tokenizers
from common.data.trees import build_trees
from tests.conftest import ROOT, same

import pytest
from transformers import AutoTokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache" / "trees")
    monkeypatch.setattr(tokens, "MANY", 1)
    return tmp_path / "cache" / "trees"


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def examples():
    return read(str(ROOT / "demo" / "train.json"), "train").examples[:20]


def test_what_is_read_is_what_was_built(folder, tokenizer, examples, monkeypatch):
    for train in (True, False):
        built = cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(context=220), train=train)
        assert built == build_trees(examples, same(tokenizer), Window(context=220), train=train)
        with monkeypatch.context() as patch:
            patch.setattr(trees, "build_trees", None)  # nothing is built again
            assert (
                cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(context=220), train=train) == built
            )


def test_whatever_decides_the_trees_makes_another_file(folder, tokenizer, examples, smollm2_base, monkeypatch):
    other = AutoTokenizer.from_pretrained(smollm2_base)
    shorter = [replace(examples[0], question="Which?"), *examples[1:]]
    cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
    cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=False)
    cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(context=300), train=True)
    cache.build_trees(Dataset(shorter, "here"), same(tokenizer), Window(), train=True)
    cache.build_trees(Dataset(examples, "here"), same(other), Window(), train=True)
    by_other = cache.build_trees(Dataset(examples, "here"), Tokenizers(tokenizer, other), Window(), train=True)
    assert by_other == build_trees(examples, Tokenizers(tokenizer, other), Window(), train=True)
    assert by_other != build_trees(examples, same(tokenizer), Window(), train=True)
    monkeypatch.setattr(prompt, "QUESTION", "\n\nQ: {}\n\nAnswer:")
    cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
    assert len(list(folder.iterdir())) == 7


def test_a_prompts_options_and_a_tokenizers_eos_make_another_file_and_a_template_where_it_is_used(
    folder, examples, tiny_base
):
    def made(options: Prompt = Prompt(), **changes: str) -> str:
        """The name of the one new file, or nothing."""
        tokenizer, before = AutoTokenizer.from_pretrained(tiny_base), set(folder.glob("*"))
        for key, value in ({"chat_template": "{{ messages[0]['content'] }}"} | changes).items():
            setattr(tokenizer, key, value)
        built = cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True, options=options)
        assert built == build_trees(examples, same(tokenizer), Window(), train=True, options=options)
        return "".join(file.name for file in set(folder.glob("*")) - before)

    other_template = "{{ messages[0]['content'] }}."
    assert made() != ""
    assert made() == made(chat_template=other_template) == ""
    assert made(Prompt(order="both")) != ""
    assert made(eos_token="<pad>") != ""
    assert made(Prompt(chat=True)) != ""
    assert made(Prompt(chat=True)) == ""
    assert made(Prompt(chat=True), chat_template=other_template) != ""


DATA = ROOT / "common" / "data"


@pytest.mark.parametrize("module", sorted(file.name for file in DATA.glob("*.py")))
def test_a_change_to_any_file_that_decides_ids_makes_another_file(
    folder, tokenizer, examples, tmp_path, monkeypatch, module
):
    monkeypatch.setattr(cache, "CODE", shutil.copytree(DATA, tmp_path / "code"))
    made = set()
    for text in (None, "# changed\n", "# and again\n"):
        if text:
            (cache.CODE / module).write_text((cache.CODE / module).read_text() + text)
        for _ in range(2):
            cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
            new = set(folder.iterdir()) - made
            assert len(new) == 1, "another file, and the second time the same"
        made |= new
    assert len(made) == 3


def test_no_other_wing_decides_ids():
    program = "import sys, common.data.trees; print(*(m for m in sys.modules if m.startswith('common.')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    wings = {name.split(".")[1] for name in done.stdout.split() if name.count(".") > 1}
    assert wings == {"data"}


def test_what_an_order_leaves_of_the_window_makes_another_file(folder, tokenizer, examples, monkeypatch):
    for spare in (0, 8):
        monkeypatch.setattr(Prompt, "spare", lambda _self, _window, n=spare: n)
        built = cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
        assert built == build_trees(examples, same(tokenizer), Window(), train=True)
    assert len(list(folder.iterdir())) == 2


def test_another_tokenizers_makes_another_file(folder, tokenizer, examples, monkeypatch):
    for n, version in enumerate((cache.tokenizers_package.__version__, "9.9"), 1):
        monkeypatch.setattr(cache.tokenizers_package, "__version__", version)
        for _ in range(2):
            cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
            assert len(list(folder.iterdir())) == n


def test_a_broken_file_is_made_anew_and_a_folder_that_cannot_be_written_is_done_without(folder, tokenizer, examples):
    built = cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (b"", whole[: len(whole) // 2], bytes(flipped)):
        assert broken != whole
        file.write_bytes(broken)
        assert cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True) == built
        assert file.read_bytes() == whole
    file.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    assert cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True) == built


def test_a_disk_that_is_full_leaves_no_partial_file(folder, tokenizer, examples, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(cache.np, "savez", full)
    built = cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
    assert built == build_trees(examples, same(tokenizer), Window(), train=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("many", "kept"), [(20, True), (21, False)])
def test_few_questions_are_not_kept(folder, tokenizer, examples, monkeypatch, many, kept):
    assert len(examples) == 20
    monkeypatch.setattr(tokens, "MANY", many)
    built = cache.build_trees(Dataset(examples, "here"), same(tokenizer), Window(), train=True)
    assert built == build_trees(examples, same(tokenizer), Window(), train=True)
    assert folder.exists() == kept
