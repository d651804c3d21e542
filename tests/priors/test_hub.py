"""A backbone by its hub name, downloaded by huggingface_hub itself from a hub that runs here."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/small"

LOAD = """
import json
from lago_fast.priors.backbone import find_backbone
found = find_backbone("someone/small")
parameters = sum(p.numel() for p in found.model.parameters())
print(json.dumps([found.source, found.revision, found.sha256, found.kind, parameters]))
"""


REFUSE = """
from lago_fast.priors.backbone import find_backbone
def refuse(outline):
    print(sum(p.numel() for p in outline.model.parameters()))
    raise SystemExit
find_backbone("someone/small", before_weights=refuse)
"""


def serve(folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """Return a handler that speaks as much of the hub's protocol as a download of one repository takes."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            """Say nothing."""

        def answer(self, body: bytes, kind: str, **headers: str) -> None:
            self.send_response(200)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(path)
            file = folder / path.rsplit("/", 1)[-1]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in folder.iterdir()
                ]
                self.answer(json.dumps(tree).encode(), "application/json")
            elif path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": f.name} for f in folder.iterdir()]
                about = {"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "downloads": 0, "tags": []}
                self.answer(json.dumps(about).encode(), "application/json")
            elif path.startswith(f"/{NAME}/resolve/") and file.is_file():
                body = file.read_bytes()
                tag = hashlib.sha256(body).hexdigest()
                self.answer(body, "application/octet-stream", ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
            else:
                self.send_error(404)

        do_HEAD = do_GET

    return Hub


@pytest.fixture
def hub(encoder, tmp_path):
    """Run the hub; return (environment of a process that asks it, what was asked)."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), serve(Path(encoder), asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield (
        {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"},
        asked,
    )
    server.shutdown()
    server.server_close()


def load(environment: dict[str, str], code: str = LOAD) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_name_is_downloaded_once_and_then_read_from_the_cache(hub, encoder):
    environment, asked = hub
    source, revision, sha256, kind, parameters = load(environment)
    assert (source, revision, kind) == ("hub", COMMIT, "encoder")
    assert sha256 == hashlib.sha256((Path(encoder) / "model.safetensors").read_bytes()).hexdigest()
    assert parameters > 0
    assert any(path.endswith("model.safetensors") for path in asked)
    asked.clear()
    assert load({**environment, "HF_HUB_OFFLINE": "1"})[:3] == ["hub", COMMIT, sha256]
    assert asked == []


def test_a_cache_that_holds_the_configuration_alone_is_not_taken_for_the_model(hub):
    environment, asked = hub
    load(
        environment,
        "from huggingface_hub import hf_hub_download\nprint(len(hf_hub_download('someone/small', 'config.json')))",
    )
    asked.clear()
    load(environment, REFUSE)
    assert any("tokenizer" in path for path in asked)


def test_who_refuses_a_backbone_by_its_outline_does_not_download_its_weights(hub):
    environment, asked = hub
    parameters = load(environment, REFUSE)
    assert any(path.endswith("config.json") for path in asked)
    assert not any(path.endswith("model.safetensors") for path in asked)
    assert load(environment)[-1] == parameters, "the weights come once they are wanted"
