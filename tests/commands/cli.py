"""Commands as functions of their arguments; errors are raised, as the library raises them."""

from dpdmd_pipeline.__main__ import app


def score(arguments: list[str]) -> None:
    app(["score", *arguments], standalone_mode=False)


def arena(arguments: list[str]) -> None:
    app(["arena", *arguments], standalone_mode=False)
