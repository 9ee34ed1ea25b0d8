"""Who is who in a deployment: a certificate authority of its own, the server's certificate, one key per node.

Nodes know the server by the authority's certificate; the server knows a node by its public key (ECDSA over P-384, RFC
5656, as ``ssh-keygen -t ecdsa -b 384`` makes it), which has to be registered before the node may connect.
"""

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 825
"""How long certificates are valid; afterwards a deployment has to be made anew."""
_SKEW = timedelta(minutes=10)  # a device's clock may be late
_LOCAL = ("127.0.0.1", "::1", "localhost")
_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def write_authority(folder: Path) -> None:
    """Make a certificate authority: `ca.crt` for everybody, `ca.key` for whoever will sign.

    Parameters
    ----------
    folder : Path
        An existing folder without such files.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("hushrec deployment CA")
    draft = _draft(name, name, key.public_key(), key.public_key(), "key_cert_sign", "crl_sign")
    draft = draft.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    write_private(folder / "ca.key", _pem(key))
    (folder / "ca.crt").write_bytes(draft.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))


def write_server(authority: Path, folder: Path, host: str) -> None:
    """Make the server's `server.pem` and `server.key`, valid for its host and for this machine by its local names.

    Parameters
    ----------
    authority : Path
        Folder of the authority that signs.
    folder : Path
        An existing folder without such files.
    host : str
        Name or IP address by which nodes call the server.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signing = load_pem_private_key((authority / "ca.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise TypeError("the authority's key is of another kind")
    draft = _draft(_name("hushrec server"), issuer.subject, key.public_key(), signing.public_key(), "digital_signature")
    draft = draft.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    draft = draft.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = [_general(name) for name in dict.fromkeys((host, *_LOCAL))]
    draft = draft.add_extension(x509.SubjectAlternativeName(names), critical=False)
    write_private(folder / "server.key", _pem(key))
    (folder / "server.pem").write_bytes(draft.sign(signing, hashes.SHA384()).public_bytes(Encoding.PEM))


def write_node(folder: Path, name: str) -> None:
    """Make a node's key pair in OpenSSH's format: `key`, which stays with the node, and `key.pub`, to be registered.

    Parameters
    ----------
    folder : Path
        An existing folder without such files.
    name : str
        Goes into the public key's comment.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(folder / "key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / "key.pub").write_bytes(public + b" " + name.encode() + b"\n")


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that nobody but its owner may read at any moment, whatever the umask.

    Raises
    ------
    OSError
        Also where the file exists already.
    """
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _draft(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    *uses: str,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    draft = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    draft = draft.not_valid_before(now - _SKEW).not_valid_after(now + timedelta(days=DAYS))
    draft = draft.add_extension(x509.KeyUsage(**{use: use in uses for use in _USES}), critical=True)
    draft = draft.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return draft.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
