"""Downloads of weights: complete or absent, and one line for each fault. The servers are on this machine."""

import hashlib
import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import opened

from utils.evaluation import session
from utils.run import weights

DATA = bytes(range(256)) * 4000  # 1 MB, no checkpoint
PROBE = ["--train-shards", "x", "--val-shards", "x", "--output-dir", "x"]


class Handler(http.server.BaseHTTPRequestHandler):
    """server.files: path -> bytes. server.cuts: bytes after which an answer breaks off, one for each request; None: whole."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        data, start = self.server.files.get(self.path), 0
        if data is None:
            return self.send_error(404)
        tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == tag:
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.server.gate.wait(20)
        self.wfile.write(data[start : self.server.cuts.pop(0) if self.server.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv(weights.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "WAIT", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cuts, server.asked, server.gate = {"/w.pth": DATA}, [], [], threading.Event()
        server.gate.set()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def named(server, monkeypatch, tmp_path):
    """A table with one name, and a function that changes its entry."""
    entry = weights.table()["mosrep_resnet50_in1k_200ep"] | {"link": f"{server.url}/w.pth"}

    def put(**values):
        (tmp_path / "weights.json").write_text(json.dumps({"ours_tiny": entry | values}))

    monkeypatch.setattr(weights, "TABLE", tmp_path / "weights.json")
    put()
    return put


def files(tmp_path):
    """The visible files of the cache."""
    return sorted(path.name for path in (tmp_path / "cache").glob("[!.]*"))


def test_fetch__a_cut_download_continues_where_it_was(server, capsys):
    server.cuts = [400_000, 700_000]
    path = weights.fetch(f"{server.url}/w.pth", "--init")
    assert path.read_bytes() == DATA and path.name.endswith("-w.pth")
    assert [ranges for _, ranges in server.asked] == [None, "bytes=400000-", "bytes=700000-"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and hashlib.sha256(DATA).hexdigest() in lines[0] and "1.0 MB" in lines[0]
    assert weights.fetch(f"{server.url}/w.pth", "--init") == path and len(server.asked) == 3


def test_fetch__a_server_that_stays_broken(server, tmp_path):
    """The name is absent and the part is kept; the next command continues it, unless the server has another version."""
    server.cuts = [400_000] * weights.TRIES
    with pytest.raises(ValueError, match=r"^--init http://\S+/w.pth: .*ends after 400000 of 1024000 bytes.*continues the") as e:
        weights.fetch(f"{server.url}/w.pth", "--init")
    assert "\n" not in str(e.value) and files(tmp_path) == []
    server.cuts, server.files["/w.pth"] = [], DATA[::-1]
    assert weights.fetch(f"{server.url}/w.pth", "--init").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("path, message", [("/none.pth", "HTTP status 404"), ("/page.pth", "gives a web page and no file")])
def test_fetch__no_file_there(server, tmp_path, path, message):
    server.files["/page.pth"] = b"\n<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(ValueError, match=f"^--init {server.url}{path}: .*{message}"):
        weights.fetch(f"{server.url}{path}", "--init")
    assert files(tmp_path) == [] and not list((tmp_path / "cache").glob("*.part"))


def test_fetch__no_server(server):
    server.server_close()
    with pytest.raises(ValueError, match=r"^--init http://.*cannot be downloaded \(.*refused"):
        weights.fetch(f"{server.url}/w.pth", "--init")


def test_fetch__wrong_sha256(server, named, tmp_path):
    named(sha256="0" * 64)
    with pytest.raises(ValueError, match=f"^--pretrained ours_tiny: .*sha256 {hashlib.sha256(DATA).hexdigest()}, not 0000"):
        weights.fetch("ours_tiny", "--pretrained")
    assert files(tmp_path) == []


def test_fetch__an_unknown_sha256_is_that_of_the_first_download(server, named, tmp_path):
    path = weights.fetch("ours_tiny", "--pretrained")
    assert files(tmp_path) == ["ours_tiny.pth", "ours_tiny.pth.sha256"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "ours_tiny.pth.sha256"], cwd=path.parent, check=True, capture_output=True)
    path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(ValueError, match="ours_tiny.pth has changed since its download; delete it"):
        weights.fetch("ours_tiny", "--pretrained")
    path.unlink()
    server.files["/w.pth"] = DATA[::-1]
    with pytest.raises(ValueError, match=f"sha256 .*, not {hashlib.sha256(DATA).hexdigest()}; nothing was kept"):
        weights.fetch("ours_tiny", "--pretrained")


@pytest.fixture
def disk(tmp_path):
    """The cache's folder on a tmpfs of 512 kB."""
    folder = tmp_path / "cache"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_fetch__no_space(disk, server):
    with pytest.raises(ValueError, match=f"^--init http.*{disk}: No space left on device; set WEIGHTS_CACHE to"):
        weights.fetch(f"{server.url}/w.pth", "--init")
    assert not [path for path in disk.iterdir() if path.stat().st_size > 100]


