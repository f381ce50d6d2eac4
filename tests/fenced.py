"""Fenced blocks of the pages: commands and Python, as written."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Blocks of a language in a page, without their indent."""
    matches = re.findall(rf"^( *)```{language}\n(.*?)^ *```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in matches]


def commands(page: str) -> list[list[str]]:
    """Words of every command of a page."""
    found: list[list[str]] = []
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        found.append([])
        for word in shlex.split(line, comments=True):
            found[-1].append(word.removesuffix(";"))
            if word.endswith(";"):
                found.append([])
    return [command for command in found if command]
