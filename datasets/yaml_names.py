"""The class names in a `data.yaml`, without a YAML library: only the forms in which such files write `names`.

names: [cat, "hot dog"]          names:            names:             names: {0: cat, 1: hot dog}
(may go over several lines)        - cat             0: cat
                                   - hot dog         1: hot dog
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from datasets.convert import read_text
from util.errors import UserError

# A text in quotes, or one without; commas, braces and colons inside quotes belong to the text.
QUOTED = r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\""
ITEM = re.compile(rf"\s*(?:(?P<key>\d+)\s*:\s+)?(?P<text>{QUOTED}|[^,'\"{{}}\[\]\s][^,{{}}\[\]]*?)\s*(?:,|$)", re.S)


def read_yaml_names(path: Path) -> list[str]:
    """Return the names under the key `names`, by class index.

    Raises:
        UserError: no such key, a form that is not one of the four, numbers that are not 0, 1, 2 ..., another count than
            `nc` says, or a file for key points.
    """
    lines = [_without_comment(line) for line in read_text(path).splitlines()]
    top = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\w+)\s*:(?:\s|$)", line))}
    if "kpt_shape" in top:
        raise UserError(f"{path} is of a data set of key points (kpt_shape), whose label files are not read")
    if "names" not in top:
        raise UserError(f"{path} has no `names:`; add it, or give --class_names FILE, a text file with one per line")
    start = top["names"]
    end = next((i for i in sorted(top.values()) if i > start), len(lines))
    first = lines[start].split(":", 1)[1].strip()
    rest = [line for line in lines[start + 1 : end] if line.strip() and line.strip() not in ("---", "...")]
    items = _flow_items(" ".join([first, *map(str.strip, rest)]), path) if first else _block_items(rest, path)
    keys = [key for key, _ in items]
    if None not in keys:
        items.sort()
        if sorted(keys) != list(range(len(keys))):
            raise UserError(f"{path}: the numbers of `names` are {sorted(keys)}; they must be 0, 1, 2 ... without gaps")
    names = [name for _, name in items]
    count = lines[top["nc"]].split(":", 1)[1].strip() if "nc" in top else str(len(names))
    if count != str(len(names)):
        raise UserError(f"{path} has {len(names)} names, but says `nc: {count}`")
    return names


def _flow_items(text: str, path: Path) -> list[tuple[int | None, str]]:
    """Return number and text of the entries of `[a, b]` or `{0: a, 1: b}`."""
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
        raise _unknown(path, text)
    inner, items, at = text[1:-1].strip(), [], 0
    while at < len(inner):
        match = ITEM.match(inner, at)
        if match is None or (match["key"] is not None) != (text[0] == "{"):
            raise _unknown(path, inner[at:])
        items.append(_item(match["key"], match["text"], path))
        at = match.end()
    return items


def _block_items(lines: list[str], path: Path) -> list[tuple[int | None, str]]:
    """Return number and text of lines `- a`, or of lines `0: a`."""
    items = []
    for line in lines:
        match = re.fullmatch(rf"\s*(?:-\s+|\s(?P<key>\d+)\s*:\s+)(?P<text>{QUOTED}|[^'\"\[\]{{}}&*!|>].*?)\s*", line)
        if match is None:
            raise _unknown(path, line.strip())
        items.append(_item(match["key"], match["text"], path))
    if len({key is None for key, _ in items}) > 1:
        raise _unknown(path, lines[0].strip())
    return items


def _item(key: str | None, text: str, path: Path) -> tuple[int | None, str]:
    text = text.strip()
    if text.startswith("'"):
        text = text[1:-1].replace("''", "'")
    elif text.startswith('"'):
        try:
            text = ast.literal_eval(text)  # the escapes of double quotes are Python's, as far as names need them
        except (SyntaxError, ValueError) as error:
            raise _unknown(path, text) from error
    elif re.search(r":(\s|$)", text):
        raise _unknown(path, text)
    return None if key is None else int(key), text


def _without_comment(line: str) -> str:
    """Return a line without its comment: a `#` outside quotes, at the beginning or after a space. Quotes open words."""
    quote = ""
    for i, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and line[:i].rstrip()[-1:] in ("", "[", "{", ",", ":", "-"):
            quote = sign
        elif sign == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line.rstrip()


def _unknown(path: Path, text: str) -> UserError:
    return UserError(
        f"{path}: `names` is read when written as [a, b], as {{0: a, 1: b}}, as lines `- a` or as lines `0: a`, not as "
        f"{text[:60]!r}; write it so, or give --class_names FILE, a text file with one name per line"
    )
