"""A deployment's folder: who gets which data, what is secret; scripts and units are what their readers take."""

import configparser
import os
import shutil
import subprocess
import tomllib

import numpy as np
import pytest
import yaml
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from common.data.catalogue import Catalogue
from common.data.folder import read_manifest
from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.errors import DataError, StateError, UsageError
from common.files import write_json
from common.loading import load
from simulations.deployment import folder as module
from simulations.deployment.folder import check, divide, guard, init, nodes_of, server_of
from tests.support import world

ONE = world.experiment()
USERS, NODES, SINGLES = 12, 4, 2
CANARY = np.int64(0x5EC2E7_0DD_BA11).tobytes()
ODD = "a folder, 100% odd"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A deployment under a lax umask; user 5's events have a time of their own."""
    home = tmp_path_factory.mktemp("made")
    source = shutil.copytree(prepare(ONE.data), home / "source")
    whole = Sequences.open(source)
    times = np.array(whole.times)
    times[whole.offsets[5] : whole.offsets[6]] = np.frombuffer(CANARY, np.int64)[0]
    np.save(source / "times.npy", times)
    before = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "prepare", lambda data: source)
            init(ONE, home / ODD, NODES, host="hub.example", port=9443, singles=SINGLES)
    finally:
        os.umask(before)
    return home / ODD


# --- who gets what ---------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_user_lives_on_one_node(data):
    users = data.draw(st.integers(1, 60))
    nodes = data.draw(st.integers(1, users))
    singles = data.draw(st.integers(0, nodes if nodes == users else nodes - 1))
    shards = divide(users, nodes, singles)
    assert len(shards) == nodes
    assert [user for shard in shards for user in shard] == list(range(users))
    sizes = [len(shard) for shard in shards]
    assert sizes[:singles] == [1] * singles
    assert not sizes[singles:] or max(sizes[singles:]) - min(sizes[singles:]) <= 1
    assert min(sizes) > 0


@pytest.mark.parametrize(
    ("nodes", "singles", "told"),
    [
        (0, 0, "--nodes 0: must be 1 … 12"),
        (13, 0, "--nodes 13: must be 1 … 12"),
        (4, -1, "--singles -1: must be 0 … 3"),
        (4, 4, "--singles 4: must be 0 … 3"),
        (12, 13, "--singles 13: must be 0 … 12"),
    ],
)
def test_shares_that_cannot_be_are_refused(tmp_path, nodes, singles, told):
    with pytest.raises(UsageError, match=told):
        init(ONE, tmp_path / "x", nodes, singles=singles)
    assert not list(tmp_path.iterdir())


def test_a_nodes_data_is_its_users_and_nobody_elses(made):
    whole, homes = Sequences.open(made.parent / "source"), nodes_of(made)
    assert [home.name for home in homes] == [f"node-{i:03d}" for i in range(NODES)]
    for home, users in zip(homes, divide(USERS, NODES, SINGLES), strict=True):
        own = Sequences.open(home / "data")
        assert (own.first, len(own)) == (users.start, len(users))
        events = slice(whole.offsets[users.start], whole.offsets[users.stop])
        np.testing.assert_array_equal(own.items, whole.items[events])
        np.testing.assert_array_equal(own.times, whole.times[events])


def test_an_event_is_on_its_users_node_and_nowhere_else(made):
    found = {
        path.relative_to(made).parts[:2] for path in made.rglob("*") if path.is_file() and CANARY in path.read_bytes()
    }
    (home,) = (path for path in nodes_of(made) if 5 in Sequences.open(path / "data"))
    assert found == {("nodes", home.name)}


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_experiment_is_in_it(made):
    assert load(made / "experiment.yaml") == ONE


