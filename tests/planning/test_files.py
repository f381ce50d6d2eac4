"""Checks of a run's output folders before its first node."""

from types import SimpleNamespace

from kedro.io import DataCatalog
from tests.raising import refuses

from dpdmd_pipeline.datasets.sharded import ShardedDataset
from dpdmd_pipeline.datasets.whole_file import JSONDataset
from dpdmd_pipeline.planning.files import unwritable_folders


def test_a_folder_that_is_a_link_to_itself_is_refused_and_a_file_replaces_its_link(tmp_path):
    for name in ("anchors", "metrics.json"):
        (tmp_path / name).symlink_to(name)
    catalog = DataCatalog(
        {
            "anchors": ShardedDataset(filepath=str(tmp_path / "anchors")),
            "metrics": JSONDataset(filepath=str(tmp_path / "metrics.json")),
        }
    )
    run = SimpleNamespace(all_outputs=lambda: {"metrics"})
    assert [*unwritable_folders(run, catalog, tmp_path)] == []
    catalog.get("metrics").save({})
    assert catalog.get("metrics").load() == {}
    run = SimpleNamespace(all_outputs=lambda: {"anchors", "metrics"})
    with refuses(OSError, str(tmp_path / "anchors"), "leads to itself"):
        [*unwritable_folders(run, catalog, tmp_path)]
