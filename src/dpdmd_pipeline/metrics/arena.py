"""One page of blind side-by-side pairs for people to judge; their answers are read by `human.py`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import mimetypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpdmd_pipeline.metrics.human import FORMAT
from dpdmd_pipeline.metrics.pictures import FileSet, read_picture
from dpdmd_pipeline.wording import counted, listed

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_PAGE_MB = 200  # browsers take more, people do not wait for it
_WEBP_QUALITY = 90
_FEW = 3  # files that a line names


@dataclass(frozen=True)
class ArenaOptions:
    """What is asked.

    Attributes:
        per_prompt: single pictures compared of each prompt, for quality.
        set_size: pictures of each side in a question about diversity.
        side: pixels to which the longer side is reduced; None embeds the files as they are.
        seed: of the choice of pictures and of everybody's order.
    """

    per_prompt: int
    set_size: int
    side: int | None
    seed: int


def make_arena(a: Sequence[FileSet], b: Sequence[FileSet], names: tuple[str, str], options: ArenaOptions) -> str:
    """The page as HTML, complete in itself.

    Args:
        a, b: pictures of both sides; prompts are matched by their ids.
        names: of the sides; they appear in the saved results only.
        options: what is asked.

    Raises:
        ValueError: if prompts, their texts or their pictures do not match, or the page would be too large.
        OSError: if pictures cannot be used; names them all.
    """
    others = {pictures.id: pictures for pictures in b}
    lonely = [pictures.id for pictures in a if pictures.id not in others]
    if lonely or len(a) != len(b):
        extra = lonely or sorted(set(others) - {pictures.id for pictures in a})
        raise ValueError(f"prompt {extra[0]!r} is on one side only ({len(extra)} such): compare the same prompts")
    for one, name in [(one, name) for some, name in zip((a, b), names, strict=True) for one in some]:
        _refuse_unread(one, name)
    pictures = _Pictures(options.side)  # filled on the way
    questions = [question for one in a for question in _questions(one, others[one.id], names, options, pictures)]
    pictures.refuse_bad()
    page = {"format": FORMAT, "a": names[0], "b": names[1], "seed": options.seed, "questions": questions}
    identity = hashlib.sha256(json.dumps([page, sorted(pictures.found)]).encode()).hexdigest()[:16]
    return _render({"arena": identity, **page, "pictures": pictures.found})


def _refuse_unread(one: FileSet, name: str) -> None:
    """One passed over would be missed in its pair, or, where pairs are told by order, shift all after it."""
    if one.unread:
        files = ", ".join(path.name for path in one.unread[:3])
        raise ValueError(f"prompt {one.id!r} in {name} has pictures that are not read ({files}): convert them to PNG")


def _questions(
    a: FileSet, b: FileSet, names: tuple[str, str], options: ArenaOptions, pictures: _Pictures
) -> list[dict[str, Any]]:
    """Questions about one prompt: sets of the same seeds, then single pictures of one seed."""
    pairs, needed = pair_up(a, b, names).pairs, max(options.per_prompt, options.set_size)
    if len(pairs) < needed:
        fewer = "ask for fewer with --singles and --sets"
        raise ValueError(f"prompt {a.id!r} has {counted(len(pairs), 'pair')} of pictures, {needed} are needed: {fewer}")
    asked, text = [], _text_of(a, b, names)
    if options.set_size:
        sides = [[pictures.embed(file) for file in side] for side in zip(*pairs[: options.set_size], strict=True)]
        asked.append({"question": "diversity", "prompt": text, "id": f"{a.id}/diversity", "a": sides[0], "b": sides[1]})
    for number in _chosen(a.id, len(pairs), options):
        sides = [[pictures.embed(file)] for file in pairs[number]]
        asked.append({"question": "quality", "prompt": text, "id": f"{a.id}/{number}", "a": sides[0], "b": sides[1]})
    return asked


class Paired(NamedTuple):
    """Pictures of one prompt that belong together, and how that was told.

    Attributes:
        pairs: of A and B, in A's order.
        alone: pictures that have no other half.
        in_order: whether only their order says so, since their names have nothing in common.
    """

    pairs: list[tuple[Path, Path]]
    alone: list[Path]
    in_order: bool = False


def pair_up(a: FileSet, b: FileSet, names: tuple[str, str]) -> Paired:
    """Pairs of one seed, told by name; else by the last number in it, where both sides have the same; else by order.

    Names of one kind may be wanting on a side: what is left is still paired rightly. Numbers of two kinds may not,
    since 1 may be the first in one program's count and the second in the other's.

    Raises:
        ValueError: if names are of two kinds, and their numbers differ in part or there are more on one side; or if a
            side has no picture.
    """
    for one, name in zip((a, b), names, strict=True):
        if not one.files:
            raise ValueError(f"prompt {one.id!r} has no picture in {name}: draw it, or delete the prompt on both sides")
    (a_names, b_names), (a_numbers, b_numbers) = ([_keyed(one, key) for one in (a, b)] for key in (_stem, _number))
    if a_names.keys() & b_names.keys():
        both = [(file, b_names[name]) for name, file in a_names.items() if name in b_names]
        paired = {file for pair in both for file in pair}
        return Paired(both, [file for file in (*a.files, *b.files) if file not in paired])
    if a_numbers and a_numbers.keys() == b_numbers.keys():
        return Paired([(file, b_numbers[number]) for number, file in a_numbers.items()], [])
    if len(a) != len(b) or a_numbers.keys() & b_numbers.keys():
        told = " and ".join(_described(one, name) for one, name in zip((a, b), names, strict=True))
        raise ValueError(f"prompt {a.id!r} has {told}, which do not pair: give pictures of one seed the same name")
    return Paired(list(zip(a.files, b.files, strict=True)), [], in_order=True)


def _keyed(one: FileSet, key: Callable[[Path], str]) -> dict[str, Path]:
    """Files by their key; empty where it does not tell them all apart."""
    found = {key(file): file for file in one.files}
    return found if len(found) == len(one) and "" not in found else {}


def _stem(file: Path) -> str:
    return file.stem


def _number(file: Path) -> str:
    """The last number in a name, without leading zeros: 7 of `a red circle_0007.png`; empty without one."""
    found = re.findall(r"\d+", file.stem)
    return str(int(found[-1])) if found else ""


def _described(one: FileSet, name: str) -> str:
    return f"{counted(len(one), 'picture')} in {name} ({listed([file.name for file in one.files], _FEW)})"


def about_pairs(a: Sequence[FileSet], b: Sequence[FileSet], names: tuple[str, str]) -> list[str]:
    """One line about pictures that are in no pair, and one about pairs that only their order tells, if there are any.

    Args:
        a, b, names: as in `make_arena`, which has taken them.
    """
    others, notes = {pictures.id: pictures for pictures in b}, []
    found = {one.id: pair_up(one, others[one.id], names) for one in a}
    alone = [str(file) for paired in found.values() for file in paired.alone]
    if alone:
        notes.append(f"left out, since the other side has none of that name: {listed(alone, _FEW)}")
    ordered = [name for name, paired in found.items() if paired.in_order]
    if ordered:
        told = f"{counted(len(ordered), 'prompt')} ({listed(ordered, _FEW)})"
        notes.append(f"paired by order only, since names differ: {told}; see that they are of the same seeds")
    return notes


def _text_of(a: FileSet, b: FileSet, names: tuple[str, str]) -> str:
    """What people read above the pictures: the text of the side that has one, else the id.

    Raises:
        ValueError: if the sides have two texts.
    """
    texts = [one.text for one in (a, b) if not one.no_text]
    if len(set(texts)) > 1:
        told = " and ".join(f"{text!r} in {name}" for text, name in zip(texts, names, strict=True))
        raise ValueError(f"prompt {a.id!r} is {told}: give both the same text")
    return texts[0] if texts else a.text


def _chosen(prompt: str, available: int, options: ArenaOptions) -> list[int]:
    """Which pictures of a prompt are compared singly: by hash, so that other prompts change nothing."""

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{options.seed}/{prompt}/{number}".encode(errors="surrogateescape")).digest()

    return sorted(sorted(range(available), key=rank)[: options.per_prompt])


class _Pictures:
    """What lies in the page: each picture once, under the hash of its content; names of files do not get in.

    Args:
        side: pixels to which the longer side is reduced; None leaves the files as they are.

    Attributes:
        found: data URIs by hash.
        bad: kinds of fault by file.
    """

    def __init__(self, side: int | None) -> None:
        self.side = side
        self.found: dict[str, str] = {}
        self.bad: dict[Path, str] = {}
        self._size = 0

    def embed(self, file: Path) -> str:
        """Put a picture into the page; returns its hash, which is empty for a bad one.

        Raises:
            ValueError: if the page would be too large.
        """
        try:
            image = read_picture(file)  # a broken one must be found now, not by the people
        except OSError as error:
            self.bad[file] = str(error)
            return ""
        content, kind = self._encoded(file, image)
        key = hashlib.sha256(content).hexdigest()[:16]
        if key not in self.found:
            self.found[key] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            self._size += len(self.found[key])
        if self._size > LARGEST_PAGE_MB * 1e6:
            raise ValueError(f"the page would be over {LARGEST_PAGE_MB} MB: reduce the pictures with --side 512")
        return key

    def _encoded(self, file: Path, image: Image) -> tuple[bytes, str]:
        """Content and media type."""
        if self.side is None:
            return file.read_bytes(), mimetypes.guess_type(file.name)[0] or "image/png"
        image.thumbnail((self.side, self.side))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=_WEBP_QUALITY)
        return buffer.getvalue(), "image/webp"

    def refuse_bad(self) -> None:
        """Name every bad picture at once.

        Raises:
            OSError: if there is one.
        """
        if self.bad:
            named = ", ".join(f"{file} ({fault})" for file, fault in self.bad.items())
            # where pairs are told by order, one file less on one side alone would be refused
            remedy = "draw them again, or delete them and the pictures of the same seeds in the other folder"
            raise OSError(f"{counted(len(self.bad), 'picture')} cannot be shown: {named}: {remedy}")


def _render(page: dict[str, Any]) -> str:
    template = (files("dpdmd_pipeline.metrics") / "arena.html").read_text(encoding="utf-8")
    # "</script>" inside a prompt must not end the script; escapes hold what UTF-8 lacks, as a byte of a file's name
    data = json.dumps(page).replace("<", "\\u003c")
    return template.replace("/*PAGE*/null", data)
