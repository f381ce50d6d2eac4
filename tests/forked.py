"""`kedro` in a process forked from one that has the libraries: to load them is most of a short run's time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import rich
from kedro.framework import project
from kedro.framework.cli.cli import main

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    [
        __name__,
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "kedro_datasets.matplotlib.matplotlib_dataset",
        "open_clip",
        "pandas",
    ]
)


class ForkedKedro:
    """What `subprocess.Popen([sys.executable, "-m", "kedro", ...])` is, as far as the tests need it.

    The process is one of its own, with its own folder, environment, output, signals and exit code. This package is not
    among what it finds loaded.
    """

    def __init__(self, args: list[str], folder: Path, environment: dict[str, str]) -> None:
        reader, writer = _fork.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(reader.fileno()), "r")
        reader.close()
        self._process = _fork.Process(target=_kedro, args=(args, str(folder), environment, writer))
        self._process.start()
        writer.close()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str]:
        output = self.stdout.read()
        self._process.join(timeout)
        self.stdout.close()
        return (output,)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def _kedro(args: list[str], folder: str, environment: dict[str, str], output) -> None:
    for standard in (1, 2):
        os.dup2(output.fileno(), standard)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # though a shell in the background had it ignored
    rich.reconfigure()  # its console has read the environment when it was loaded
    os.chdir(folder)
    project.LOGGING.__init__()  # it has read the logging.yml of another folder
    sys.argv = ["kedro", *args]
    main()
