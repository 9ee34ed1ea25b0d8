import hashlib
import http.client
import http.server
import io
import socket
import ssl
import threading
import urllib.error
import zipfile

import pytest

from common.errors import DataError
from simulations import download as module
from simulations.download import SOURCES, download, licence


def packed(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = packed({"ml-100k/": "", "ml-100k/u.data": "1\t2\t3\t4\n", "ml-100k/README": "terms"})


@pytest.fixture
def serve(monkeypatch):
    """Serve these bytes as the archive from a server of our own, and let them be the known ones."""
    servers = []

    def start(content, known=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path != "/ml-100k.zip":
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return None

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_port}/{{name}}.zip")
        sha256 = hashlib.sha256(content if known is None else known).hexdigest()
        monkeypatch.setitem(SOURCES, "ml-100k", SOURCES["ml-100k"]._replace(sha256=sha256))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refused(target, message, name="ml-100k"):
    with pytest.raises(DataError, match=message) as caught:
        download(name, target)
    assert "\n" not in str(caught.value)
    assert not (target / name).exists()
    assert not target.exists() or list(target.iterdir()) == []
    return str(caught.value)


def test_download(serve, tmp_path, capsys):
    serve(GOOD)
    folder = download("ml-100k", tmp_path / "new" / "data")
    assert folder == tmp_path / "new" / "data" / "ml-100k"
    assert (folder / "u.data").read_text() == "1\t2\t3\t4\n"
    assert [path.name for path in folder.parent.iterdir()] == ["ml-100k"]
    assert capsys.readouterr() == ("", "")


def test_existing_data_is_left_alone(serve, tmp_path):
    serve(GOOD)
    (tmp_path / "ml-100k").mkdir()
    with pytest.raises(DataError, match=r"exists already.*data.path="):
        download("ml-100k", tmp_path)
    assert list((tmp_path / "ml-100k").iterdir()) == []


def test_wrong_checksum(serve, tmp_path):
    serve(GOOD[:-1], known=GOOD)
    message = refused(tmp_path, "not the known archive")
    assert "data.path=" in message
    assert "HUSHREC_DATA" in message


@pytest.mark.parametrize(
    "member", ["../evil", "/evil", "ml-100k/../../evil", "other/evil", "evil", "ml-100k/..\\..\\evil"]
)
def test_members_outside_the_folder(serve, tmp_path, member):
    serve(packed({"ml-100k/u.data": "1", member: "x"}))
    refused(tmp_path / "data", "outside ml-100k/")
    assert not (tmp_path / "evil").exists()


def test_not_a_zip(serve, tmp_path):
    serve(b"<html>sorry</html>")
    refused(tmp_path, "cannot be unpacked")


def test_empty_zip(serve, tmp_path):
    serve(packed({}))
    refused(tmp_path, "cannot download")


def test_missing_on_the_server(serve, tmp_path, monkeypatch):
    serve(GOOD)
    monkeypatch.setitem(SOURCES, "ml-9", SOURCES["ml-100k"])
    refused(tmp_path, "Not Found", name="ml-9")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (urllib.error.URLError(ssl.SSLCertVerificationError("certificate has expired")), "certificate has expired"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (http.client.IncompleteRead(b""), "IncompleteRead"),
    ],
)
def test_no_network(tmp_path, monkeypatch, fault, reason):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(module.urllib.request, "urlopen", fail)
    message = refused(tmp_path, reason)
    assert "HUSHREC_DATA" in message


def test_unwritable_target(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot download ml-1m"):
        download("ml-1m", tmp_path / "file" / "data")


def test_unknown_name(tmp_path):
    with pytest.raises(DataError, match="did you mean 'ml-100k'"):
        download("ml-10k", tmp_path)


def test_licences():
    for name in SOURCES:
        text = licence(name)
        assert "research" in text
        assert "10.1145/2827872" in text
        assert "edistribution" in text
    assert "No redistribution" in licence("ml-1m")
    with pytest.raises(DataError):
        licence("netflix")
