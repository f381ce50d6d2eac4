"""Checkpoints for an exact resume: each is complete or absent.

torch.distributed.checkpoint decides which process writes and reads which part of a tensor. The bytes are stored raw,
with a CRC-32 that is computed while they are written and checked while they are read (decision 0013).
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult

from dpdmd_pipeline.publishing import Folders, locked, sync, write_atomically, writing

log = logging.getLogger(__name__)

LOSSES = "losses.jsonl"  # a record per cycle
_FACTS = "facts"  # tensor of bytes: everything in a state that is no tensor, as JSON

# (name, size, dtype) -> tensor to load into, whole or sharded; None leaves the tensor out
Target = Callable[[str, torch.Size, torch.dtype], Tensor | None]


def new_tensor(_name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Target on the CPU for a whole tensor."""
    return torch.empty(size, dtype=dtype)


@dataclass
class Checkpoints:
    """The last few states of one run, in a folder of its own.

        step_0000100/0.bin       tensors; a file per process that writes
        step_0000100/.metadata   where each tensor is, with its CRC-32
        step_0000100.json        CRC-32 of .metadata; written last, atomically

    A kill at any moment leaves the previous state as the newest complete one.
    """

    folder: Path
    keep_last: int = 2

    def save(
        self, step: int, state: Mapping[str, Any], *, finished: bool = False, group: dist.ProcessGroup | None = None
    ) -> None:
        """Write the state after `step` steps and delete all but the newest `keep_last`; if `finished`, all others.

        A state has tensors, numbers, strings, and containers of these; no tensors in lists. With a group, all of its
        processes must call this, and each writes its shards.
        """
        manifest, main = self._manifest(step), group is None or dist.get_rank(group) == 0
        folder = manifest.with_suffix("")
        try:
            with writing(folder):
                if main:
                    manifest.unlink(missing_ok=True)
                    self._delete_incomplete()
                storage = _StorageWriter(folder, sync_files=False)
                _call(dcp.save, flat(state), storage_writer=storage, process_group=group, no_dist=group is None)
                if main:
                    for path in (*folder.iterdir(), folder):
                        sync(path)
                    text = json.dumps({"crc32": zlib.crc32((folder / ".metadata").read_bytes())})
                    write_atomically(manifest, lambda temporary: temporary.write_text(text))
                    for old in self._manifests()[: -1 if finished else -self.keep_last]:
                        old.unlink()
        finally:
            if main:
                self._delete_incomplete()  # on a full disk, every byte counts

    def write_losses(self, records: Iterable[dict[str, float]], *, anew: bool = False) -> None:
        """Append the records of cycles to a file of JSON lines, so that a kill loses none; `anew` replaces the file."""
        path = self.folder / LOSSES
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w" if anew else "a") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in records)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training the same run; raises a LockedError that names a process that does."""
        return locked(Folders.of(self.folder))

    def load_latest(self, target: Target = new_tensor) -> tuple[int, dict[str, Any]] | None:
        """Newest intact state as (step, state); None if there is no state. A damaged one is skipped with a warning.

        If processes have joined a group, all must call this. `target` gets a tensor's path in the state, as in
        "student/weight".

        Raises:
            OSError: if all states are damaged; targets may have been overwritten.
        """
        for manifest in reversed(manifests := self._manifests()):
            try:
                return _step(manifest), _load(manifest, target)
            except (OSError, ValueError, KeyError) as error:
                path = manifest.with_suffix("")
                log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, error)
        if manifests:
            raise OSError(f"{self.folder}: all {len(manifests)} checkpoints are damaged: delete it to start anew")
        return None

    def latest(self) -> int:
        """Steps of the newest complete state, whose content is not checked; 0 if there is no state."""
        return max(map(_step, self._manifests()), default=0)

    def _manifest(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.json"

    def _manifests(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.json"))

    def _delete_incomplete(self) -> None:
        for folder in self.folder.glob("step_*/"):
            if not folder.with_suffix(".json").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _step(manifest: Path) -> int:
    return int(manifest.stem.removeprefix("step_"))


@dataclass
class Writer:
    """Writes the states of a run, one after the other."""

    checkpoints: Checkpoints
    background: bool  # from a copy in host memory, while training goes on
    group: dist.ProcessGroup | None  # of the processes that write together, and of nothing else
    writes: bool  # this process takes part
    _pending: Future | None = field(default=None, init=False)

    def save(self, step: int, state: Mapping[str, Any], *, finished: bool, last: bool) -> None:
        """Write a state as `Checkpoints.save` does, the `last` one without a copy.

        Raises:
            OSError: if this or the earlier state could not be written.
        """
        self.wait()
        if self.writes and self.background and not last:
            pool, state = ThreadPoolExecutor(1), BlockingAsyncStager().stage(state)
            self._pending = pool.submit(self.checkpoints.save, step, state, finished=finished, group=self.group)
            pool.shutdown(wait=False)  # its thread ends with the write
        elif self.writes:
            self.checkpoints.save(step, state, finished=finished, group=self.group)

    def failed(self) -> bool:
        """True if a write in the background has failed; `wait` raises its error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last state is on the disk; raises an OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


# ---- states as named tensors


def flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a nested state by their path in it ("student/weight"); everything else is in one of them, as JSON."""
    tensors: dict[str, Tensor] = {}

    def facts_of(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {str(key): facts_of(inner, (*path, str(key))) for key, inner in value.items()}
        if isinstance(value, Tensor):
            tensors["/".join(path)] = value.detach()
            return None
        return value

    text = json.dumps(facts_of(state, ()))
    return {_FACTS: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), **tensors}


def _nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Undo `flat`; the keys of all mappings are strings now."""
    state = json.loads(tensors.pop(_FACTS).numpy().tobytes())
    for name, tensor in tensors.items():
        mapping, (*parents, last) = state, name.split("/")
        for parent in parents:
            mapping = mapping[parent]
        mapping[last] = tensor
    return state


def load_part(part: Any, saved: Mapping[str, Any]) -> None:
    """Load the saved state of a network, an optimizer or the like."""
    if isinstance(part, torch.optim.Optimizer):
        saved = {**saved, "state": {int(number): values for number, values in saved["state"].items()}}
    part.load_state_dict(saved)


# ---- storage


# Where a tensor, or one process's shard of it, is stored
_Place = tuple[str, int, torch.dtype, torch.Size, int]  # file, offset, dtype, shape, CRC-32


class _StorageWriter(dcp.FileSystemWriter):
    """Stores raw bytes. torch's own format pickles each tensor, and reads it without looking at its checksum."""

    def prepare_global_plan(self, plans: list) -> list:
        return [replace(plan, storage_data=f"{number}.bin") for number, plan in enumerate(plans)]

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future:
        results = []
        with writing(self.path / plan.storage_data) as path, path.open("wb") as file:
            for item in plan.items:
                tensor = planner.resolve_data(item).cpu().contiguous()
                content = _bytes_of(tensor)
                place: _Place = (path.name, file.tell(), tensor.dtype, tensor.shape, zlib.crc32(content))
                file.write(content)
                results.append(WriteResult(item.index, len(content), place))
        return _done(results)


class _StorageReader(dcp.FileSystemReader):
    """Reads what `_StorageWriter` wrote."""

    def read_data(self, plan: Any, planner: Any) -> torch.futures.Future:
        for item in plan.items:
            name, offset, dtype, shape, crc32 = self.storage_data[item.storage_index]
            tensor = torch.empty(shape, dtype=dtype)
            content, path = _bytes_of(tensor), self.path / name
            with path.open("rb") as file:
                file.seek(offset)
                if file.readinto(content) != len(content) or zlib.crc32(content) != crc32:
                    raise ValueError(f"{path} does not match its checksum at byte {offset}")
            part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).detach().copy_(part)
        return _done(None)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _done(result: Any) -> torch.futures.Future:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(result)
    return future


def _load(manifest: Path, target: Target) -> dict[str, Any]:
    folder = manifest.with_suffix("")
    if zlib.crc32((folder / ".metadata").read_bytes()) != json.loads(manifest.read_text())["crc32"]:
        raise ValueError(f"{folder / '.metadata'} does not match its checksum")
    storage = _StorageReader(folder)
    tensors = {}
    for name, stored in storage.read_metadata().state_dict_metadata.items():
        make = new_tensor if name == _FACTS else target
        if (tensor := make(name, stored.size, stored.properties.dtype)) is not None:
            tensors[name] = tensor
    _call(dcp.load, tensors, storage_reader=storage)
    return _nested(tensors)


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call a function of torch.distributed.checkpoint; an error in one process is raised in all."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    try:
        function(*args, **options)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
