"""Fill the templates of the page."""

import re
from typing import Any


def render(template: str, page: dict[str, Any]) -> str:
    """Fill a template of this folder; HTML templates escape their values, Markdown templates use the filter `md`."""
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
    """Escape text so that Markdown shows it unchanged in a paragraph, a list or a table cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+])(?=\s|$)", lambda m: f"{m[1] or ''}\\{m[2] or m[3]}", text)
