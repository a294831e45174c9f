"""How many properties there are: one place that counts them."""

from __future__ import annotations

import ast
from pathlib import Path

MINIMUM = 30


def properties(source: str) -> list[str]:
    """Names of the tests of a file that hypothesis draws examples for."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d).startswith("given(") for d in f.decorator_list)]


def test_there_are_at_least_thirty_properties():
    """Protects the promise of the package: at least thirty properties, each with a name of its own."""
    found = [name for path in Path(__file__).parent.glob("test_*.py") for name in properties(path.read_text())]
    assert len(found) == len(set(found))
    assert len(found) >= MINIMUM


def test_only_tests_with_examples_are_counted():
    """Protects the count: a plain test, or a helper, is no property."""
    source = "@given(X)\ndef test_a(x): pass\n\ndef test_b(): pass\n\n@fixture\ndef c(): pass\n"
    assert properties(source) == ["test_a"]
