"""Class names of a data.yaml in every form that such files have, and no guess about others."""

from __future__ import annotations

from pathlib import Path

import pytest

from datasets.yaml_names import read_yaml_names
from util.errors import UserError

FORMS = {
    "names: [cat, hot dog]\n": ["cat", "hot dog"],
    "train: ../train/images\nnc: 2\nnames: ['cat', \"hot dog\"]  # two\nroboflow:\n  license: x\n": ["cat", "hot dog"],
    "names: [\n  'a, b',   # one\n  \"c # d\",\n  driver's,\n]\nnc: 3": ["a, b", "c # d", "driver's"],
    "names:\n  - cat\n  - 'it''s'\n  - \"t\\u00e9\"\nnc: 3\n": ["cat", "it's", "té"],
    "names:\n- cat\n- hot dog # two words\nval: x\n": ["cat", "hot dog"],
    "# COCO8\nnames:\n  0: cat\n\n  1: traffic light # red\n  2: 'no: 3'\n": ["cat", "traffic light", "no: 3"],
    "names:\n  1: b\n  0: a\n": ["a", "b"],
    "names: {0: cat, 1: 'a}b'}\n": ["cat", "a}b"],
    "names: ['1', 2, yes, http://x]": ["1", "2", "yes", "http://x"],
    "\ufeffnames: [cat]\r\nnc: 1\r\n": ["cat"],
}


@pytest.mark.parametrize("text", FORMS)
def test_names_are_read_in_every_usual_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_bytes(text.encode())
    assert read_yaml_names(path) == FORMS[text]


REFUSED = {
    "nc: 2\n": "has no `names:`",
    "names: [a, b]\nnc: 3\n": "has 2 names, but says `nc: 3`",
    "names:\n  0: a\n  2: b\n": r"numbers of `names` are \[0, 2\]",
    "names: [a\n": "not as '\\[a'",
    "names: cat\n": "not as 'cat'",
    "names: *other\n": "not as",
    "names:\n  - [a, b]\n": "not as",
    "names:\n  - name: cat\n": "not as 'name: cat'",
    "names:\n  cat: 0\n": "not as 'cat: 0'",
    "names:\n  - a\n  1: b\n": "not as",
    "names: [0: a]\n": "not as",
    "kpt_shape: [17, 3]\nnames: [person]\n": "key points",
}


@pytest.mark.parametrize("text", REFUSED)
def test_other_forms_are_refused_with_the_way_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=REFUSED[text]) as caught:
        read_yaml_names(path)
    assert "data.yaml" in str(caught.value)
