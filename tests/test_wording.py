"""Counts and lists as text."""

import pytest

from dpdmd_pipeline.wording import counted, listed


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 pictures"), (1, "1 picture"), (2, "2 pictures"), (1000, "1000 pictures")]
)
def test_a_count_agrees_with_its_noun(number, text):
    assert counted(number, "picture") == text


def test_a_noun_may_have_an_irregular_plural():
    assert counted(1, "person", "people") == "1 person" and counted(3, "person", "people") == "3 people"


@pytest.mark.parametrize(
    ("names", "text"),
    [("", ""), ("a", "a"), ("abc", "a, b, c"), ("abcd", "a, b, c and 1 more"), ("abcde", "a, b, c and 2 more")],
)
def test_a_list_names_the_first_few_and_counts_the_rest(names, text):
    assert listed(list(names), 3) == text
