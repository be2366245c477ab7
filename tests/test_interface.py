"""Rules of the code base that every change must keep."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("models", "datasets", "util", "ops") for p in sorted((ROOT / folder).rglob("*.py"))]
SCHEMES = {p.stem for p in (ROOT / "models" / "groups").glob("*.py")} - {"__init__", "base", "matching", "positives"}


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)


def test_the_public_names_that_forks_import_are_there() -> None:
    from datasets import build_dataset
    from main import get_args_parser
    from models import build_model
    from ops import ms_deform_attn
    from util.checkpoint import load_weights

    assert all(callable(f) for f in (build_dataset, get_args_parser, build_model, ms_deform_attn, load_weights))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_args_end_at_the_build_functions(path: Path) -> None:
    for node in classes(path):
        init = constructor(node)
        names = [a.arg for a in (init.args.args + init.args.kwonlyargs)] if init else []
        if path.name != "train_state.py":  # keeps the arguments as plain data of a checkpoint, reads none
            assert "args" not in names, f"{node.name} takes args: give it typed keywords"
        used = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"]
        assert not used, f"{node.name} reads args.{used[0].attr}" if used else ""


def words_of_code(path: Path) -> str:
    """Return the code of a file without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return "\n".join(ast.unparse(node) for node in tree.body)


def test_no_training_scheme_is_named_outside_its_file() -> None:
    core = [p for p in (ROOT / "models").rglob("*.py") if p.parent.name != "groups"]
    core += [ROOT / "main.py", ROOT / "util" / "engine.py", ROOT / "util" / "structures.py"]
    for path in core:
        code = words_of_code(path)
        for word in (*SCHEMES, "one2many", "OneToMany"):
            assert word not in code, f"{path.relative_to(ROOT)} names the scheme {word}"


def test_models_and_datasets_never_import_each_other() -> None:
    for folder, other in (("models", "datasets"), ("datasets", "models"), ("ops", "models"), ("ops", "util")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            imported = [
                n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, (ast.Import, ast.ImportFrom))
            ]
            wrong = [m for m in imported if m and m.split(".")[0] == other]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong[0]}"
