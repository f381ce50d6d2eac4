"""A JSON file that may be absent: said, and read as empty."""

import json
import logging

import pytest
from kedro.io import DatasetError

from dpdmd_pipeline.datasets.optional_json import OptionalJSONDataset


def test_what_is_not_there_is_empty_and_said(tmp_path, caplog):
    dataset = OptionalJSONDataset(filepath=str(tmp_path / "metrics.json"))
    with caplog.at_level(logging.INFO):
        assert dataset.load() == {} and not dataset.exists()
    assert "metrics.json is not there" in caplog.text


def test_what_is_there_is_read_and_what_is_damaged_is_refused(tmp_path):
    dataset = OptionalJSONDataset(filepath=str(tmp_path / "metrics.json"))
    dataset.save({"a": 1})
    assert dataset.exists() and dataset.load() == json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DatasetError):
        dataset.load()
