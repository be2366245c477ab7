"""The page of common failures names only flags, files and messages that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from util.args import get_args_parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "configs" / "troubleshooting.md").read_text()
FOLDERS = ("configs", "datasets", "models", "ops", "util")
FOREIGN = {"--inplace"}  # of setuptools
CODE = re.compile(r"`([^`]+)`")
MESSAGES = [text for line in PAGE.splitlines() if line.startswith("- Said: ") for text in CODE.findall(line)]
MESSAGES = [text for text in MESSAGES if not text.startswith("--check_data")]  # who says it


def texts_of(source: str) -> set[str]:
    """Return the constant parts of all strings of a module; adjacent literals are one string."""
    return {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@cache
def texts() -> list[set[str]]:
    """Return the texts of every module of the project."""
    files = [ROOT / "main.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [texts_of(path.read_text()) for path in files]


def is_said(message: str, modules: list[set[str]]) -> bool:
    """Say whether one module has all parts of a message between its dots, those with letters in them."""
    parts = [part.strip() for part in message.split("...") if re.search("[a-z]{2}", part)]
    return bool(parts) and any(all(any(part in t for t in module) for part in parts) for module in modules)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_there_are_twenty_failures_and_the_contents_lead_to_all_of_them() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert [heading.split(".")[0] for heading in headings] == [str(i) for i in range(1, 21)]
    links = re.findall(r"^(\d+)\. \[.+\]\(#(.+)\)$", PAGE, re.MULTILINE)
    assert links == [(str(i), slug(heading)) for i, heading in enumerate(headings, start=1)]


def test_every_failure_has_a_reason_and_a_cure() -> None:
    for part in PAGE.split("\n## ")[1:]:
        assert [part.count("\n- Why: "), part.count("\n- Cure: ")] == [1, 1], part


def test_every_flag_exists() -> None:
    named = set(re.findall(r"--[a-z][\w-]*", PAGE))
    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert len(named) > 40
    assert named - known - FOREIGN == set()


def test_every_file_of_the_project_exists() -> None:
    named = set(re.findall(rf"\b(?:(?:{'|'.join(FOLDERS)})/[\w./]+|main\.py)", PAGE))
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_in_the_code(message: str) -> None:
    assert is_said(message, texts())


def test_a_message_is_missed_when_its_words_change_or_stand_in_two_files() -> None:
    module = texts_of("print(f'image {a} is ' f'too large: {b} pixels')")
    assert is_said("image ... is too large: ... pixels", [module])
    assert not is_said("image ... is much too large", [module])
    assert not is_said("image ... is too large", [texts_of("'image '"), texts_of("' is too large'")])
    assert not is_said("...", [module])
