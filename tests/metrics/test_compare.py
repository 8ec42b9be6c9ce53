"""A verdict says what the questions say, in words, and no more than they bear."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.metrics import compare as module
from common.metrics.compare import Verdict, compare, main

import pytest


def rows(right: str, articles: int = 17):
    """Of an evaluation: x is a right answer; questions go to articles in turn."""
    return {
        str(i): {"em": mark == "x", "f1": 1.0 if mark == "x" else 0.25, "article": f"article {i % articles}"}
        for i, mark in enumerate(right)
    }


# em of a and b, f1 of a and b
TWO_ARTICLES = {
    "P": [(1, 0, 1, 0.5), (1, 0, 1, 0), (1, 0, 1, 0.25), (1, 1, 1, 1)],
    "Q": [(1, 0, 1, 0.75), (0, 1, 0.5, 1), (1, 1, 1, 1), (0, 0, 0, 0.5), (0, 0, 0.5, 0.5), (0, 0, 0, 0)],
}
T = 12.706205, 1.376382  # tables of t with one degree of freedom: at 0.975 and at 0.8


def side(i: int):
    return {
        f"{article}{n}": {"em": bool(row[i]), "f1": row[2 + i], "article": article}
        for article, found in TWO_ARTICLES.items()
        for n, row in enumerate(found)
    }


def test_every_figure_of_a_verdict_is_its_own():
    """Of two articles the interval is the range of their means: 3 of 4 and 0 of 6 in EM, 2.25 and -0.75 in F1."""
    a, b = side(0), side(1)
    (verdict, other) = compare([("new", "old", a, b), ("same", "old", b, b)])
    error = math.sqrt(2 * (1.8**2 + 1.8**2)) / 10  # the articles' sums of EM, 3 and 0, less 4 and 6 times the mean 0.3
    assert verdict == Verdict(
        a="new",
        b="old",
        em_gain=pytest.approx(30),
        em_interval=(pytest.approx(0), pytest.approx(75)),
        f1_gain=pytest.approx(15),
        f1_interval=(pytest.approx(-12.5), pytest.approx(56.25)),
        only_a=4,
        only_b=1,
        p=pytest.approx(2 * (1 + 5) / 2**5),
        p_adjusted=pytest.approx(0.75),
        tests=2,
        detectable=pytest.approx(100 * sum(T) * error, rel=1e-6),
    )
    assert str(verdict) == (
        "new and old cannot be told apart: +30.00 [0.00, 75.00] EM (a difference of 507.0 would mostly have been seen),"
        " +15.00 [-12.50, 56.25] F1; right where the other is wrong: 4 against 1 questions, exact McNemar p = 0.38, "
        "p = 0.75 among 2 tests"
    )
    assert str(other) == (
        "same and old cannot be told apart: +0.00 [0.00, 0.00] EM, +0.00 [0.00, 0.00] F1; "
        "right where the other is wrong: 0 against 0 questions, exact McNemar p = 1, p = 1 among 2 tests"
    )


@pytest.mark.parametrize(
    ("change", "better"),
    [
        ({}, True),
        ({"em_gain": 0.5}, True),
        ({"em_gain": -0.5}, False),
        ({"p_adjusted": 0.05}, None),
        ({"p_adjusted": 0.0499}, True),
        ({"p": 0.9}, True),  # what is adjusted decides
        ({"em_interval": (0.0, 3.0)}, None),
        ({"em_interval": (0.01, 3.0)}, True),
        ({"em_interval": (-3.0, 0.0), "em_gain": -2.0}, None),
        ({"em_interval": (-3.0, -0.01), "em_gain": -2.0}, False),
        ({"em_interval": None}, True),
        ({"em_interval": None, "p_adjusted": 0.06}, None),
        ({"f1_interval": (-1.0, 1.0), "f1_gain": -1.0}, True),  # EM decides
    ],
)
def test_both_the_adjusted_p_and_the_interval_of_em_must_say_so(change, better):
    verdict = Verdict("a", "b", 2.0, (1.0, 3.0), 1.0, (0.5, 1.5), 30, 10, 0.01, 0.02, 1, 1.4)
    assert replace(verdict, **change).better is better


@pytest.mark.parametrize(
    ("p", "words"), [(1e-10, "p = 1e-10"), (9.99e-11, "p < 1e-10"), (0.0316, "p = 0.032"), (1.0, "p = 1")]
)
def test_a_p_has_two_digits_or_is_very_small(p, words):
    verdict = Verdict("a", "b", 2.0, (1.0, 3.0), 1.0, (0.5, 1.5), 30, 10, p, p, 1, 1.4)
    assert str(verdict).endswith(f"30 against 10 questions, exact McNemar {words}")


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


# ---- make compare --------------------------------------------------------------------------------------------------


@pytest.fixture
def dev(tmp_path):
    """Three questions of article P and two of article Q, which all ask for `red stone`."""
    context = "the red stone"
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {"id": f"{title}{i}", "question": "?", "answers": [{"text": "red stone", "answer_start": 4}]}
                        for i in range(n)
                    ],
                }
            ],
        }
        for title, n in (("P", 3), ("Q", 2))
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"data": data}))
    return tmp_path / "dev.json"


def predictions(path, **texts: str) -> str:
    path.write_text(json.dumps(texts))
    return str(path)


@pytest.fixture
def files(tmp_path):
    first = dict.fromkeys(("P0", "P1", "P2", "Q1"), "red stone") | {"Q0": "red"}
    other = {"P0": "red", "P1": "stone", "P2": "The red stone!", "Q0": "red stone"}
    return [
        predictions(tmp_path / f"{name}.json", **texts)
        for name, texts in (("first", first), ("other", other), ("same", first))
    ]


def test_prediction_files_are_compared_with_the_first(dev, files, capsys):
    main([str(dev), *files])
    first, other, same = files
    error = 100 * math.sqrt(2 * (0.8**2 + 0.8**2)) / 5  # the articles' sums, -2 and 0, less 3 and 2 times the mean -0.4
    alike = 0.5 + math.atan((0.4 - 0.01) * 100 / error) / math.pi  # Student's t with one degree of freedom
    assert capsys.readouterr().out.splitlines() == [
        f"{first}: EM 80.00 F1 93.33, n 5",
        f"{other}: EM 40.00 F1 66.67, n 5, 1 missing",
        f"{same}: EM 80.00 F1 93.33, n 5",
        f"{other} and {first} cannot be told apart: -40.00 [-66.67, 0.00] EM "
        f"(a difference of {sum(T) * error:.1f} would mostly have been seen), -26.67 [-33.33, -22.22] F1; "
        "right where the other is wrong: 1 against 3 questions, exact McNemar p = 0.62, p = 1 among 2 tests; "
        f"within 1 EM of each other: p = {alike:.2g}",
        f"{same} and {first} cannot be told apart: +0.00 [0.00, 0.00] EM, +0.00 [0.00, 0.00] F1; "
        "right where the other is wrong: 0 against 0 questions, exact McNemar p = 1, p = 1 among 2 tests; "
        "within 1 EM of each other: p = 0",
    ]


def test_of_one_article_files_are_compared_without_intervals(dev, files, capsys):
    dev.write_text(dev.read_text().replace('"title": "Q"', '"title": "P"'))
    main([str(dev), *files[:2]])
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"{files[1]} and {files[0]} cannot be told apart: -40.00 EM, -26.67 F1; "
        "right where the other is wrong: 1 against 3 questions, exact McNemar p = 0.62"
    ]


def test_two_files_at_least_are_compared_on_a_dev_set(dev, files, tmp_path):
    with pytest.raises(UserError, match="usage: make compare"):
        main([str(dev), files[0]])
    with pytest.raises(UserError, match=r"no such file \(data\.dev\)"):
        main([str(tmp_path / "absent.json"), *files])


def test_the_margin_within_which_two_are_alike_is_one_point_of_em(dev, files, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "equivalence", lambda *of: asked.append(of) or 0.0316)
    main([str(dev), *files[:2]])
    articles = {"P0": "P", "P1": "P", "P2": "P", "Q0": "Q", "Q1": "Q"}
    assert asked == [({"P0": -1, "P1": -1, "P2": 0, "Q0": 1, "Q1": -1}, articles, 0.01)]
    assert capsys.readouterr().out.endswith("; within 1 EM of each other: p = 0.032\n")


def test_it_is_a_program(dev, files, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["verdict.py", str(dev), *files[:2]])
    runpy.run_path(module.__file__, run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr("sys.argv", ["verdict.py", str(dev), files[0]])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(module.__file__, run_name="__main__")
    assert capsys.readouterr().err.startswith("error: usage: make compare")


def test_names_may_stand_in_one_word_as_a_shell_takes_them_apart(dev, files, tmp_path, capsys):
    odd = tmp_path / "predictions (1).json"
    odd.write_bytes(Path(files[1]).read_bytes())
    main([str(dev), f"{files[0]} '{odd}'"])
    apart = capsys.readouterr().out
    main([str(dev), files[0], str(odd)])
    assert capsys.readouterr().out == apart
    assert f"{odd}: EM 40.00" in apart


def test_a_file_that_answers_none_of_the_questions_is_no_system(dev, files, tmp_path):
    other = predictions(tmp_path / "other.json", X="red")
    with pytest.raises(UserError, match=f"{other}: none of its 1 answers is to a question of"):
        main([str(dev), files[0], other])


def test_an_open_quote_is_one_line(dev):
    with pytest.raises(UserError, match=r"^PRED=it's\.json b: No closing quotation; quote"):
        main([str(dev), "it's.json b"])
