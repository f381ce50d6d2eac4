"""`arena`: a page on which people compare two folders of pictures blindly."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpdmd_pipeline.commands.target import refuse_unwritable

if TYPE_CHECKING:
    from dpdmd_pipeline.metrics.pictures import FileSet

_EPILOG = """\
Folders are laid out as for `score` (see `score --help`); prompts are matched by folder name or id. Pictures of a
prompt are paired by name, and those that one side alone has are left out and told; where no name is on both sides,
by the last number in it, as in 0007.png and a_7.png, if both have the same numbers; where these have nothing in common
either, in order, which is told too. All else is refused: a pair must be of one seed.
The page needs no server and no network: send it, people answer by keyboard (left, right, space, backspace), and send
back the file that it saves. Then: python -m dpdmd_pipeline score results*.json --by human
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(
        prog="python -m dpdmd_pipeline arena",
        description="Make one HTML page of blind side-by-side comparisons.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("a", type=Path, metavar="A_FOLDER")
    found.add_argument("b", type=Path, metavar="B_FOLDER")
    found.add_argument("--out", type=Path, required=True, metavar="PAGE.html")
    found.add_argument(
        "--prompts", type=Path, help="texts of prompt ids: .txt (line number), .csv or .jsonl (id, text)"
    )
    found.add_argument("--singles", type=int, default=2, help="pairs of pictures a prompt, for quality (%(default)s)")
    found.add_argument("--sets", type=int, default=4, help="pictures a set, for diversity; 0 asks none (%(default)s)")
    found.add_argument("--side", type=int, help="reduce the longer side to this many pixels, as WebP; else as they are")
    found.add_argument("--seed", type=int, default=0, help="of the choice and of everybody's order (%(default)s)")
    return found


def main(arguments: list[str]) -> None:
    """Write the page.

    Raises:
        ValueError, OSError: in one line, for what the user can mend.
    """
    from dpdmd_pipeline.metrics.arena import ArenaOptions, about_pairs, make_arena
    from dpdmd_pipeline.metrics.pictures import about_strays, find_pictures
    from dpdmd_pipeline.publishing import write_text
    from dpdmd_pipeline.wording import counted

    asked = parser().parse_args(arguments)
    _check(asked)
    (a, strays_of_a), (b, strays_of_b) = (find_pictures(folder, asked.prompts) for folder in (asked.a, asked.b))
    options = ArenaOptions(asked.singles, asked.sets, asked.side, asked.seed)
    names = str(asked.a), str(asked.b)
    html = make_arena(a, b, names, options)
    write_text(asked.out, html)
    questions = counted(len(a) * (asked.singles + bool(asked.sets)), "question")
    print(f"{asked.out}: {questions} about {counted(len(a), 'prompt')}, {_size(len(html.encode()))}")
    notes = [about_strays(asked.a, strays_of_a), about_strays(asked.b, strays_of_b), _about_ids(a, b)]
    notes += about_pairs(a, b, names)
    print("".join(f"{note}\n" for note in filter(None, notes)), end="")


def _about_ids(a: Sequence[FileSet], b: Sequence[FileSet]) -> str:
    """One line about prompts of which people see the id; empty where all have a text on one side at least."""
    named = {one.id for one in b if not one.no_text}
    nameless = [one.id for one in a if one.no_text and one.id not in named]
    if not nameless:
        return ""
    verb = "has no text: people are shown its id" if len(nameless) == 1 else "have no text: people are shown their ids"
    return f"{len(nameless)} of {len(a)} prompts {verb} ({nameless[0]}): give the texts with --prompts"


def _size(count: int) -> str:
    """Bytes in words: `38 kB`, `1.2 MB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{math.ceil(count / 1e3)} kB"


def _check(asked: argparse.Namespace) -> None:
    for name, allowed in (("singles", asked.singles >= 0), ("sets", asked.sets == 0 or asked.sets >= 2)):
        if not allowed:
            raise ValueError(f"--{name} {getattr(asked, name)}: singles are 0 or more, sets 0 or at least 2")
    if not asked.singles and not asked.sets:
        raise ValueError("--singles 0 --sets 0 asks nothing: give at least one of them")
    if asked.side is not None and asked.side < 16:
        raise ValueError(f"--side {asked.side} must be at least 16 pixels")
    if asked.a.resolve() == asked.b.resolve():
        raise ValueError(f"{asked.a} and {asked.b} are one folder: give the pictures of two models")
    if asked.out.is_dir():
        raise OSError(f"--out {asked.out} is a folder: name the page in it, as in {asked.out / 'arena.html'}")
    refuse_unwritable("--out", asked.out)
