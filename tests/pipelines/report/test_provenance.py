"""Equal options have equal text."""

from dpdmd_pipeline.pipelines.report.provenance import plain_options


def test_a_number_has_the_same_text_in_every_notation():
    assert plain_options({"a": 10, "b": 1e-05, "c": None, "d": True, "e": [1, 0.5]}) == plain_options(
        {"e": (1.0, 0.5), "d": True, "c": None, "b": 0.00001, "a": 10.0}
    )
