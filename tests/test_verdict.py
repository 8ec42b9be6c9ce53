"""A verdict says what the questions say, in words, and no more than they bear."""

import json

from common import squad
from common.errors import UserError
from common.verdict import compare, main

import pytest


def rows(right: str, articles: int = 17):
    """Of an evaluation: x is a right answer; questions go to articles in turn."""
    return {
        str(i): {"em": mark == "x", "f1": 1.0 if mark == "x" else 0.25, "article": f"article {i % articles}"}
        for i, mark in enumerate(right)
    }


def test_the_better_one_is_named_with_interval_counts_and_p():
    a, b = rows("x" * 160 + "." * 40), rows("x" * 60 + "." * 140)
    (verdict,) = compare([("adapted", "raw", a, b)])
    assert verdict.better
    assert (verdict.em_gain, verdict.f1_gain) == (50, 37.5)
    assert verdict.em_interval[0] < 50 < verdict.em_interval[1]
    assert (verdict.only_a, verdict.only_b) == (100, 0)
    low, high = verdict.em_interval
    assert str(verdict).startswith(f"adapted beats raw: +50.00 [{low:.2f}, {high:.2f}] EM, +37.50 [")
    assert str(verdict).endswith("100 against 0 questions, exact McNemar p < 1e-10")
    (other,) = compare([("raw", "adapted", b, a)])
    assert other.better is False
    assert "raw loses to adapted: -50.00 [" in str(other)


def test_what_may_be_chance_is_not_called_better():
    a, b = rows("x" * 103 + "." * 97), rows("x" * 95 + "." * 5 + "x" * 3 + "." * 97)
    (verdict,) = compare([("a", "b", a, b)])
    assert verdict.em_gain == 2.5
    assert verdict.better is None
    assert f"a and b cannot be told apart: +2.50 [{verdict.em_interval[0]:.2f}" in str(verdict)
    assert f"(a difference of {verdict.detectable:.1f} would mostly have been seen)" in str(verdict)
    assert verdict.detectable > 2.5


def test_a_gain_that_is_one_articles_is_not_called_better_whatever_single_questions_say():
    a, b = rows("x" * 400, articles=4), rows("x" * 400, articles=4)
    for i in range(0, 160, 4):  # 40 questions, all of article 0
        b[str(i)] |= {"em": False, "f1": 0.25}
    (verdict,) = compare([("a", "b", a, b)])
    assert verdict.p < 1e-10
    assert verdict.better is None


def test_several_tests_ask_more_of_each():
    a, b = rows("x" * 200), rows("x" * 194 + "." * 6)
    (alone,) = compare([("a", "b", a, b)])
    several = compare([("a", "b", a, b), ("c", "b", b, b), ("d", "b", b, b)])
    assert alone.p == several[0].p == pytest.approx(2 / 2**6)
    assert alone.p_adjusted == alone.p
    assert several[0].p_adjusted == pytest.approx(3 * alone.p)
    assert alone.better
    assert several[0].better is None
    assert "among 3 tests" in str(several[0])
    assert "among" not in str(alone)


def test_one_article_gives_no_interval_and_the_test_decides():
    (verdict,) = compare([("a", "b", rows("x" * 30, 1), rows("." * 30, 1))])
    assert verdict.em_interval is verdict.f1_interval is verdict.detectable is None
    assert verdict.better
    assert str(verdict).startswith("a beats b: +100.00 EM, +75.00 F1; ")


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        compare([("a", "b", rows("xx"), rows("xxx"))])
    assert compare([]) == []


def test_prediction_files_are_compared_with_the_first(tmp_path, dev_file, capsys):
    dev = squad.read(str(dev_file), "dev").examples
    gold = {e.id: e.answers[0].text for e in dev}
    files = {"right": gold, "half": dict(list(gold.items())[::2]), "wrong": dict.fromkeys(gold, "no")}
    paths = {name: tmp_path / f"{name}.json" for name in files}
    for name, texts in files.items():
        paths[name].write_text(json.dumps(texts))
    main([str(dev_file), *(str(paths[name]) for name in files)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{paths['right']}: EM 100.00 F1 100.00, n {len(dev)}"
    assert said[1] == f"{paths['half']}: EM 50.00 F1 50.00, n {len(dev)}, {len(dev) // 2} missing"
    assert len(said) == 5
    assert said[4].startswith(f"{paths['wrong']} loses to {paths['right']}: -100.00")
    assert said[4].endswith("within 1 EM of each other: p = 1")
    one = json.loads(dev_file.read_text())
    dev_file.write_text(json.dumps({**one, "data": [{**a, "title": "the only one"} for a in one["data"]]}))
    main([str(dev_file), str(paths["right"]), str(paths["wrong"])])
    assert "McNemar" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="usage: make compare"):
        main([str(dev_file), str(paths["right"])])
