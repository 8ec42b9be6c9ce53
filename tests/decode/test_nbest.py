"""An n-best search finds the most probable quotes, by whatever engine, and bounds what it has not found."""

import itertools
import math
from dataclasses import replace

from common.config import Config, Decode, Eval
from common.data.squad import Example
from common.data.trees import build_trees
from common.decode import nbest, nbest_batched, single
from common.decode.answers import Task, stop_tokens
from common.decode.forward import Decoder
from common.decode.nbest import Answer, Ended, Path, Paths, Search, choose, to_prediction
from common.decode.predict import answer_trees, quotes_of
from common.decode.spans import automaton_of
from common.errors import UserError
from common.metrics.score import normalize
from tests.conftest import same
from tests.decode.test_predict import LIMIT, demo_trees, system
from tests.decode.test_spans import EOS, SPANS, allowed, quotes, vocabulary_of

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

NBEST = Decode(spans=True, nbest=4)
TOKENS = vocabulary_of()
LONGEST = 4  # tokens
Ids = tuple[int, ...]


def logprobs(seed: int, ids: Ids) -> np.ndarray:
    """What a model would say behind `ids`: of [V] tokens, steep enough that some answers are likely."""
    logits = 3 * np.random.default_rng([seed, *ids]).standard_normal(len(TOKENS.bytes))
    logits[EOS] += 3
    return logits - np.logaddexp.reduce(logits)


def every_path(context: str, seed: int) -> tuple[dict[Ids, float], Ids]:
    """The log-probability of every answer, by definition; and the greedy one."""
    whole, found = quotes(context, whole_words=False), dict[Ids, float]()

    def walk(ids: Ids, logprob: float, sofar: bytes) -> None:
        if len(ids) == LONGEST:
            found[ids] = logprob
            return
        next_ = logprobs(seed, ids)
        for token in allowed(TOKENS, whole, sofar):
            if token == EOS:
                found[ids] = logprob + next_[EOS]
            else:
                walk((*ids, token), logprob + next_[token], sofar + TOKENS.bytes[token])

    walk((), 0.0, b"")
    greedy, sofar = (), b""
    while len(greedy) < LONGEST:
        next_ = logprobs(seed, greedy)
        token = max(allowed(TOKENS, whole, sofar), key=lambda t: next_[t])
        if token == EOS:
            break
        greedy, sofar = (*greedy, token), sofar + TOKENS.bytes[token]
    return found, greedy


def searched(context: str, seed: int, n: int) -> Search:
    search = Search(Paths(automaton_of(TOKENS, context)), [EOS], LONGEST, n)
    given_ = set()
    while paths := search.wanted():
        assert len(paths) <= nbest.WIDTH
        for path in paths:
            assert path.ids not in given_
            given_.add(path.ids)
            search.found(path, logprobs(seed, path.ids)[search.tokens(path)])
    assert search.expanded == len(given_)
    return search


CONTEXT = st.text(st.sampled_from("aab é\n."), min_size=1, max_size=7).filter(lambda text: any(map(str.isalnum, text)))


@given(context=CONTEXT, seed=st.integers(0, 2**20), n=st.integers(1, 5), width=st.integers(1, 4))
def test_the_most_probable_answers_are_found_and_the_rest_is_bounded(context, seed, n, width):
    truth, greedy = every_path(context, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbest, "WIDTH", width)
        search = searched(context, seed, n)
    by_text: dict[str, list[float]] = {}
    for ids, logprob in truth.items():
        by_text.setdefault(normalize(search.paths.quotes.quote(list(ids)).text), []).append(logprob)
    for answer in search.answers.values():
        for ended in answer.ended:
            assert ended.logprob == pytest.approx(truth[ended.path.ids])
            steps = [logprobs(seed, ended.path.ids[:i])[t] for i, t in enumerate(ended.path.ids)]
            steps += [] if ended.cut else [logprobs(seed, ended.path.ids)[EOS]]
            assert ended.least == pytest.approx(min(steps))
            assert ended.cut == (len(ended.path.ids) == LONGEST)
        assert answer.best.logprob == max(e.logprob for e in answer.ended)
        assert answer.mass == pytest.approx(sum(math.exp(e.logprob) for e in answer.ended))
        assert len({e.path.ids for e in answer.ended}) == len(answer.ended)
    assert search.greedy.ids == greedy
    assert greedy in {e.path.ids for answer in search.answers.values() for e in answer.ended}
    for key, each in by_text.items():
        mine = search.answers[key].mass if key in search.answers else 0.0
        assert mine - 1e-9 <= sum(map(math.exp, each)) <= mine + search.rest + 1e-9
    total = sum(answer.mass for answer in search.answers.values())
    if search.expanded < nbest.EXPANSIONS * n and search.rest > nbest.REST * total:
        ranked = sorted(by_text, key=lambda key: -max(by_text[key]))[:n]
        best = sorted(search.answers, key=lambda key: -search.answers[key].best.logprob)[:n]
        assert best == ranked