def test_what_is_private_is_for_the_owner_only(made):
    secret = [made, *(made / name for name in ("ca", "server", "client")), *nodes_of(made)]
    secret += [made / "ca" / "ca.key", made / "server" / "server.key", *made.glob("nodes/*/key")]
    secret += [*made.glob("nodes/*/state"), *made.glob("nodes/*/data"), *made.glob("nodes/*/data/*")]
    assert len(secret) > 30
    for path in secret:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_keys_are_where_they_belong(made):
    public = {path.read_text() for path in made.glob("server/keys/*.pub")}
    assert public == {path.read_text() for path in made.glob("nodes/*/key.pub")}
    assert len(public) == NODES
    assert {path.read_bytes() for path in made.rglob("ca.crt")} == {(made / "ca" / "ca.crt").read_bytes()}
    assert [path.parent.name for path in made.rglob("ca.key")] == ["ca"]


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("x", "gone"):
        with pytest.raises(UsageError, match="exists already"):
            init(ONE, tmp_path / name, 2)
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("fault", [DataError("full"), OSError(28, "no space"), KeyboardInterrupt()])
def test_a_fault_midway_leaves_nothing(tmp_path, monkeypatch, fault):
    whole, calls = module.extract, []

    def extract(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise fault
        return whole(*arguments)

    monkeypatch.setattr(module, "extract", extract)
    with pytest.raises(StateError if isinstance(fault, OSError) else type(fault)) as caught:
        init(ONE, tmp_path / "x", 3)
    assert "\n" not in str(caught.value)
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"host": "a b"}, "--host a b: must be a name"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0"),
        ({"host": "::"}, "--host ::"),
        ({"host": "1.2.3"}, "--host 1.2.3"),
        ({"host": "$(reboot)"}, "--host"),
        ({"host": "fe80::1%$(reboot)"}, "--host"),
        ({"host": ""}, "--host"),
        ({"port": 0}, "--port 0"),
        ({"port": 65536}, "--port 65536"),
        ({"port": 9501}, "--port 9501: is that of a node"),
        ({"node_port": 65535}, "--node-port 65535: must be 1 … 65534"),
    ],
)
def test_addresses_that_cannot_be_are_refused(tmp_path, wrong, told):
    with pytest.raises(UsageError) as caught:
        init(ONE, tmp_path / "x", 2, **wrong)
    assert str(caught.value).startswith(told)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "do$lar", "new\nline"])
def test_a_name_that_scripts_would_misread_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="refused; rename") as caught:
        init(ONE, tmp_path / name, 2)
    assert "\n" not in str(caught.value)


# --- scripts, units, configuration -----------------------------------------------------------------------------------


def test_scripts_are_sound(made):
    found = [*made.rglob("start.sh")]
    assert len(found) == NODES + 1
    for path in found:
        assert os.access(path, os.X_OK)
        for shell in ("bash", "sh"):
            subprocess.run([shell, "-n", path], check=True)


@pytest.fixture
def commands(tmp_path):
    """An environment whose commands only say how they were called; `hushrec` succeeds unless $REFUSE is set."""
    (tmp_path / "bin").mkdir()
    for name in ("flower-supernode", "flower-superlink", "flower-superexec", "hushrec"):
        path = tmp_path / "bin" / name
        said = f'printf "%s\\n" {name} "$@"; env | grep -E "^(FLWR|HUSHREC|OMP)_" | sed "s/^/env /"'
        path.write_text(f'#!/bin/sh\n{said}\nif [ {name} = hushrec ] && [ -n "$REFUSE" ]; then exit 2; fi\n')
        path.chmod(0o700)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "HUSHREC_", "OMP_"))}
    return {**kept, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "REFUSE": ""}


