"""Certificates and keys as those use them who must: the ssl module in a real handshake, Flower's readers of keys."""

import os
import socket
import ssl
import threading
from contextlib import suppress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from simulations.deployment.certificates import write_authority, write_node, write_private, write_server

HOST = "hub.example"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an authority and its server's certificate, and another authority in `other`; under a lax umask."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "other").mkdir()
    before = os.umask(0)
    try:
        write_authority(folder)
        write_authority(folder / "other")
        write_server(folder, folder, HOST)
        write_node(folder, "node-007")
    finally:
        os.umask(before)
    return folder


@pytest.fixture(scope="module")
def port(made):
    """Port of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "server.pem", made / "server.key")
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            with suppress(OSError), plain, context.wrap_socket(plain, server_side=True) as secure:
                secure.sendall(b"hello")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(5)


def greeting(port, authority, name):
    context = ssl.create_default_context(cafile=authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        return secure.recv(5)


@pytest.mark.parametrize("name", [HOST, "localhost", "127.0.0.1", "::1"])
def test_the_server_is_trusted_by_its_names(made, port, name):
    assert greeting(port, made / "ca.crt", name) == b"hello"


@pytest.mark.parametrize("name", ["hub.example.org", "other.example", "127.0.0.2"])
def test_by_no_other_name(made, port, name):
    with pytest.raises(ssl.SSLCertVerificationError, match="match"):
        greeting(port, made / "ca.crt", name)


def test_nor_by_another_authority(made, port):
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        greeting(port, made / "other" / "ca.crt", HOST)


def test_a_server_cannot_sign(made):
    certificate = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_an_address_is_a_name_too(made, tmp_path):
    write_server(made, tmp_path, "10.1.2.3")
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name) for name in names.get_values_for_type(x509.IPAddress)} == {"10.1.2.3", "127.0.0.1", "::1"}
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_a_nodes_key_is_what_flower_takes(made):
    private = load_ssh_private_key((made / "key").read_bytes(), None)
    public = load_ssh_public_key((made / "key.pub").read_bytes())
    assert private.public_key() == public
    assert isinstance(public.curve, ec.SECP384R1)
    assert (made / "key.pub").read_text().split()[::2] == ["ecdsa-sha2-nistp384", "node-007"]


@pytest.mark.parametrize("name", ["ca.key", "server.key", "key"])
def test_what_is_secret_nobody_else_reads(made, name):
    assert (made / name).stat().st_mode & 0o777 == 0o600


def test_a_secret_is_never_written_over_another(made):
    with pytest.raises(FileExistsError):
        write_private(made / "ca.key", b"")
