"""How an error is put into a sentence."""

from typing import Any


def one_line(said: Any) -> str:
    """The text of an error, or of anything else, without line breaks or repeated spaces."""
    return " ".join(str(said).split())
