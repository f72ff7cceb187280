"""Fetching a model by its hub id, from a hub of the test's own: what is asked for, progress, stopping, what stands in the way."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_model import make_model

from lowvram_tuner.models import hub

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHERS = {"consolidated.safetensors": b"c" * 999, "pytorch_model.bin": b"p" * 999, "onnx/model.safetensors": b"o" * 999, "README.md": b"#"}


class Hub(ThreadingHTTPServer):
    """Serves files as one model, `tests/tiny`, under the hub's addresses; remembers what was fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.gated, self.got, self.asked = files, False, [], 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked += 1
        path = self.path.split("?")[0]
        if not path.startswith(("/api/models/tests/tiny", "/tests/tiny/")):
            return self.answer(404, X_Error_Code="RepoNotFound")
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in self.server.files.items()]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if path.startswith("/api/"):
            about = {"id": "tests/tiny", "sha": SHA, "siblings": [{"rfilename": name} for name in self.server.files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        name = path.split("/resolve/")[-1].partition("/")[2]  # behind the revision: a commit, or main
        if self.server.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        if name not in self.server.files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        body = self.server.files[name]
        if self.command == "GET":
            self.server.got.append(name)
        return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=SHA, Accept_Ranges="bytes")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = make_model(tmp_path_factory.mktemp("tiny") / "model")
    return {p.name: p.read_bytes() for p in folder.iterdir()} | OTHERS


@pytest.fixture
def server(files):
    hub = Hub(dict(files))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def ask(server, tmp_path, root):
    """Runs a few lines in a process whose hub is the test's; returns what they print last, as JSON."""

    def run(lines: str, **environment: str):
        given = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root), "HF_HUB_DISABLE_XET": "1"}
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")}
        head = "import json\nfrom lowvram_tuner.models.source import locate, load_tokenizer\nfrom lowvram_tuner.models.hub import find_shape\n"
        done = subprocess.run(
            [sys.executable, "-c", head + textwrap.dedent(lines)], capture_output=True, text=True, env=kept | given | environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


LOCATE = """
    seen = []
    source = locate("tests/tiny", progress=lambda done, total: seen.append((done, total)))
    print(json.dumps([str(source.folder), source.gguf, source.public_id, seen]))
"""
REFUSED = """
    from lowvram_tuner.config import ConfigError
    try:
        locate("{}")
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


def test_what_the_program_reads_is_fetched_once_with_progress(server, ask):
    folder, gguf, public_id, seen = ask(LOCATE)
    assert (gguf, public_id) == (None, "tests/tiny")
    wanted = {name for name in server.files if name not in OTHERS}
    assert {p.name for p in Path(folder).iterdir()} == wanted == set(server.got)
    total = sum(len(server.files[name]) for name in wanted)
    assert seen[-1] == [total, total] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    asked = server.asked
    assert ask(LOCATE) == [folder, None, "tests/tiny", []] and server.asked == asked, "nothing is asked of the hub again"
    assert ask(LOCATE, HF_ENDPOINT="http://127.0.0.1:9")[0] == folder, "and it needs no network"


def test_words_and_shape_do_not_fetch_weights(server, ask):
    assert ask('print(json.dumps([len(load_tokenizer("tests/tiny")), find_shape("tests/tiny").num_hidden_layers]))') == [260, 2]
    assert "model.safetensors" not in server.got
    assert Path(ask(LOCATE)[0], "model.safetensors").stat().st_size == len(server.files["model.safetensors"])


PLAN = """
    from lowvram_tuner.cli import main
    assert main(["plan", "--model", "{}", "--json"]) == 0
"""


def test_a_plan_fetches_the_config_alone(server, ask):
    found = ask(PLAN.format("tests/tiny"))
    assert found["predicted_peak_gb"] > 0 and server.got == ["config.json"]
    assert ask(PLAN.format("tests/tiny"), HF_ENDPOINT="http://127.0.0.1:9") == found, "and then no network"


def test_a_plan_says_what_stands_in_the_way(server, ask):
    refused = REFUSED.replace("locate(", "find_shape(")
    assert "'tests/none' is not on the hub" in ask(refused.format("tests/none"))
    assert "cannot be fetched from the hub" in ask(refused.format("tests/tiny"), HF_ENDPOINT="http://127.0.0.1:9")
    server.gated = True
    assert "has a licence to accept" in ask(refused.format("tests/tiny"))
    server.gated = False
    config = json.loads(server.files.pop("config.json"))
    assert "'tests/tiny' has no config.json on the hub" in ask(refused.format("tests/tiny"))
    server.files["config.json"] = json.dumps(config | {"num_local_experts": 8}).encode()
    assert "tests/tiny is a mixture of experts (num_local_experts=8)" in ask(refused.format("tests/tiny"))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "a/b"])
def test_an_id(name):
    assert hub.is_id(name)


@pytest.mark.parametrize("name", ["demo", "/a", "a/", "/a/b", "a/b/c", "./b", "../b", "~/b", "a\\b", "C:/b", "a/b:c", ""])
def test_no_id(name):
    assert not hub.is_id(name)


def test_a_path_that_exists_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_id("models/a.gguf")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.gguf").touch()
    assert not hub.is_id("models/a.gguf")


def test_a_stop_ends_the_download_and_the_next_one_goes_on(server, ask):
    server.files["model.safetensors"] += bytes(64 << 20)
    stopped = """
        class Stop(Exception): pass
        def progress(done, total):
            if done > total / 4: raise Stop
        try:
            locate("tests/tiny", progress=progress)
        except Stop:
            print(json.dumps("stopped"))
    """
    assert ask(stopped) == "stopped"
    folder, *_ = ask(LOCATE)
    assert Path(folder, "model.safetensors").stat().st_size == len(server.files["model.safetensors"])


def test_a_licence_to_accept_is_named(server, ask):
    server.gated = True
    said = ask(REFUSED.format("tests/tiny"))
    assert "has a licence to accept" in said and "https://huggingface.co/tests/tiny" in said and "HF_TOKEN" in said


def test_what_else_stands_in_the_way_is_one_sentence(server, ask):
    assert "'tests/none' is not on the hub" in ask(REFUSED.format("tests/none"))
    assert "cannot be fetched from the hub" in ask(REFUSED.format("tests/tiny"), HF_ENDPOINT="http://127.0.0.1:9")
    del server.files["model.safetensors"]
    assert "holds no *.safetensors" in ask(REFUSED.format("tests/tiny"))


def test_a_disk_without_room_is_named_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    free = hub.shutil.disk_usage(tmp_path).free
    hub._room("a/b", free // 2)
    with pytest.raises(hub.ConfigError, match=r"takes .* GB of disk and .* GB free; free some, or set HF_HOME"):
        hub._room("a/b", free + 10**12)


def test_a_folder_is_whole_when_its_index_is_met(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert hub.is_whole(tmp_path, False) and not hub.is_whole(tmp_path, True)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert not hub.is_whole(tmp_path, True)
    (tmp_path / "model-2.safetensors").touch()
    assert hub.is_whole(tmp_path, True)