def called(script, environment):
    done = subprocess.run([script], env=environment, cwd="/", capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return (
        done,
        [line for line in lines if not line.startswith("env ")],
        {line[4:] for line in lines if line[:4] == "env "},
    )


def test_a_moved_node_starts_with_its_own_files(made, tmp_path, commands):
    home = shutil.copytree(nodes_of(made)[1], tmp_path / "moved here")
    done, said, environment = called(home / "start.sh", commands)
    version = Catalogue.open(home / "data").version
    assert done.returncode == 0, done.stderr
    assert said[:6] == ["hushrec", "deploy", "check", str(home / "data"), "--catalogue", version]
    node = said[6:]
    assert node[0] == "flower-supernode"
    options = dict(zip(node[1::2], node[2::2], strict=True))
    told = parse_config_args([options.pop("--node-config")])
    assert told == {"data-path": str(home / "data"), "state-path": str(home / "state"), "catalogue": version}
    assert options == {
        "--superlink": "hub.example:9443",
        "--root-certificates": str(home / "ca.crt"),
        "--auth-supernode-private-key": str(home / "key"),
        "--host": "127.0.0.1",
        "--port": "9501",
    }
    assert environment == {
        "OMP_NUM_THREADS=1",
        f"FLWR_HOME={home / 'flower'}",
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
    }


def test_a_node_whose_data_is_refused_stays_out(made, commands):
    done, said, _ = called(nodes_of(made)[0] / "start.sh", commands | {"REFUSE": "1"})
    assert done.returncode == 2
    assert "flower-supernode" not in said


def test_a_node_where_nothing_is_installed_says_so(made, commands):
    done, _, _ = called(nodes_of(made)[0] / "start.sh", commands | {"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2
    assert done.stderr == "error: no hushrec on the PATH; install hushrec\n"


def test_a_node_in_a_folder_that_flower_would_misread_says_so(made, tmp_path, commands):
    home = shutil.copytree(nodes_of(made)[1], tmp_path / 'quo"te')
    done, _, _ = called(home / "start.sh", commands)
    assert done.returncode == 2
    assert "quotes and backslashes are not allowed" in done.stderr


@pytest.mark.parametrize(("bind", "host"), [({}, "hub.example"), ({"HUSHREC_BIND": "0.0.0.0"}, "0.0.0.0")])
def test_the_server_asks_for_keys_and_speaks_tls(made, commands, bind, host):
    home = made / "server"
    done, said, environment = called(home / "start.sh", commands | bind)
    assert done.returncode == 0, done.stderr
    assert said[:5] == ["flower-superlink", "--host", host, "--port", "9443"]
    for option, name in (("ca-certfile", "ca.crt"), ("certfile", "server.pem"), ("keyfile", "server.key")):
        assert said[said.index(f"--ssl-{option}") + 1] == str(home / name)
    assert said[said.index("--database") + 1] == str(home / "state.db")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(said)
    assert "--insecure" not in said
    assert f"HUSHREC_OUT={home / 'runs'}" in environment
    assert (home / "runs").is_dir()


def test_clients_find_the_server(made):
    told = tomllib.loads((made / "client" / "config.toml").read_text())["superlink"]
    assert told == {
        "default": "hushrec",
        "hushrec": {"address": "hub.example:9443", "root-certificates": str(made / "ca" / "ca.crt")},
    }
    assert server_of(made) == ("hub.example", 9443)


def test_an_ipv6_address_comes_back(tmp_path):
    init(ONE, tmp_path / "x", 1, host="::1")
    assert server_of(tmp_path / "x") == ("::1", 9443)
    assert "--superlink '[::1]:9443'" in (nodes_of(tmp_path / "x")[0] / "start.sh").read_text()


def test_units_are_sound(made):
    found = {}
    for path in (made / "systemd").iterdir():
        reader = configparser.ConfigParser(interpolation=None)
        reader.optionxform = str
        reader.read_string(path.read_text())
        found[path.name] = reader["Service"]
        assert reader["Install"]["WantedBy"] == "multi-user.target"
    home = str(made).replace("%", "%%")
    server, node = found["hushrec-superlink.service"], found["hushrec-node@.service"]
    assert server["ExecStart"] == f'"{home}/server/start.sh"'
    assert node["ExecStart"] == f'"{home}/nodes/%i/start.sh"'
    assert server["ReadWritePaths"] == f'"{home}/server"'
    assert node["ReadWritePaths"] == f'"{home}/nodes/%i/state" "{home}/nodes/%i/flower"'
    for unit in found.values():
        assert (unit["Restart"], int(unit["RestartSec"])) == ("always", 70)
        assert (unit["NoNewPrivileges"], unit["ProtectSystem"], unit["PrivateTmp"]) == ("yes", "strict", "yes")


def test_compose_has_the_server_and_every_node_with_its_own_folder_only(made):
    services = yaml.safe_load((made / "compose.yaml").read_text())["services"]
    assert list(services) == ["superlink", *(path.name for path in nodes_of(made))]
    for name, service in services.items():
        folder = "server" if name == "superlink" else f"nodes/{name}"
        assert service["command"] == [f"/deployment/{folder}/start.sh"]
        assert service["restart"] == "unless-stopped"
        assert service["read_only"] is True
        for mount in service["volumes"]:
            source, target, *_ = mount.split(":")
            assert source == f"./{folder}" or source.startswith(f"./{folder}/")
            assert target == "/deployment" + source[1:]
            assert (made / source).exists()
        writable = {mount.split(":")[0] for mount in service["volumes"] if not mount.endswith(":ro")}
        assert writable == ({"./server"} if name == "superlink" else {f"./{folder}/state", f"./{folder}/flower"})


# --- a port that is open to a network --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["ca.crt", "server.pem", "server.key", "start.sh"])
def test_without_certificates_no_network(made, tmp_path, lost):
    folder = shutil.copytree(made, tmp_path / "x")
    guard(folder)
    (folder / "server" / lost).unlink()
    with pytest.raises(UsageError, match=f"has no {lost}; a port open to a network needs certificates"):
        guard(folder)


@pytest.mark.parametrize(("old", "new"), [("--enable-supernode-auth ", ""), ("--port", "--insecure --port")])
def test_without_keys_of_nodes_no_network(made, tmp_path, old, new):
    folder = shutil.copytree(made, tmp_path / "x")
    script = folder / "server" / "start.sh"
    script.write_text(script.read_text().replace(old, new))
    with pytest.raises(UsageError, match="is no loopback"):
        guard(folder)
    config = folder / "client" / "config.toml"
    for local in ("127.0.0.5:1", "localhost:1", "[::1]:1"):
        config.write_text(f'[superlink.hushrec]\naddress = "{local}"\n')
        guard(folder)


def test_what_is_no_deployment_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no deployment"):
        server_of(tmp_path)
    (tmp_path / "client").mkdir()
    for text in ("", "[superlink", '[superlink.hushrec]\naddress = "nowhere"'):
        (tmp_path / "client" / "config.toml").write_text(text)
        with pytest.raises(UsageError, match="must have an address such as"):
            server_of(tmp_path)


# --- a node's check --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(made, tmp_path):
    """A node's data, to be spoilt."""
    return shutil.copytree(nodes_of(made)[2] / "data", tmp_path / "data")


def test_good_data_may_take_part(data):
    assert check(data, Catalogue.open(data).version) == Catalogue.open(data) == check(data, None)


def refused(data, told, catalogue=None):
    with pytest.raises(DataError, match=told) as caught:
        check(data, catalogue)
    assert "\n" not in str(caught.value)
    assert str(data) in str(caught.value)


def test_another_catalogue_is_refused(data):
    refused(data, "its catalogue is .*, that of the deployment is 0123456789abcdef", "0123456789abcdef")


@pytest.mark.parametrize("stranger", [-1, 20, 2**31 - 1])
def test_an_item_that_nobody_knows_is_refused(data, stranger):
    items = np.load(data / "items.npy")
    items[3] = stranger
    np.save(data / "items.npy", items)
    refused(data, f"has item {stranger}, its catalogue has 0 … 19 only")


@pytest.mark.parametrize(("users", "told"), [(0, "holds no users"), (2, "holds no events")])
def test_an_empty_node_is_refused(data, users, told):
    manifest = read_manifest(data)
    write_json(data / "manifest.json", manifest | {"kept": manifest["kept"] | {"users": users, "events": 0}})
    for name, size in {"items": 0, "times": 0, "offsets": users + 1}.items():
        np.save(data / f"{name}.npy", np.load(data / f"{name}.npy")[:size] * 0)
    for name in ("train_end", "validation", "test"):
        np.save(data / f"{name}.npy", np.load(data / f"{name}.npy")[:users] * 0)
    refused(data, told)


def test_events_that_belong_to_nobody_are_refused(data):
    offsets = np.load(data / "offsets.npy")
    offsets[1] = offsets[-1] + 1
    np.save(data / "offsets.npy", offsets)
    refused(data, "does not ascend")


@pytest.mark.parametrize("name", ["manifest.json", "items.npy", "catalogue.parquet"])
def test_a_missing_file_is_refused(data, name):
    (data / name).unlink()
    refused(data, "no prepared data|damaged")


def test_no_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no prepared data")
