"""One page of blind side-by-side pairs for people to judge; their answers are read by `human.py`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdmd_pipeline.metrics.human import FORMAT
from dpdmd_pipeline.metrics.pictures import FileSet, read_picture
from dpdmd_pipeline.metrics.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_PAGE_MB = 200  # browsers take more, people do not wait for it
_WEBP_QUALITY = 90


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
        ValueError: if prompts, their texts or numbers of pictures do not match, or the page would be too large.
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
    """Pairs are told by the place of a picture in its folder: one that is passed over would shift all after it."""
    if one.unread:
        files = ", ".join(path.name for path in one.unread[:3])
        raise ValueError(f"prompt {one.id!r} in {name} has pictures that are not read ({files}): convert them to PNG")


def _questions(
    a: FileSet, b: FileSet, names: tuple[str, str], options: ArenaOptions, pictures: _Pictures
) -> list[dict[str, Any]]:
    """Questions about one prompt: both sets, then single pictures of the same place in the order of seeds."""
    needed = max(options.per_prompt, options.set_size)
    for one, name in ((a, names[0]), (b, names[1])):
        if len(one) < needed:
            raise ValueError(f"prompt {one.id!r} has {len(one)} pictures in {name}, {needed} are needed: ask for fewer")
    asked, text = [], _text_of(a, b, names)
    if options.set_size:
        sides = [[pictures.embed(file) for file in one.files[: options.set_size]] for one in (a, b)]
        asked.append({"question": "diversity", "prompt": text, "id": f"{a.id}/diversity", "a": sides[0], "b": sides[1]})
    for number in _chosen(a.id, min(len(a), len(b)), options):
        sides = [[pictures.embed(one.files[number])] for one in (a, b)]
        asked.append({"question": "quality", "prompt": text, "id": f"{a.id}/{number}", "a": sides[0], "b": sides[1]})
    return asked


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
        return hashlib.sha256(f"{options.seed}/{prompt}/{number}".encode()).digest()

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
            # pairs are told by place: one file less on one side would pair all later ones anew
            remedy = "draw them again, or delete them and the pictures of the same seeds in the other folder"
            raise OSError(f"{counted(len(self.bad), 'picture')} cannot be shown: {named}: {remedy}")


def _render(page: dict[str, Any]) -> str:
    template = (files("dpdmd_pipeline.metrics") / "arena.html").read_text(encoding="utf-8")
    # "</script>" inside a prompt must not end the script
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    return template.replace("/*PAGE*/null", data)
