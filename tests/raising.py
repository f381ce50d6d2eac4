"""Refusals in tests: an error of a type whose message names facts, in any wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refuses(kind: type[BaseException], *facts: str) -> Iterator[pytest.ExceptionInfo]:
    """Expect an error whose message contains every fact: an option, a value, a path, a remedy."""
    with pytest.raises(kind) as error:
        yield error
    missing = [fact for fact in facts if fact not in str(error.value)]
    assert not missing, f"{missing} not in {str(error.value)!r}"
