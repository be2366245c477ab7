"""The parser behind `main.py`: help without empty defaults, and a guess at what a misspelt flag was meant to be."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to the help, except where there is nothing to say: no text, no list, none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        says_it = "%(default)" in text or "(default:" in text
        # store_false is the wrong way round: "(default: True)" behind --no_aux_loss would read as if it were given.
        turns_off = action.const is False and action.nargs == 0
        if says_it or turns_off or action.default in (None, "", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the flags which a misspelt one resembles."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        kind, _, words = message.partition("unrecognized arguments: ")
        if words and not kind:
            given = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
            near = {word: difflib.get_close_matches(word, flags, n=1, cutoff=0.7) for word in given}
            guesses = [f"{found[0]} for {word}" for word, found in near.items() if found]
            if guesses:
                message += f"\ndid you mean {', '.join(guesses)}?"
        super().error(message)
