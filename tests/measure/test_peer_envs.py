"""Environments of peers, with a package made here: no network."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest

from paretune.errors import ParetuneError
from paretune.measure.peers import envs
from paretune.measure.peers.catalogue import PEERS, Format, Peer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def wheel(tmp_path):
    """A package of one module, as a file that pip installs without an index."""
    path = tmp_path / "tiny_peer-1.0-py3-none-any.whl"
    info = "tiny_peer-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as f:
        f.writestr("tiny_peer.py", "answer = 42\n")
        f.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.0\n")
        f.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        f.writestr(f"{info}/RECORD", "")
    return path


def make_peer(*requirements, modules=("tiny_peer",), **more):
    settings = {"formats": {"fp32": Format(32)}, "default": ("fp32",), "pip_arguments": ("--no-index",)} | more
    return Peer("tiny", worker="tiny", modules=modules, requirements=requirements, **settings)


def test_an_environment_is_built_used_and_removed(wheel):
    peer, lines = make_peer(str(wheel)), []
    with pytest.raises(ParetuneError, match=r"tiny is not installed\. Run `paretune peers install tiny`"):
        envs.command(peer)
    folder = envs.install(peer, lines.append)
    mark = json.loads((folder / envs.MARK).read_text())
    assert mark["requirements"] == [str(wheel)] and mark["install_sec"] > 0 and len(lines) == 2
    assert envs.is_current(peer) and envs.state(peer) == "installed"
    command = envs.command(peer)
    assert command[0].startswith(str(folder)) and command[1:3] == ["-I", "-u"] and command[-1] == "tiny"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny"]  # no temporary folder is left
    assert envs.remove(peer) and not folder.exists() and not envs.remove(peer)


@pytest.mark.slow
def test_another_version_is_not_taken(wheel):
    envs.install(make_peer(str(wheel)), lambda line: None)
    newer = make_peer(str(wheel), "other==2")
    assert envs.state(newer) == "outdated"
    with pytest.raises(ParetuneError, match="another version"):
        envs.command(newer)


def test_a_failed_installation_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(ParetuneError) as error:
        envs.install(make_peer("no-such-package-of-ours==1.0"), lambda line: None)
    text = str(error.value)
    assert text.startswith("tiny could not be installed: ERROR: ") and "tiny.log" in text and "\n" not in text
    assert not list((envs.home() / "envs").iterdir())
    assert "no-such-package" in (envs.home() / "logs" / "tiny.log").read_text()


@pytest.mark.slow
def test_a_package_that_cannot_be_imported_is_no_installation(wheel):
    with pytest.raises(ParetuneError, match="ModuleNotFoundError"):
        envs.install(make_peer(str(wheel), modules=("tiny_peer", "missing_part")), lambda line: None)
    assert envs.installed(make_peer(str(wheel))) is None


@pytest.mark.slow
def test_an_interrupted_installation_is_not_taken_and_cleared_by_the_next(wheel, monkeypatch):
    peer = make_peer(str(wheel))
    half = envs.folder_of(peer).with_name(f".tiny.{1 << 30}.tmp")  # no process has that number
    (half / "bin").mkdir(parents=True)
    bare = envs.folder_of(peer)
    (bare / "bin").mkdir(parents=True)
    (bare / "bin" / "python").symlink_to(sys.executable)  # all there but the mark
    assert not envs.is_current(peer) and envs.installed(peer) is None

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(envs, "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            envs.install(peer, lambda line: None)
    assert not envs.is_current(peer) and not half.exists()
    envs.install(peer, lambda line: None)
    assert envs.is_current(peer)


def test_an_unwritable_cache_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ParetuneError, match="cannot write"):
        envs.install(make_peer("x==1"), lambda line: None)


def test_a_peer_may_share_the_interpreter():
    peer = make_peer("x==1", modules=("json", "numpy"), shares_interpreter=True)
    assert envs.command(peer)[0] == sys.executable and envs.state(peer) == "in Paretune's own environment"
    assert not envs.shares(make_peer("x==1", modules=("no_such_module_here",), shares_interpreter=True))


def test_the_listing_names_every_peer():
    rows = envs.listing()
    assert [row["peer"] for row in rows] == list(PEERS)
    assert {row["state"] for row in rows if row["peer"] != "transformers"} == {"not installed"}
    json.dumps(rows, allow_nan=False)
