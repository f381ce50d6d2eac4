"""Markdown shows text unchanged."""

from dpdmd_pipeline.pipelines.report.page import escape_markdown


def test_markdown_shows_special_characters_as_they_are():
    assert escape_markdown("a|b <i> *c* [d](e) _f_ `g` & #h") == (
        r"a\|b &lt;i&gt; \*c\* \[d\](e) \_f\_ \`g\` &amp; \#h"
    )
    assert escape_markdown("1. red") == r"1\. red"
    assert escape_markdown("- red") == r"\- red"
    assert escape_markdown("3.5") == "3.5"
