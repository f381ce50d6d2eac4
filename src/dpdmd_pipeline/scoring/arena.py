"""A page of blind side-by-side pairs, drawn from the same seeds, for people to judge; `human` reads their answers."""

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

from dpdmd_pipeline.scoring.sets import FileSet, read_picture
from dpdmd_pipeline.wording import counted, listed

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1  # of the results that the page saves
LARGEST_PAGE_MB = 200  # browsers open larger pages, but people do not wait for them
_WEBP_QUALITY = 90
_FEW = 3  # files in a message


@dataclass(frozen=True)
class ArenaOptions:
    """Contents of a page."""

    per_prompt: int  # single pairs of each prompt, for quality
    set_size: int  # pictures per side in a question about diversity
    side: int | None  # longer side of reduced pictures in pixels; None embeds the files unchanged
    seed: int  # of the choice of pictures and of everyone's order


def make_arena(a: Sequence[FileSet], b: Sequence[FileSet], names: tuple[str, str], options: ArenaOptions) -> str:
    """The page as HTML without external files.

    Args:
        a, b: pictures of both sides, matched by prompt id.
        names: names of the sides; only the saved results show them.
    """
    others = {pictures.id: pictures for pictures in b}
    unmatched = {one.id for one in a} ^ others.keys()
    if unmatched:
        raise ValueError(
            f"prompt {min(unmatched)!r} is on one side only ({len(unmatched)} in total): compare the same prompts"
        )
    for one, name in [(one, name) for sets, name in zip((a, b), names, strict=True) for one in sets if one.unread]:
        unread = listed([path.name for path in one.unread], _FEW)  # a missing one would shift all later pairs
        raise ValueError(
            f"prompt {one.id!r} in {name} has pictures in a format that is not read ({unread}): convert them to PNG"
        )
    pictures = _Pictures(options.side)  # filled on the way
    questions = [question for one in a for question in _questions(one, others[one.id], names, options, pictures)]
    if pictures.faults:
        faults = ", ".join(f"{file} ({fault})" for file, fault in pictures.faults.items())
        # On both sides: pairs that order alone makes need equal numbers.
        remedy = "draw them again, or delete them and the pictures of the same seeds in the other folder"
        raise OSError(f"cannot show {counted(len(pictures.faults), 'picture')}: {faults}: {remedy}")
    page = {"format": FORMAT, "a": names[0], "b": names[1], "seed": options.seed, "questions": questions}
    identity = hashlib.sha256(json.dumps([page, sorted(pictures.uris)]).encode()).hexdigest()[:16]
    template = (files("dpdmd_pipeline.scoring") / "arena.html").read_text(encoding="utf-8")
    # "</script>" in a prompt must not end the script. JSON escapes bytes of file names that are not UTF-8.
    data = json.dumps({"arena": identity, **page, "pictures": pictures.uris}).replace("<", "\\u003c")
    return template.replace("/*PAGE*/null", data)


def _questions(
    a: FileSet, b: FileSet, names: tuple[str, str], options: ArenaOptions, pictures: _Pictures
) -> list[dict[str, Any]]:
    """Questions about one prompt: sets of the same seeds, then pairs of single pictures."""
    pairs, needed = pair_up(a, b, names).pairs, max(options.per_prompt, options.set_size)
    if len(pairs) < needed:
        raise ValueError(
            f"prompt {a.id!r} has {counted(len(pairs), 'pair')} of pictures, not {needed}: lower --singles and --sets"
        )
    questions, text = [], _text_of(a, b, names)

    def add(kind: str, key: str | int, pairs: Sequence[tuple[Path, Path]]) -> None:
        sides = [[pictures.embed(file) for file in side] for side in zip(*pairs, strict=True)]
        questions.append({"question": kind, "prompt": text, "id": f"{a.id}/{key}", "a": sides[0], "b": sides[1]})

    if options.set_size:
        add("diversity", "diversity", pairs[: options.set_size])
    for number in _chosen(a.id, len(pairs), options):
        add("quality", number, [pairs[number]])
    return questions


def _text_of(a: FileSet, b: FileSet, names: tuple[str, str]) -> str:
    """Text above the pictures: that of a side which has one, else the id."""
    texts = [one.text for one in (a, b) if not one.no_text]
    if len(set(texts)) > 1:
        both = " and ".join(f"{text!r} in {name}" for text, name in zip(texts, names, strict=True))
        raise ValueError(f"prompt {a.id!r} is {both}: give both the same text")
    return texts[0] if texts else a.text


