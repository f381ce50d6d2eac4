"""A JSON file that may be missing: it is read as empty, and the log says so."""

import json
import logging

import pytest
from kedro.io import DatasetError

from dpdmd_pipeline.datasets.whole_file import OptionalJSONDataset


def test_a_missing_file_is_read_as_empty_and_logged(tmp_path, caplog):
    dataset = OptionalJSONDataset(filepath=str(tmp_path / "metrics.json"))
    with caplog.at_level(logging.INFO):
        assert dataset.load() == {} and not dataset.exists()
    assert "metrics.json" in caplog.text


def test_an_existing_file_is_read_and_a_damaged_one_is_refused(tmp_path):
    dataset = OptionalJSONDataset(filepath=str(tmp_path / "metrics.json"))
    dataset.save({"a": 1})
    assert dataset.exists() and dataset.load() == json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DatasetError):
        dataset.load()