@given(context=CONTEXT, seed=st.integers(0, 2**20))
def test_a_search_without_an_end_finds_all(context, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbest, "REST", 1e-12)
        patch.setattr(nbest, "EXPANSIONS", 10**6)
        search = searched(context, seed, 10**6)
    truth, _ = every_path(context, seed)
    found = {e.path.ids: e.logprob for answer in search.answers.values() for e in answer.ended}
    missing = truth.keys() - found.keys()
    assert sum(math.exp(truth[ids]) for ids in missing) <= search.rest + 1e-12 < 1e-9
    assert found == pytest.approx({ids: truth[ids] for ids in found})


def test_a_search_ends_at_its_budget_but_not_before_the_greedy_answer(monkeypatch):
    monkeypatch.setattr(nbest, "EXPANSIONS", 1)
    monkeypatch.setattr(nbest, "WIDTH", 1)
    search = searched("aabaab", 3, 1)
    assert search.greedy
    assert search.expanded == len(search.greedy.ids) + (len(search.greedy.ids) < LONGEST)


def of(*masses: tuple[str, list[tuple[int, float]]]) -> Search:
    """A search that is done: of each string its paths, as numbers of tokens and probabilities."""
    search = Search(Paths(automaton_of(TOKENS, "a")), [EOS], 9, 5)
    serial = itertools.count(1)
    for key, paths in masses:
        for tokens, probability in paths:
            path = Path((next(serial),) * (tokens - 1), 0.0, 0.0, np.zeros(0))
            ended = Ended(path, math.log(probability), 0.0, False)
            search.answers.setdefault(key, Answer(ended)).add(ended)
    return search


def test_answers_are_chosen_by_path_mass_or_risk():
    """By hand: x has the best path, y the most mass (.21 + .2), and b c shares words with most of the others."""
    search = of(("x", [(2, 0.3)]), ("y", [(2, 0.21), (3, 0.2)]), ("b c", [(4, 0.1)]), ("c", [(2, 0.19)]))
    assert choose(search, "path", 0) == "x"
    assert choose(search, "mass", 0) == "y"
    # expected F1: x .3, y .41, "b c" .1 + 2/3 * .19 = .227, c .19 + 2/3 * .1 = .257
    assert choose(search, "risk", 0) == "y"
    near = of(("x", [(2, 0.3)]), ("b c", [(4, 0.2)]), ("c", [(2, 0.28)]))
    assert choose(near, "mass", 0) == "x"
    assert choose(near, "risk", 0) == "c", "0.28 + 2/3 * 0.2 = 0.413"


def test_the_length_exponent_favours_long_answers_and_equal_ones_go_by_the_alphabet():
    search = of(("long", [(6, 0.1)]), ("short", [(2, 0.2)]))
    assert choose(search, "path", 0) == "short"
    assert math.log(0.1) / 6**0.5 > math.log(0.2) / 2**0.5
    assert choose(search, "path", 0.5) == choose(search, "mass", 0.5) == "long"
    assert choose(of(("b", [(2, 0.2)]), ("a", [(2, 0.2)])), "mass", 0) == "a"


# ---- engines ---------------------------------------------------------------------------------------------------------


def rows(found):
    return {id_: (a.text, a.token_ids, a.span, a.greedy, [text for text, _ in a.nbest]) for id_, a in found.items()}


def masses(found):
    return {(id_, text): mass for id_, a in found.items() for text, mass in a.nbest}


