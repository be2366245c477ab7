"""What `main.py` does besides training, evaluation and analysis: a flag names the command, the rest are its options.

A new command is a function `f(args) -> int | None` (an exit code, None is 0) in a file of its own, its flags in a group
of `util/args.py`, and one line below. Modules are imported when their command is asked for.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module

# flag -> (module, function); the flag is unset when its value is false or empty
COMMANDS: dict[str, tuple[str, str]] = {
    "strip": ("util.strip", "strip_command"),
    "infer": ("util.infer_command", "infer_command"),
    "check_data": ("util.check_data", "check_command"),
    "overfit_batch": ("util.overfit", "overfit_command"),
    "plot": ("util.plot", "plot_command"),
    "report": ("util.report", "report_command"),
    "attention_images": ("util.analysis.image_files", "attention_of_files"),
    "convert_data": ("datasets.convert", "convert_command"),
    "export": ("util.export", "export_command"),
}


def chosen_command(args: Namespace) -> Callable[[Namespace], int | None] | None:
    """Return the command whose flag is set, None if there is none: then `main.py` trains, evaluates or analyses."""
    for flag in given_commands(args):
        module, function = COMMANDS[flag]
        return getattr(import_module(module), function)
    return None


def given_commands(args: Namespace) -> list[str]:
    """Return the flags of commands that are set, in the order of the table."""
    return [flag for flag in COMMANDS if getattr(args, flag)]
