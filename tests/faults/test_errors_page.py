"""The page that explains errors and warnings quotes messages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import scvi

import cellweave

PAGE = Path(__file__).parents[2] / "docs" / "user_guide" / "errors.md"
# scvi-tools says this itself
FROM_SCVI = ("fewer than 3 cells",)


def quotes(page: str) -> list[str]:
    """Pieces of messages in the first column of the tables; ``...`` stands for any text."""
    rows = re.findall(r"^\| (.+?) \|", page, flags=re.MULTILINE)
    codes = [match[1].strip() for row in rows for match in re.findall(r"(`+)(.+?)\1(?!`)", row)]
    return [piece.strip() for code in codes for piece in code.split("...") if piece.strip(" `")]


def texts(folder: Path) -> str:
    """All string literals of a package; values put into them are left out."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                values = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("piece", quotes(PAGE.read_text()) if PAGE.exists() else [])
def test_quoted_message_exists(piece):
    """Protects readers of the page: what it quotes is what the package says."""
    folder = Path(scvi.__file__).parent / "data" if piece in FROM_SCVI else Path(cellweave.__file__).parent
    assert piece in texts(folder)


def test_quotes_are_found_in_tables():
    """Protects the test above: pieces are read from the first column only, and `...` separates them."""
    page = "| Message | Meaning |\n| --- | --- |\n| `one ... two`, `` `x` three `` | `not this` |\n"
    assert quotes(page) == ["one", "two", "`x` three"]
