"""The rules are compared on one search each, paired with the greedy answers."""

import json

from benchmarks import nbest
from common.errors import UserError

import pytest


def test_every_rule_is_paired_with_the_greedy_answers(answering_config, capsys):
    nbest.main([str(answering_config), "lora=null", "window.answer=16", "--rounds", "2"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["n"], len(found["seconds"]["greedy"]), len(found["seconds"]["nbest"])) == (48, 2, 2)
    assert found["expanded"] > 1
    assert [(row["choose"], row["length_exponent"]) for row in found["rules"]] == nbest.RULES
    (greedy,) = (line for line in lines if line.startswith("greedy "))
    assert f"EM {found['em']:6.2f}" in greedy
    for row in found["rules"]:
        low, high = row["em_interval"]
        assert low <= row["em"] <= high
        assert f"{row['choose']:6} {row['length_exponent']:<5} EM {row['em']:+6.2f}" in "\n".join(lines)


def test_a_model_of_another_engine_is_refused(answering_config):
    with pytest.raises(UserError, match=r"a Llama is needed, and eval\.engine=auto"):
        nbest.main([str(answering_config), "lora=null", "eval.engine=plain"])
    with pytest.raises(UserError, match="--rounds must be 1 or more"):
        nbest.main([str(answering_config), "lora=null", "--rounds", "0"])
