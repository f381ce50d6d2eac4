"""JSON and names in untrusted files, within limits; `comfy_nodes/limits.py`, which stands alone, has the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from dpdmd_pipeline.wording import listed, short

MAX_DEPTH = 8  # lists or objects in each other
MAX_CHARACTERS = 2**16  # of one value in a header
MAX_FILE = 2**26  # bytes of a JSON file; the tokenizer of Gemma has 34 million
MAX_LEVELS = 1001  # a model has 1000 timesteps, and the last level is 0
MAX_SIZE = 2**14  # pixels of a side, tokens of a prompt, rank of an adapter
MAX_SHOWN = 200  # characters of a value or a name in a message
_FEW = 3  # names in a message


def check_length(text: str) -> str:
    """Return an untrusted text; a ValueError if it is longer than any of ours."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, the limit is {MAX_CHARACTERS}")
    return text


def parse_json(text: str) -> Any:
    """Parse untrusted JSON; a ValueError if it is none, or deeper than any of ours."""
    depth = max(accumulate((letter in "[{") - (letter in "]}") for letter in text), default=0)
    if depth > MAX_DEPTH:
        raise ValueError(f"it has {depth} lists and objects in each other, the limit is {MAX_DEPTH}")
    return json.loads(text)


def read_json(path: Path) -> dict[str, Any]:
    """Read an untrusted file with one JSON object.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: with its path, if it is too large, is not JSON, nested too deeply, no object, or holds NaN.
    """
    if (size := path.stat().st_size) > MAX_FILE:
        raise ValueError(f"{path} has {size} bytes, expected at most {MAX_FILE}: copy it again")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has {short(repr(content), MAX_SHOWN)}, expected a JSON object: copy it again")
    return content


def _constant(name: str) -> float:
    """Infinity is the default of some schedulers, NaN of nothing."""
    if name == "NaN":
        raise ValueError("NaN")
    return float(name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a config, without the path on this machine that diffusers and transformers add to it."""
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def first_names(names: Sequence[str]) -> str:
    """The first few of many names, each shortened, for a message."""
    return listed([short(name, MAX_SHOWN) for name in names], _FEW)