def test_fetch__two_at_once(server, capsys):
    """One downloads, the other waits for it. Threads are like processes here: the lock belongs to the opened file."""
    server.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(weights.fetch, f"{server.url}/w.pth", "--init") for _ in range(2)]
        threading.Timer(0.5, server.gate.set).start()
        assert [job.result(20).read_bytes() == DATA for job in found] == [True, True]
    said = capsys.readouterr().out
    assert len(server.asked) == 1 and said.count("downloaded") == said.count("another process downloads it; waiting") == 1


def test_fetch__https(server, tmp_path, monkeypatch):
    """With a certificate that the user trusts; another one is refused at once."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl for a certificate")
    words = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost -addext"
    subprocess.run(["openssl", *words.split(), "subjectAltName=DNS:localhost"], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_port}/w.pth"
    with pytest.raises(ValueError, match=r"^--init https://localhost.*certificate"):
        weights.fetch(url, "--init")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    monkeypatch.setattr("urllib.request._opener", None)  # Python 3.13 keeps the certificates of the first request
    server.cuts = [300_000]
    assert weights.fetch(url, "--init").read_bytes() == DATA and not server.cuts


def test_fetch__hugging_face_and_dropbox(server, monkeypatch):
    monkeypatch.setattr(weights, "HUB", server.url)
    server.files["/org/repo/resolve/main/sub/model.safetensors"] = b"a" * 90
    server.files["/org/repo/resolve/v2/w.pth"] = b"b" * 90
    assert weights.fetch("hf://org/repo/sub/model.safetensors", "--init").name.endswith("-model.safetensors")
    assert weights.fetch("hf://org/repo@v2/w.pth", "--init").read_bytes() == b"b" * 90
    with pytest.raises(ValueError, match="--init hf://org/repo: names no file; pass hf://ORGANIZATION/REPOSITORY/FILE"):
        weights.fetch("hf://org/repo", "--init")
    link = "https://www.dropbox.com/s/abc/w.pth?rlkey=x&dl=0"
    assert weights._address(link, "x") == "https://www.dropbox.com/s/abc/w.pth?rlkey=x&dl=1"
    with pytest.raises(ValueError, match="^--pretrained cmc_in1k: is a folder of several files; download one from https"):
        weights.fetch("cmc_in1k", "--pretrained")


def test_fetch__google_drive(server, tmp_path, monkeypatch):
    """Through gdown; without it the line says what to do."""
    name = "mosrep_resnet50_in1k_200ep"
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ValueError, match=rf"^--init {name}: is on Google Drive; run pip install gdown, or download https"):
        weights.fetch(name, "--init")

    def download(id, output, quiet, resume):
        if id != "1Gs0qL5eUgOb-BhLIHd4Q50mMTKNjlo32":
            raise RuntimeError("Cannot retrieve\nthe link")
        with open(output, "wb") as file:
            file.write(DATA)

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    assert weights.fetch(name, "--init").read_bytes() == DATA and files(tmp_path)[0] == f"{name}.pth"
    with pytest.raises(ValueError, match="^--init w2ssl_resnet50_in1k_200ep: Cannot retrieve.the link; download https://drive"):
        weights.fetch("w2ssl_resnet50_in1k_200ep", "--init")


def test_fetch__a_file_that_was_put_into_the_cache(server, named, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ours_tiny.pth").write_bytes(DATA)
    with pytest.raises(ValueError, match="^--init ours_tiny: .*/ours_tiny.pth was put there without ours_tiny.pth.sha256"):
        weights.fetch("ours_tiny", "--init")
    assert not server.asked


def test_fetch__a_name_that_is_nearly_right():
    with pytest.raises(ValueError, match="--init mosrep_resnet50_in1k: no such file or name; did you mean mosrep_resnet50_"):
        weights.fetch("mosrep_resnet50_in1k", "--init")


def test_read_source__a_name_of_the_table(server, named, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("tiny_resnet", num_classes=4).state_dict(), tmp_path / "w.pth")
    server.files["/w.pth"] = (tmp_path / "w.pth").read_bytes()
    frozen, _ = opened("--pretrained", "ours_tiny", "--arch", "tiny_resnet", *PROBE)
    own = torch.load(tmp_path / "w.pth", weights_only=True)
    assert all(torch.equal(value, own[name]) for name, value in frozen.trunk.state_dict().items())
    assert "ours_tiny.pth: torchvision or timm, 72 tensors" in capsys.readouterr().out
    assert session.default_folder("ours_tiny", "linear") == "output/ours_tiny/linear"
    assert session.default_folder("https://host/a/b.pth?x=1", "knn") == "output/b/knn"


def test_table__has_the_released_files_of_the_readme(capsys):
    weights.main([])
    listed, ids = capsys.readouterr().out, re.compile(r"/d/([\w-]+)|/sh/([\w/-]+)")
    readme = (weights.TABLE.parent / "README.md").read_text()
    for name, entry in weights.table().items():
        assert entry["link"] in listed and name in listed and ids.search(entry["link"])[0] in readme
        keys = {"what", "method", "arch", "top1", "protocol", "source", "link", "sha256"}
        assert entry.keys() == keys and (entry["sha256"] is None or re.fullmatch("[0-9a-f]{64}", entry["sha256"]))
    assert {67.7, 69.8, 72.3, 70.8} <= {entry["top1"] for entry in weights.table().values()}
