"""A real ComfyUI as a process on the loopback. The tests' own process imports nothing of it."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("diffusers", "diffusion_models", "loras", "checkpoints", "vae", "vae_approx", "text_encoders")
_START_SECONDS, _RUN_SECONDS, _ANSWER_SECONDS = 600, 300, 120  # generous: a busy machine is no failure


class RefusedError(Exception):
    """The error that ComfyUI shows in a node."""


class Graph:
    """A workflow in API format: a dict of numbered nodes."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict] = {}

    def add(self, kind: str, **inputs: Any) -> list:
        """Add a node and return its first output; a second one is `[node[0], 1]`."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]


class ComfyServer:
    """One server process with its own folders.

    Attributes:
        base: folder of its models, custom nodes, inputs and outputs.
        log: file with its output.
    """

    def __init__(
        self, comfyui: Path, python: str, base: Path, pack: Path = REPOSITORY / "comfy_nodes", options: tuple = ()
    ) -> None:
        self.base, self.log = base, base / "server.log"
        self._files = itertools.count()
        for folder in FOLDERS:
            (base / "models" / folder).mkdir(parents=True)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "dpdmd").symlink_to(pack)
        (base / "custom_nodes" / "dpdmd_tests").symlink_to(Path(__file__).parent / "server_nodes")
        if gguf := os.environ.get("COMFYUI_GGUF"):  # a checkout of ComfyUI-GGUF
            (base / "custom_nodes" / "ComfyUI-GGUF").symlink_to(gguf)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [python, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--preview-method", "latent2rgb", "--database-url", "sqlite:///:memory:", *options]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        environment.pop("PYTHONPATH", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: if it ends or takes too long; with the end of its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=_ANSWER_SECONDS)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=_ANSWER_SECONDS) as answer:
            return json.load(answer)

    def post(self, path: str, content: dict) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            return json.loads(answer.read() or "null")

    def queue(self, graph: Graph, client: str = "tests") -> str:
        """Queue a workflow; returns its id.

        Raises:
            RefusedError: with the messages that the page would show at the nodes.
        """
        try:
            return self.post("prompt", {"prompt": graph.nodes, "client_id": client})["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            details = [
                f"{problem['message']}: {problem['details']}"
                for node in (answer["node_errors"] or {}).values()
                for problem in node["errors"]
            ]
            raise RefusedError("; ".join(details) or answer["error"]["message"]) from None

    def wait_for(self, prompt: str) -> dict:
        """Wait for a workflow and return its history."""
        deadline = time.monotonic() + _RUN_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-3000:]}")
            if history := self.get(f"history/{prompt}"):
                return history[prompt]
            time.sleep(0.05)
        raise RuntimeError(f"the workflow did not finish:\n{self.log.read_text()[-3000:]}")

    def run(self, graph: Graph) -> dict:
        """Run a workflow to its end.

        Raises:
            RefusedError: with the message of the node that failed.
        """
        history = self.wait_for(self.queue(graph))
        for name, content in history["status"]["messages"]:
            if name == "execution_error":
                raise RefusedError(content["exception_message"].strip())
        return history

    def file(self, ending: str) -> str:
        """A new path that both the server and the tests can open."""
        return str(self.base / f"{next(self._files)}{ending}")

    def tensor_file(self, **tensors: Tensor) -> str:
        """Write tensors to a file for the test nodes; returns its path."""
        path = self.file(".safetensors")
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        return path

    def latents(self, graph: Graph, latent: list) -> Tensor:
        """Run a workflow and fetch one of its LATENTs, [B, C, H, W]."""
        path = self.file(".safetensors")
        graph.add("TestSaveLatent", latent=latent, path=path)
        self.run(graph)
        return load_file(path)["samples"]
