"""The tiny model that other tests are about does answer, in every number format, and learns in a few steps."""

import json

import eval_loop
import train_loop

import pytest


def result(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("how", ["base.quant=none", "base.quant=nf4", "base.dtype=bf16", "base.dtype=fp16"])
def test_it_copies_ends_by_itself_and_is_sometimes_wrong(answering_config, tmp_path, capsys, how):
    eval_loop.main([str(answering_config), "lora=null", how])
    found = result(capsys)
    rows = [json.loads(line) for line in (tmp_path / found["run"] / "questions.jsonl").read_text().splitlines()]
    assert 20 < found["em"] < found["f1"] < 70
    assert {row["text"] for row in rows if row["em"]} == {"otter", "heron", "harbour", "north gate"}
    assert {row["text"] for row in rows if row["f1"] not in (0, 1)} == {"old", " ".join(["badger"] * 32)}
    assert {row["text"].partition(" ")[0] for row in rows if row["hit_limit"]} == {"badger"}
    assert all(len(row["token_ids"]) == len(row["text"].split()) + (not row["hit_limit"]) for row in rows)


@pytest.mark.parametrize("how", ["base.dtype=fp32", "base.dtype=bf16"])
def test_it_learns_what_can_be_learned(answering_config, capsys, how):
    train_loop.main([str(answering_config), how])
    found = result(capsys)
    assert 60 < found["em"] < 90  # of two animals it can't know which one is meant
    assert found["best_step"] > 4
