"""The hub's client against a server of this test, a local cache, or no network; nothing leaves this machine."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.raising import refuses

from dpdmd_pipeline.datasets.pretrained import PretrainedModelDataset

MODEL, COMMIT = "somebody/pictures", "0123456789abcdef0123456789abcdef01234567"
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
}
FILES = {
    "model_index.json": json.dumps(INDEX),
    "README.md": "a card",
    "single_file.safetensors": "all of it once more",
    "scheduler/scheduler_config.json": "{}",
    "text_encoder/config.json": "{}",
    "text_encoder/model.safetensors": "text",
    "text_encoder/model.fp16.safetensors": "the same, rounded",
    "text_encoder/pytorch_model.bin": "a pickle",
    "tokenizer/tokenizer_config.json": "{}",
    "tokenizer/merges.txt": "a b",
    "tokenizer/spiece.model": "pieces",
    "transformer/config.json": "{}",
    "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "big-1.safetensors", "b": "big-2.safetensors"}}
    ),
    "transformer/big-1.safetensors": "one",
    "transformer/big-2.safetensors": "two",
}
NEEDED = set(FILES) - {
    "README.md",
    "single_file.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
}


def etag(content: str) -> str:
    return hashlib.sha1(f"blob {len(content)}\0{content}".encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses; `refusal` is (status, X-Error-Code) for every request."""

    refusal: tuple[int, str] | None = None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if self.refusal:
            self._answer(self.refusal[0], "{}", {"X-Error-Code": self.refusal[1], "X-Error-Message": "no"})
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in FILES.items()]
            self._answer(200, json.dumps(entries), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{MODEL}"):
            self._answer(200, json.dumps({"id": MODEL, "sha": COMMIT}), {"Content-Type": "application/json"})
        else:
            content = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
            self._answer(200, content, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Point the hub's client at a server that answers or refuses, or at an address without a server."""
    servers = []

    def start(refusal: tuple[int, str] | None = None, *, answers: bool = True) -> Path:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Refusing", (Hub,), {"refusal": refusal}))
        servers.append(server)
        configure(monkeypatch, tmp_path / "cache", f"http://127.0.0.1:{server.server_port}", offline=False)
        if answers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            servers.pop().server_close()
        return tmp_path / "cache"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def configure(monkeypatch, cache: Path, endpoint: str, *, offline: bool) -> None:
    """Set what the client reads from HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


def warm_cache(root: Path, files: dict[str, str] = FILES) -> Path:
    """Make a cache in the client's layout: blobs, links to them by commit, and the commit of the branch."""
    folder = root / f"models--{MODEL.replace('/', '--')}"
    for name, content in files.items():
        blob, link = folder / "blobs" / etag(content), folder / "snapshots" / COMMIT / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        if not link.is_symlink():
            link.symlink_to(blob)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


@pytest.fixture
def offline(tmp_path, monkeypatch):
    configure(monkeypatch, tmp_path / "cache", "http://127.0.0.1:9", offline=True)
    return tmp_path / "cache"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- models that load


def test_a_local_folder_is_used_as_it_is(tmp_path, offline):
    for name, content in FILES.items():
        (tmp_path / "teacher" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "teacher" / name).write_text(content)
    dataset = PretrainedModelDataset(model=str(tmp_path / "teacher"))
    assert dataset.load() == dataset.load_configs() == tmp_path / "teacher" and dataset.exists()


def test_configs_are_downloaded_first_and_weights_on_loading(hub):
    hub()
    dataset = PretrainedModelDataset(model=MODEL)
    assert dataset.exists()
    configs = dataset.load_configs()
    assert files_in(configs) == {name for name in NEEDED if not name.endswith(".safetensors")}
    assert dataset.load() == configs and files_in(configs) == NEEDED


def test_the_bytes_of_a_download_are_known_before_it(hub, monkeypatch):
    cache, dataset = hub(), PretrainedModelDataset(model=MODEL)
    dataset.load_configs()
    assert dataset.missing_bytes() == sum(len(FILES[name]) for name in NEEDED if name.endswith(".safetensors"))
    dataset.load()
    assert dataset.missing_bytes() == 0
    configure(monkeypatch, cache, "http://127.0.0.1:9", offline=True)
    assert dataset.missing_bytes() == 0


def test_a_warm_cache_loads_without_a_network(offline):
    folder = warm_cache(offline)
    dataset = PretrainedModelDataset(model=MODEL)
    assert dataset.load() == dataset.load_configs() == folder


def test_a_downloaded_model_loads_without_a_network(hub, monkeypatch):
    cache = hub()
    folder = PretrainedModelDataset(model=MODEL).load()
    configure(monkeypatch, cache, "http://127.0.0.1:9", offline=True)
    assert PretrainedModelDataset(model=MODEL).load() == folder
    assert PretrainedModelDataset(model=MODEL, revision=COMMIT).load() == folder


def test_the_files_of_a_real_pipeline_are_complete(tiny_teacher, offline):
    assert PretrainedModelDataset(model=str(tiny_teacher)).load() == tiny_teacher


# ---- refusals, each in one line


def refusal(dataset: PretrainedModelDataset) -> str:
    """Message of the error, the same for loading and for `exists`."""
    messages = []
    for method in (dataset.load, dataset.load_configs, dataset.exists):
        with pytest.raises(Exception) as error:
            method()
        cause = error.value.__cause__ if type(error.value).__name__ == "DatasetError" else error.value
        assert isinstance(cause, OSError | ValueError), repr(cause)
        messages.append(str(cause))
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    return messages[0]


def test_a_gated_model_names_its_licence_page_and_the_login(hub):
    hub((403, "GatedRepo"))
    page = f"https://huggingface.co/{MODEL}"
    message = refusal(PretrainedModelDataset(model=MODEL))
    assert message.startswith(f"{MODEL} ") and "gated" in message
    assert all(remedy in message for remedy in (page, "`hf auth login`", "HF_TOKEN"))


def test_a_missing_model_is_named(hub):
    hub((401, "RepoNotFound"))
    message = refusal(PretrainedModelDataset(model=MODEL))
    assert message.startswith(f"{MODEL} ") and "private" in message and "HF_TOKEN" in message


def test_a_missing_revision_is_named(hub):
    hub((404, "RevisionNotFound"))
    message = refusal(PretrainedModelDataset(model=MODEL, revision="v9"))
    assert (
        message.startswith(f"{MODEL} ") and "'v9'" in message and f"https://huggingface.co/{MODEL}/commits" in message
    )


def test_without_a_network_the_remedy_is_a_network_or_a_folder(hub):
    cache = hub(answers=False)
    message = refusal(PretrainedModelDataset(model=MODEL))
    assert message.startswith(f"{MODEL} ") and str(cache) in message
    assert "HF_HUB_OFFLINE" not in message and "network" in message and "folder" in message


def test_offline_and_not_cached_says_so(offline):
    message = refusal(PretrainedModelDataset(model=MODEL))
    assert message.startswith(f"{MODEL} ") and str(offline) in message and "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("missing", ["transformer/big-2.safetensors", "text_encoder/model.safetensors"])
def test_a_cache_with_an_interrupted_download_is_refused(offline, missing):
    folder = warm_cache(offline)
    (folder / missing).resolve().unlink()  # the link stays
    (folder / "text_encoder/model.fp16.safetensors").unlink()
    with refuses(Exception, f"{missing.split('/')[0]}", "safetensors", "network", "HF_HUB_OFFLINE"):
        PretrainedModelDataset(model=MODEL).load()
    assert PretrainedModelDataset(model=MODEL).load_configs() == folder


def test_a_cache_that_lists_a_missing_file_is_refused(hub, monkeypatch):
    cache = hub()
    dataset = PretrainedModelDataset(model=MODEL)
    folder = dataset.load()
    (folder / "transformer/big-2.safetensors").unlink()
    configure(monkeypatch, cache, "http://127.0.0.1:9", offline=True)
    with pytest.raises(Exception, match=f"{MODEL} .*{cache}|transformer .*big-2.safetensors"):
        dataset.load()


@pytest.mark.parametrize("model", ["data/06_models/no_such/teacher", "./teacher", "teacher", "~/teacher"])
def test_a_missing_path_is_not_sought_on_the_hub(offline, model):
    assert f"teacher {model} " in refusal(PretrainedModelDataset(model=model))


def test_a_folder_that_is_no_pipeline_is_named(tmp_path, offline):
    (tmp_path / "teacher").mkdir()
    message = refusal(PretrainedModelDataset(model=str(tmp_path / "teacher")))
    assert message.startswith(f"{tmp_path / 'teacher' / 'model_index.json'} ")


def test_a_local_folder_without_weights_is_refused_only_for_weights(tiny_teacher, tmp_path, offline):
    copy = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert PretrainedModelDataset(model=str(copy)).load_configs() == copy
    with refuses(Exception, "transformer", "diffusion_pytorch_model.safetensors", "diffusers pipeline folder"):
        PretrainedModelDataset(model=str(copy)).load()


def test_nothing_is_saved_over_somebody_elses_model(offline):
    with refuses(Exception, "somebody/pictures"):
        PretrainedModelDataset(model=MODEL).save(lambda folder: None)
