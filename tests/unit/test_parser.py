"""`main.py --help` and what it says to misspelt flags."""

import pytest

from main import get_args_parser
from util.parser import HelpFormatter, Parser


def _error(capsys, *given):
    with pytest.raises(SystemExit) as ended:
        get_args_parser().parse_args(list(given))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_misspelt_flag_is_refused_with_the_flag_it_resembles(capsys):
    said = _error(capsys, "--two_stag", "--lr=1", "--with-box-refine", "--batchsize=2")
    assert "unrecognized arguments: --two_stag --with-box-refine --batchsize=2" in said
    wanted = "--two_stage for --two_stag, --with_box_refine for --with-box-refine, --batch_size for --batchsize?"
    assert said.rstrip().endswith("did you mean " + wanted)


def test_a_word_that_resembles_no_flag_gets_no_guess(capsys):
    assert "did you mean" not in _error(capsys, "--zzzzz", "photo.jpg")


def test_other_mistakes_are_said_as_argparse_says_them(capsys):
    assert "did you mean" not in _error(capsys, "--epochs", "many")


def test_help_leaves_out_defaults_that_say_nothing():
    parser = Parser("x", formatter_class=lambda prog: HelpFormatter(prog, max_help_position=20), add_help=False)
    parser.add_argument("--text", metavar="T", default="", help="a text")
    parser.add_argument("--many", metavar="M", nargs="+", default=[], help="a list")
    parser.add_argument("--own", metavar="O", help="own words (default: 1 2 3)")
    parser.add_argument("--no_loss", dest="loss", action="store_false", help="no loss")
    parser.add_argument("--number", metavar="N", type=int, default=0, help="a number")
    parser.add_argument("--on", action="store_true", help="a switch")
    lines = parser.format_help().splitlines()
    own = ("a text", "own words (default: 1 2 3)", "no loss")
    for wanted in (*own, "a number (default: 0)", "a switch (default: False)"):
        assert any(line.endswith("  " + wanted) for line in lines), wanted
    assert any(line.endswith("a list") for line in lines)