def _chosen(prompt: str, available: int, options: ArenaOptions) -> list[int]:
    """Indices of the pairs to compare singly; chosen by hash, so that other prompts change nothing."""

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{options.seed}/{prompt}/{number}".encode(errors="surrogateescape")).digest()

    return sorted(sorted(range(available), key=rank)[: options.per_prompt])


class _Pictures:
    """Pictures of the page, each once, under the hash of its content; file names stay out of the page."""

    def __init__(self, side: int | None) -> None:
        self.side = side
        self.uris: dict[str, str] = {}  # data URIs by hash
        self.faults: dict[Path, str] = {}  # kinds of fault by file
        self._size = 0

    def embed(self, file: Path) -> str:
        """Add a picture and return its hash, which is empty for an unusable one."""
        try:
            image = read_picture(file)  # decode it now, so that no one meets a broken picture later
        except OSError as error:
            self.faults[file] = str(error)
            return ""
        content, kind = self._encoded(file, image)
        key = hashlib.sha256(content).hexdigest()[:16]
        if key not in self.uris:
            self.uris[key] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            self._size += len(self.uris[key])
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


class Paired(NamedTuple):
    """Pairs of pictures of one prompt."""

    pairs: list[tuple[Path, Path]]  # pictures of A and B, in A's order
    alone: list[Path]  # pictures without a counterpart
    in_order: bool = False  # True if only their order makes the pairs, because names have nothing in common


def pair_up(a: FileSet, b: FileSet, names: tuple[str, str]) -> Paired:
    """Pair pictures by name, else by the last number in the name, else by order.

    If a side lacks some names, the common names still pair safely. Numbers pair only if both sides have the same:
    program A may start to count at 0 and program B at 1.
    """
    for one, name in zip((a, b), names, strict=True):
        if not one.files:
            raise ValueError(f"prompt {one.id!r} has no picture in {name}: draw it, or delete the prompt on both sides")
    a_names, b_names = (_by_key(one, lambda file: file.stem) for one in (a, b))
    if a_names.keys() & b_names.keys():
        pairs = [(file, b_names[name]) for name, file in a_names.items() if name in b_names]
        paired = {file for pair in pairs for file in pair}
        return Paired(pairs, [file for file in (*a.files, *b.files) if file not in paired])
    a_numbers, b_numbers = (_by_key(one, _last_number) for one in (a, b))
    if a_numbers and a_numbers.keys() == b_numbers.keys():
        return Paired([(file, b_numbers[number]) for number, file in a_numbers.items()], [])
    if len(a) != len(b) or a_numbers.keys() & b_numbers.keys():
        sides = " and ".join(_described(one, name) for one, name in zip((a, b), names, strict=True))
        raise ValueError(f"prompt {a.id!r} has {sides}, which do not pair: give pictures of one seed the same name")
    return Paired(list(zip(a.files, b.files, strict=True)), [], in_order=True)


def _by_key(one: FileSet, key: Callable[[Path], str]) -> dict[str, Path]:
    """Files by their key; empty if keys are not unique."""
    files = {key(file): file for file in one.files}
    return files if len(files) == len(one) and "" not in files else {}


def _last_number(file: Path) -> str:
    """The last number in a name without leading zeros, such as 7 of `a red circle_0007.png`; empty without one."""
    numbers = re.findall(r"\d+", file.stem)
    return str(int(numbers[-1])) if numbers else ""


def _described(one: FileSet, name: str) -> str:
    return f"{counted(len(one), 'picture')} in {name} ({listed([file.name for file in one.files], _FEW)})"


def about_pairs(a: Sequence[FileSet], b: Sequence[FileSet], names: tuple[str, str]) -> list[str]:
    """Notes on pictures without a counterpart and on pairs that only their order makes, after `make_arena`."""
    others, notes = {pictures.id: pictures for pictures in b}, []
    by_prompt = {one.id: pair_up(one, others[one.id], names) for one in a}
    alone = [str(file) for paired in by_prompt.values() for file in paired.alone]
    if alone:
        notes.append(f"left out (no picture of the same name on the other side): {listed(alone, _FEW)}")
    in_order = [name for name, paired in by_prompt.items() if paired.in_order]
    if in_order:
        prompts = f"{counted(len(in_order), 'prompt')} ({listed(in_order, _FEW)})"
        notes.append(f"paired by order, because names differ: {prompts}; check that pairs have the same seed")
    return notes
