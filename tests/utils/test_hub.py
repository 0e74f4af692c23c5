"""Models by name: from a hub made with Python's HTTP server, from the cache, and from a stand-in for ModelScope."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console

from minimind import ModelConfig, load_model, load_tokenizer
from minimind.export.hf import export_hf
from minimind.inference.loading import ModelArgs, WeightArgs, open_model, open_weights
from minimind.modeling import Model
from minimind.training.arguments import StageArgs
from minimind.training.initial_model import InitialModel
from minimind.utils.hub import HubModel, local_path
from minimind.weights import save_weights, to_stock

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # commits
CPU = torch.device("cpu")


class Hub:
    """The part of Hugging Face's API that downloads use, over `models`: (repository, commit) -> folder. The newest
    commit is the last one. gated: refuses all files."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Path] = {}
        self.sent: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name that Python's server calls

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(http.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            commit = self.commit("/".join(parts[2:4]), parts[-1])
            folder = self.models.get(("/".join(parts[2:4]), commit or ""))
            if commit is None or folder is None:
                known = any(name == "/".join(parts[2:4]) for name, _ in self.models)
                return self.send(http, 404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
            files = sorted(folder.iterdir())
            body = {"id": "/".join(parts[2:4]), "sha": commit, "siblings": [{"rfilename": path.name} for path in files]}
            if parts[4] == "tree":
                body = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": digest(p)} for p in files]
            return self.send(http, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        file = self.models["/".join(parts[:2]), parts[3]] / parts[4]
        data = file.read_bytes()
        if http.command == "GET":
            self.sent.append(file.name)
        return self.send(
            http, 200, data, {"ETag": f'"{digest(file)}"', "X-Repo-Commit": parts[3], "Accept-Ranges": "bytes"}
        )

    def commit(self, name: str, revision: str) -> str | None:
        commits = [commit for repository, commit in self.models if repository == name]
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit == revision or revision == f"v{commit[-1]}"), None)

    def send(self, http: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        http.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            http.send_header(name, value)
        http.end_headers()
        if http.command == "GET":
            http.wfile.write(body)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def tiny(seed: int, **more) -> Model:
    torch.manual_seed(seed)
    return Model(ModelConfig(16, 1, 2, 1, 8, 24, **more))


def bin_folder(model: Model, folder: Path) -> None:
    """As upstream's own classes save it: a pickle, and no .safetensors."""
    save_weights(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save(to_stock(model.state_dict(), model.config), folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub, place = Hub(), tmp_path_factory.mktemp("hub")
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 1, "moe_intermediate_size": 8}
    for number, commit in enumerate((OLD, NEW)):
        save_weights(tiny(number), place / commit)
        load_tokenizer().save(place / commit)
        (place / commit / "training_args.bin").write_bytes(b"not needed")
        hub.models["someone/llama", commit] = place / commit
    forms = {
        "qwen3": tiny(2, qk_norm=True),
        "granite": tiny(3, **experts),
        "qwen3-moe": tiny(4, qk_norm=True, **{**experts, "num_shared_experts": 0}, norm_topk_prob=True),
    }
    for name, model in forms.items():
        export_hf(model, load_tokenizer(), place / name)
        hub.models[f"someone/{name}", NEW] = place / name
    bin_folder(tiny(5), place / "bin")
    load_tokenizer().save(place / "bin")
    hub.models["someone/MiniMind2.1-Small", NEW] = place / "bin"
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(autouse=True)
def online(hub, tmp_path, monkeypatch):
    """Each test has a cache of its own."""
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub.sent.clear()


def same(model: Model, expected: Model) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("someone/llama", NEW),
        ("hf:someone/llama", NEW),
        (f"someone/llama@{OLD}", OLD),
        ("someone/llama@v1", OLD),
        ("someone/qwen3", "qwen3"),
        ("someone/qwen3-moe", "qwen3-moe"),
        ("someone/granite", "granite"),
        ("someone/MiniMind2.1-Small", "bin"),
    ],
)
def test_a_model_by_name(hub, name, folder):
    loaded = open_weights(WeightArgs(model=name), CPU)
    place = next(path for path in hub.models.values() if path.name == folder)
    assert same(loaded.model, load_model(place))
    assert loaded.folder is None, "results do not belong in a hub's cache"
    assert any(name.removeprefix("hf:") in note and "from Hugging Face" in note for note in loaded.notes)
    assert "training_args.bin" not in hub.sent


def test_a_run_begins_with_a_model_by_name(capsys):
    initial = InitialModel.from_args(StageArgs(from_="someone/llama@v2"), Console(width=400))
    assert same(initial.load(), tiny(1))
    assert f"; someone/llama@{NEW} pins it" in capsys.readouterr().out


def test_the_cache_serves_without_a_network(hub, monkeypatch):
    open_weights(WeightArgs(model="someone/llama"), CPU)
    assert sorted(hub.sent) == sorted(set(hub.sent)) and "model.safetensors" in hub.sent
    hub.sent.clear()
    open_weights(WeightArgs(model="someone/llama"), CPU)
    assert hub.sent == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    loaded = open_model(ModelArgs(model="someone/llama", device="cpu"))
    assert same(loaded.model, tiny(1))
    with pytest.raises(
        ValueError, match="Hugging Face cannot be reached, and its cache does not have the model"
    ) as error:
        open_weights(WeightArgs(model="someone/qwen3"), CPU)
    assert str(error.value).startswith("--model someone/qwen3: ") and "\n" not in str(error.value)


def test_names_that_a_hub_does_not_have():
    for name, reason in (
        ("someone/else", "no such file or folder, and no public model of that name on Hugging Face"),
        ("someone/llama@v9", "someone/llama on Hugging Face has no revision v9"),
    ):
        with pytest.raises(ValueError, match=f"^--from {name}: {reason}$"):
            InitialModel.from_args(StageArgs(from_=name), Console(quiet=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jingyaogong/MiniMind2", HubModel("hf", "jingyaogong/MiniMind2")),
        ("modelscope:gongjy/MiniMind2@v1.0", HubModel("modelscope", "gongjy/MiniMind2", "v1.0")),
        ("a/b@refs/pr/1", HubModel("hf", "a/b", "refs/pr/1")),
        ("runs/sft", None),
        ("here/model", None),  # the folder `here` exists
        ("out/full_sft_512.pth", None),
        ("./out/model", None),
        ("../a", None),
        ("~/model", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("model", None),
        ("model.pth", None),
    ],
)
def test_names_and_paths(name, expected, tmp_path):
    (tmp_path / "here").mkdir()
    assert HubModel.parse(name) == expected


def test_modelscope_by_its_package(hub, tmp_path, monkeypatch):
    name, calls = "modelscope:someone/llama@v2", []
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(
        ValueError, match=r"^--model .*: the package is not installed; run `pip install 'minimind\[modelscope"
    ):
        open_weights(WeightArgs(model=name), CPU)

    def snapshot_download(model_id, revision=None, allow_patterns=None, local_files_only=False):
        calls.append((model_id, revision, allow_patterns, local_files_only))
        if offline and not (local_files_only and cached):
            raise ConnectionError("no route to host\nand more")
        return str(hub.models["someone/llama", NEW])

    offline = cached = False
    fake = ModuleType("modelscope.hub.snapshot_download")
    fake.snapshot_download = snapshot_download
    for module in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert same(open_weights(WeightArgs(model=name), CPU).model, tiny(1))
    offline = cached = True
    assert same(open_weights(WeightArgs(model=name), CPU).model, tiny(1))
    assert calls[0] == ("someone/llama", "v2", ["*.json", "*.jinja", "*.safetensors"], False)
    assert [call[3] for call in calls] == [False, False, True]
    cached, said = False, []
    with pytest.raises(ValueError, match=r"ModelScope does not give it .no route to host., and its cache") as error:
        local_path(name, "--model", said.append)
    assert "\n" not in str(error.value) and not said
