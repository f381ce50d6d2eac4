"""A page from its template."""

import re
from typing import Any


def render(template: str, page: dict[str, Any]) -> str:
    """A template of this folder, filled; one for HTML escapes what it is given, one for Markdown has `md` for it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("dpdmd_pipeline.pipelines.report", "."),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment.get_template(template).render(page)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it stands, in a paragraph, a list or a cell of a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+])(?=\s|$)", lambda m: f"{m[1] or ''}\\{m[2] or m[3]}", text)
