"""Wiring of the study beyond the paper."""

from kedro.pipeline import Pipeline

from dpdmd_pipeline.pipelines.study.pipeline import create_pipeline as create_study


def create_pipeline(**kwargs) -> Pipeline:
    """The nodes of the study, with other runs."""
    study = create_study()
    inputs = study.inputs()
    options = {name for name in inputs if name.startswith("params:")}
    return Pipeline(
        study,
        namespace="beyond",
        inputs=inputs - options,
        parameters={**{name: name for name in options}, "params:study": "params:beyond"},
        outputs={"study": "beyond", "study_table": "beyond_table", "study_plot": "beyond_plot"},
    )
