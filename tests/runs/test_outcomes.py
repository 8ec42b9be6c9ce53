"""An outcome holds what a table and a paired test need, in a few kB, and names no file of its machine."""

import json
import random
from dataclasses import replace

from common.config import Decode, load
from common.data.squad import Dataset
from common.errors import UserError
from common.runs import outcomes, record

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROW = st.tuples(st.booleans(), st.sampled_from([0.0, 0.285714, 0.5, 0.666667, 1.0]), st.sampled_from("abc"))


def made(rows: list[tuple[bool, float, str]]) -> dict[str, dict]:
    return {f"q{i}": {"em": em, "f1": f1, "article": article} for i, (em, f1, article) in enumerate(rows)}


@given(st.lists(ROW, max_size=50))
def test_rows_come_back_in_their_order(rows):
    found = outcomes.unpacked(json.loads(json.dumps(outcomes.packed(made(rows)))))
    assert list(found.values()) == list(made(rows).values())


def test_a_byte_holds_256_pairs_of_em_and_f1():
    rows = {str(i): {"em": False, "f1": i / 300, "article": "a"} for i in range(257)}
    assert len(outcomes.unpacked(outcomes.packed(dict(list(rows.items())[:256])))) == 256
    with pytest.raises(UserError, match="257 different pairs"):
        outcomes.packed(rows)


def test_other_questions_have_other_names():
    rows = made([(True, 1.0, "a")])
    both = {**rows, "q1": rows["q0"]}
    assert outcomes.unpacked(outcomes.packed(both)).keys().isdisjoint(outcomes.unpacked(outcomes.packed(rows)))
    same, other = outcomes.unpacked(outcomes.packed(rows)), outcomes.unpacked(outcomes.packed({"x": rows["q0"]}))
    assert same.keys() == outcomes.unpacked(outcomes.packed(made([(False, 0.0, "a")]))).keys()
    assert same.keys() != other.keys()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tuned.yaml").write_text(
        f"system: tuned\nbase: {{path: somewhere}}\nlora: {{rank: 4}}\nruns: {tmp_path / 'runs'}\n"
    )
    return load(str(tmp_path / "tuned.yaml"))


def finished(config, rows: dict[str, dict], random_weights: bool = False):
    """Finished runs of a training and an evaluation, as the scripts leave them."""
    data, device = Dataset([], "/home/somebody/dev-v1.1.json"), {"name": "a test"}
    train = record.new_run(config, "train")
    result = {"run": str(train), "trained_weights": 1, "frozen_weights": 500, "questions_per_s": 10.0, "peak": {}}
    record.write(train, config, "train", data, device, {**result, "window_counts": {"kept": 1}})
    scored = replace(config, adapter=str(train / "best"))
    run = record.new_run(scored, "eval")
    em, f1 = (100 * sum(row[name] for row in rows.values()) / len(rows) for name in ("em", "f1"))
    lines = [{"id": id_, "text": "x", "hit_limit": False, "logprob": None, **row} for id_, row in rows.items()]
    (run / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"em": em, "f1": f1, "n": len(rows), "run": str(run), "adapter": str(train / "best"), "trained_with": {}}
    record.write(run, scored, "eval", data, device, result)
    return train, run


def test_an_outcome_is_small_whole_and_without_paths(config, tmp_path):
    rng = random.Random(0)
    scores = [2 * k / (k + n) for n in range(1, 12) for k in range(1, n + 1)]
    rows = {}
    for i in range(10_570):
        em = rng.random() < 0.7
        rows[f"{rng.getrandbits(96):024x}"] = {
            "em": em,
            "f1": 1.0 if em else round(rng.choice([0.0, *scores]), 6),
            "article": f"An article of Wikipedia {i * 48 // 10_570}",
        }
    path = outcomes.keep(config, *finished(config, rows), tmp_path / "new" / "kept")
    assert path.stat().st_size <= 20_000
    assert path.stem == outcomes.name_of(config)
    text = path.read_text()
    assert str(tmp_path) not in text.replace(str(tmp_path / "tuned"), "")
    assert "/home" not in text
    assert "dev-v1.1.json" in text
    found = outcomes.read_one(path)
    assert list(found.rows.values()) == list(rows.values())
    assert found.evaluation["result"]["em"] == pytest.approx(100 * sum(r["em"] for r in rows.values()) / len(rows))
    assert found.train["result"]["frozen_weights"] == 500
    assert found.device == "a test"
    assert json.loads(text)["train"]["result"].keys().isdisjoint({"run", "window_counts"})
    assert json.loads(text)["eval"]["result"].keys().isdisjoint({"run", "adapter", "trained_with"})
    assert outcomes.read_all(tmp_path / "new" / "kept").keys() == {path.stem}


def test_a_name_says_what_decides_the_answers_and_nothing_else(config):
    name = outcomes.name_of(config)
    same = [
        replace(config, runs="elsewhere"),
        replace(config, eval=replace(config.eval, memory_budget_gib=24.0)),
        replace(config, train=replace(config.train, memory_budget_gib=9.0)),
        replace(config, bench=replace(config.bench, queries=5)),
    ]
    assert {outcomes.name_of(one) for one in same} == {name}
    other = [
        replace(config, seed=1),
        replace(config, lora=replace(config.lora, rank=8)),
        replace(config, decode=Decode(spans=True)),
        replace(config, data=replace(config.data, dev_questions=5)),
    ]
    assert len({outcomes.name_of(one) for one in other} | {name}) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["eval"]["result"].update(em=99.0), "its record says EM 99.0 of 4, its rows 75.0 of 4"),
        (lambda d: d["eval"]["result"].update(n=5), "of 5, its rows"),
        (lambda d: d["questions"].update(of_question="AAAA"), "not a readable outcome"),
        (lambda d: d["questions"]["articles"].pop(), "not a readable outcome"),
        (lambda d: d["questions"]["pairs"].pop(), "not a readable outcome"),
        (lambda d: d.update(schema=2), "schema 2, and this code reads 1"),
        (lambda d: d.pop("eval"), "not a readable outcome"),
        (lambda d: d.update(eval=None), "not a readable outcome"),
    ],
)
def test_a_damaged_file_is_named(config, tmp_path, damage, message):
    rows = made([(True, 1.0, "a"), (True, 1.0, "a"), (True, 1.0, "b"), (False, 0.5, "b")])
    path = outcomes.keep(config, *finished(config, rows), tmp_path)
    found = json.loads(path.read_text())
    damage(found)
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=message) as caught:
        outcomes.read_all(tmp_path)
    assert str(path) in str(caught.value)
