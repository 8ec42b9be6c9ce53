"""What is wrong with a command line is one line, with what was probably meant."""

from common.arguments import SCRIPTS, parse, parser
from common.errors import UserError
from common.parser import Parser

import pytest


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("train_loop", ["raw7b", "--forse"], 'train_loop: unrecognized arguments: --forse — did you mean "--fresh"?'),
        ("eval_loop", ["raw7b", "--forse"], 'eval_loop: unrecognized arguments: --forse — did you mean "--force"?'),
        ("train_loop", ["raw7b", "--fres"], 'train_loop: unrecognized arguments: --fres — did you mean "--fresh"?'),
        ("train_loop", ["raw7b", "--lr=1"], 'train_loop: unrecognized arguments: --lr=1 — did you mean "train.lr"?'),
        (
            "ask",
            ["raw7b", "--max-new-tokens", "3"],
            'ask: unrecognized arguments: --max-new-tokens 3 — did you mean "window.answer"?',
        ),
        ("export", ["raw7b", "out", "--questions", "x"], "export: argument --questions: invalid int value: 'x'"),
        ("eval_loop", [], "eval_loop: the following arguments are required: model, key=value"),
    ],
)
def test_a_wrong_argument_is_one_line_with_what_was_meant(script, words, says):
    with pytest.raises(UserError) as caught:
        parse(script, words)
    assert str(caught.value) == says


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_is_for(script, capsys):
    with pytest.raises(SystemExit) as caught:
        parser(script).parse_args(["--help"])
    assert caught.value.code == 0
    assert " ".join(SCRIPTS[script].split()) in " ".join(capsys.readouterr().out.split())


def test_settings_may_stand_before_and_after_flags_and_are_known_as_typed():
    config, args = parse("eval_loop", ["smollm2-raw", "seed=3", "--fresh", "window={answer: 48}"])
    assert (config.seed, config.window.answer) == (3, 48)
    assert (args.fresh, args.force, args.replay) == (True, False, None)
    assert args.given == {"seed", "window.answer"}


def test_of_a_parser_with_commands_the_inner_ones_speak_alike():
    commands = Parser("Packs.", "bundle", add_help=False).add_subparsers(dest="command")  # newer Pythons pass options
    commands.add_parser("pack").add_argument("--have")
    with pytest.raises(UserError, match="unrecognized arguments: --hav"):
        commands.choices["pack"].parse_args(["--hav", "x"])