@pytest.mark.parametrize("order", ["context", "question"])
def test_every_engine_gives_the_same_answers_and_the_greedy_one_too(tiny_base, order):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 2), stop_tokens(tokenizer, model, SPANS)
    if order == "question":  # a tree of its own for each
        trees = [replace(tree, branches=(branch,)) for tree in trees for branch in tree.branches]
    ask = {"progress": None, "decode": NBEST}
    found = answer_trees(model, tokenizer, trees, stops, LIMIT, Eval(), **ask)
    greedy = answer_trees(model, tokenizer, trees, stops, LIMIT, progress=None, decode=SPANS)
    assert {id_: a.greedy for id_, a in found.items()} == {id_: a.text for id_, a in greedy.items()}
    for options in (Eval(pass_tokens=150), Eval("plain"), Eval("plain", pass_tokens=500)):
        other = answer_trees(model, tokenizer, trees, stops, LIMIT, options, **ask)
        assert rows(other) == rows(found)
        assert masses(other) == pytest.approx(masses(found), rel=1e-3)
        assert {i: a.logprob for i, a in other.items()} == pytest.approx({i: a.logprob for i, a in found.items()}, 1e-3)
    for tree in trees:
        for branch in tree.branches:
            answer = found[branch.id]
            assert tree.context[slice(*answer.span)] == answer.text
            ordered = [mass for _, mass in answer.nbest]
            assert ordered == sorted(ordered, reverse=True)
            assert 1 <= len(ordered) <= 4
            assert sum(ordered) + answer.rest <= 1 + 1e-6
            # its own path's log-probability, token by token by the modules
            ids = tree.prefix_ids + branch.prompt_ids + answer.token_ids[:-1]
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(answer.token_ids) :].log_softmax(-1)
            steps = logits.gather(1, torch.tensor(answer.token_ids)[:, None])
            assert answer.logprob == pytest.approx(steps.sum().item(), abs=1e-3)
            assert answer.least == pytest.approx(steps.min().item(), abs=1e-3)


def test_single_questions_are_searched_too(tiny_base):
    model, tokenizer = system(tiny_base)
    config = Config(system="x", base=None, decode=NBEST, eval=Eval(pass_tokens=300))
    context = "The otter sleeps at the north gate of Zürich in 1294. " * 30  # longer than the window
    example = Example("q", "", context, "Where does it sleep?", ())
    trees = build_trees([example], same(tokenizer), config.window, train=False).trees
    stops = stop_tokens(tokenizer, model, NBEST)
    expected = answer_trees(model, tokenizer, trees, stops, 32, progress=None, decode=NBEST)
    for options in (Eval(), Eval("plain")):
        engine = single.engine(model, stops, config.window, options, 0, NBEST)
        for _ in range(2):
            answer, (generation,), cut = single.ask(engine, same(tokenizer), example, config)
            assert rows({"q": answer}) == rows(expected)
            assert (generation.token_ids, generation.logprob, cut) == (answer.token_ids, answer.logprob, True)


def test_a_cache_for_few_questions_gives_the_same_answers_and_one_too_small_an_error(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree, *_), stops = demo_trees(tokenizer, 1), stop_tokens(tokenizer, model, SPANS)
    expected = answer_trees(model, tokenizer, [tree], stops, 8, progress=None, decode=NBEST)
    in_context = quotes_of(model, tokenizer, NBEST)
    task = Task(tokenizer, stops, 8, Eval(), lambda: None, {}, "x", lambda tree: in_context(tree.context), NBEST)
    alone = max(len(tree.prefix_ids) + len(b) for b in tree.branches) + nbest.WIDTH * 7
    for capacity in (alone, 2 * alone, 5 * alone):
        found = nbest_batched.answers(Decoder(model, capacity), [tree], task, 2000)
        found = {q.branch.id: to_prediction(q.search, q.branch, NBEST) for q in found}
        assert rows(found) == rows(expected)
    with pytest.raises(UserError, match=r"takes .* tokens, and memory is for 100"):
        list(nbest_batched.answers(Decoder(model, 100), [tree], task, 2000))


def test_a_pass_keeps_to_its_tokens_and_rows_and_feeds_what_no_lane_holds(tiny_base):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 6), stop_tokens(tokenizer, model, SPANS)
    in_context, passes, decoder = quotes_of(model, tokenizer, NBEST), [], Decoder(model, 9000)
    logits = decoder.logits
    decoder.logits = lambda new: passes.append((len(new.ids), len(new.keep))) or logits(new)
    task = Task(tokenizer, stops, 8, Eval(), lambda: None, {}, "x", lambda tree: in_context(tree.context), NBEST)
    most = max(map(len, trees)) + 40
    found = list(nbest_batched.answers(decoder, trees, task, most))
    assert len(found) == sum(len(tree.branches) for tree in trees)
    assert all(tokens <= most + nbest.WIDTH * 7 for tokens, _ in passes)
    assert all(rows <= most / 4 + max(len(tree.branches) for tree in trees) for _, rows in passes)
    fed = sum(tokens for tokens, _ in passes) - sum(map(len, trees))
    expanded = sum(question.search.expanded - 1 for question in found)
    assert expanded <= fed < 1.5 * expanded, "hardly more than one token for each path"


def test_logits_that_are_not_finite_name_the_question(tiny_base):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 1), stop_tokens(tokenizer, model, SPANS)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    for engine in ("auto", "plain"):
        with pytest.raises(UserError, match=r"question .*: logits that are not finite"):
            answer_trees(model, tokenizer, trees, stops, 8, Eval(engine), progress=None, decode=NBEST)
