"""Prompts of a Hugging Face dataset: `hf://owner/name?split=train&column=prompt`, or a folder in place of the id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from dpdmd_pipeline.datasets.prompt_file import Line, PromptFile, checked_text, text_key
from dpdmd_pipeline.wording import is_blank, one_line, short

SCHEME = "hf://"
FIELDS = ("config", "split", "revision", "column")  # split is `train` if it is not given


@dataclass(frozen=True)
class HubPrompts(PromptFile):
    """A column of a dataset. `datasets` downloads it once, and reads it from the disk in bounded memory."""

    url: str

    @classmethod
    def of(cls, url: str) -> HubPrompts:
        """The path is the dataset's id or folder."""
        parts = urlsplit(url)
        return cls(Path(parts.netloc + parts.path), url)

    def lines(self) -> Iterator[Line]:
        """Read every prompt and blank row.

        Raises:
            ValueError: if the URL, the dataset or its texts cannot be read; names the URL and the remedy.
        """
        fields = dict(parse_qsl(urlsplit(self.url).query, keep_blank_values=True))
        if unknown := sorted(fields.keys() - set(FIELDS)):
            raise ValueError(f"{self.url}: unknown {', '.join(unknown)}: a dataset has {', '.join(FIELDS)}")
        rows, column = self._rows(fields), fields.get("column")
        column = text_key(rows.column_names, self.url) if column is None else column
        if column not in rows.column_names:
            raise ValueError(f"{self.url} has no column {column!r}: give one of {', '.join(rows.column_names)}")
        texts = (text for batch in rows.select_columns([column]).iter(batch_size=4096) for text in batch[column])
        for number, text in enumerate(texts, 1):
            text = checked_text(f"{self.url}, row {number}", text)
            yield Line(number, "" if is_blank(text) else text)

    def is_numbered_list(self) -> bool:
        return False

    def _rows(self, fields: dict[str, str]) -> Any:
        """The dataset's rows; every error of the library is one line."""
        if find_spec("datasets") is None:
            raise ValueError(f"{self.url} needs the package datasets, which is not installed: `pip install datasets`")
        import datasets

        split, config, revision = (fields.get(name) for name in ("split", "config", "revision"))
        try:
            if any((self.path / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of `save_to_disk`
                rows = datasets.load_from_disk(str(self.path))
                return rows[split or "train"] if isinstance(rows, datasets.DatasetDict) else rows
            return datasets.load_dataset(str(self.path), config, split=split or "train", revision=revision)
        except Exception as error:  # whatever the library, the hub's client and pyarrow raise
            reason = short(f"{type(error).__name__}: {one_line(error)}", 300)
            raise ValueError(
                f"{self.url} cannot be loaded ({reason}): give an id or folder with its config and split, run with a "
                "network, or log in with `hf auth login`"
            ) from error
