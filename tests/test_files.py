"""Files are whole or absent, and what went wrong is one line."""

from __future__ import annotations

import errno
import json
import os

import pytest

from paretune import files
from paretune.errors import EXIT_FAILURE, ParetuneError, WriteError

CAUSES = {
    errno.ENOSPC: "disk is full",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "Input/output error",
}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def assert_one_line(error, *words):
    text = str(error)
    assert error.exit_code == EXIT_FAILURE and error.cure and "\n" not in text
    assert error.__context__ is None or error.__suppress_context__  # no chain of tracebacks
    for word in words:
        assert word in text


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_replaces_the_whole_file(tmp_path, before):
    path = tmp_path / "a.bin"
    if before:
        path.write_bytes(before * 1000)
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_write_makes_the_folders(tmp_path):
    files.write_text(tmp_path / "b" / "c" / "a.txt", "日本\n")
    assert (tmp_path / "b" / "c" / "a.txt").read_bytes() == "日本\n".encode()


def test_write_json_is_strict(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1, None, 0.1]})
    assert json.loads(path.read_text()) == {"a": [1, None, 0.1]}
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="nan"):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, None, 0.1]}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", CAUSES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, code):
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, step, failing(code))
    with pytest.raises(ParetuneError) as caught:
        files.write_text(path, "new")
    assert_one_line(caught.value, str(path), CAUSES[code])
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_new_file_is_complete_before_it_gets_its_name(tmp_path, monkeypatch):
    path, order = tmp_path / "a.txt", []
    replace, fsync = os.replace, os.fsync

    def watch_replace(source, target):
        order.append("replace")
        assert os.path.dirname(source) == str(tmp_path)  # the same file system: a rename, no copy
        with open(source) as f:
            assert f.read() == "new"
        replace(source, target)

    def watch_fsync(descriptor):
        order.append("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", watch_replace)
    monkeypatch.setattr(os, "fsync", watch_fsync)
    files.write_text(path, "new")
    assert order == ["fsync", "replace"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "b").write_text("file")
    with pytest.raises(ParetuneError) as caught:
        files.write_text(tmp_path / "b" / "a.txt", "new")
    assert_one_line(caught.value, "cannot write")
    assert names(tmp_path) == ["b"]


def test_the_target_is_a_folder(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    with pytest.raises(ParetuneError) as caught:
        files.write_text(tmp_path / "b", "new")
    assert_one_line(caught.value, "folder")
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == ["c"]


# ---- ensure_folder --------------------------------------------------------------------------------


def test_ensure_folder(tmp_path):
    folder = files.ensure_folder(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b" and names(folder) == []
    (folder / "x").write_text("kept")
    assert files.ensure_folder(str(folder)) == folder
    assert names(folder) == ["x"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_ensure_folder_proves_that_it_can_be_written(tmp_path, monkeypatch, code):
    """The folder is there, and still nothing can be written into it."""
    monkeypatch.setattr("pathlib.Path.write_bytes", failing(code))
    with pytest.raises(ParetuneError) as caught:
        files.ensure_folder(tmp_path)
    assert_one_line(caught.value, str(tmp_path), CAUSES[code], "-o")


def test_ensure_folder_where_a_file_is(tmp_path):
    (tmp_path / "a").write_text("file")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ParetuneError) as caught:
            files.ensure_folder(path)
        assert_one_line(caught.value, "cannot write", "file")


# ---- whole_folder ---------------------------------------------------------------------------------


def test_whole_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "a" / "out"
    with files.whole_folder(target) as folder:
        (folder / "x").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "y").write_text("2")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(target) == ["sub", "x"] and (target / "sub" / "y").read_text() == "2"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ParetuneError])
def test_whole_folder_vanishes_when_the_body_fails(tmp_path, error):
    target = tmp_path / "out"
    with pytest.raises(error, match="mine"), files.whole_folder(target) as folder:
        (folder / "x").write_text("1")
        raise error("mine")
    assert names(tmp_path) == []


def test_whole_folder_on_a_full_disk(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ParetuneError) as caught, files.whole_folder(target) as folder:
        (folder / "x").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert_one_line(caught.value, str(target), "disk is full")
    assert names(tmp_path) == []


def test_whole_folder_does_not_blame_itself_for_a_missing_input(tmp_path):
    """A body that cannot read its own input is no failed write of the folder."""
    target = tmp_path / "out"
    with pytest.raises((OSError, ParetuneError)) as caught, files.whole_folder(target):
        open(tmp_path / "input.txt").close()
    assert "input.txt" in str(caught.value)
    assert f"cannot write {target}" not in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["mkdir", "replace"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_whole_folder_on_a_read_only_disk(tmp_path, monkeypatch, step, code):
    monkeypatch.setattr(os, step, failing(code))
    with pytest.raises(ParetuneError) as caught, files.whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert_one_line(caught.value, str(tmp_path / "out"), CAUSES[code], "-o")
    assert names(tmp_path) == []


def test_whole_folder_refuses_what_exists(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(ParetuneError) as caught, files.whole_folder(target):
        pytest.fail("the body must not run")
    assert_one_line(caught.value, "exists already", "--force")
    assert (target / "old").read_text() == "kept" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_whole_folder_where_a_file_is(tmp_path, overwrite):
    target = tmp_path / "out"
    target.write_text("kept")
    with pytest.raises(ParetuneError) as caught, files.whole_folder(target, overwrite=overwrite) as folder:
        (folder / "x").write_text("1")
    assert_one_line(caught.value, str(target))
    assert target.read_text() == "kept" and names(tmp_path) == ["out"]


def test_whole_folder_takes_an_empty_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with files.whole_folder(target) as folder:
        (folder / "x").write_text("1")
    assert names(target) == ["x"] and names(tmp_path) == ["out"]


def test_whole_folder_takes_the_empty_current_folder(tmp_path, monkeypatch):
    """`-o .`"""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with files.whole_folder(".") as folder:
        (folder / "x").write_text("1")
    assert names(here) == ["x"] and names(tmp_path) == ["here"]


def test_whole_folder_overwrites_when_told(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with files.whole_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("2")
        assert names(target) == ["old"]
    assert names(target) == ["new"] and names(tmp_path) == ["out"]


def test_whole_folder_keeps_the_old_one_when_the_body_fails(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(RuntimeError), files.whole_folder(target, overwrite=True):
        raise RuntimeError
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


def test_whole_folder_keeps_the_old_one_when_the_rename_fails(tmp_path, monkeypatch):
    """Between old and new there is no moment without either."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    replace = os.replace

    def fail_into_place(source, destination):
        if str(destination) == str(target) and not os.path.exists(os.path.join(source, "old")):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_into_place)
    with pytest.raises(ParetuneError), files.whole_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


def test_errors_are_one_line_whatever_they_are_made_of():
    error = ParetuneError("a\nb\r\n  c", "do\tthis\nnow")
    assert str(error) == "a b c. do this now"
    assert str(ParetuneError("only a cause")) == "only a cause"


# --- the cache ------------------------------------------------------------------------------------------------------


def test_a_scratch_folder_vanishes(tmp_path):
    with pytest.raises(KeyError), files.scratch_folder(tmp_path / "x.whl") as folder:
        (folder / "a").write_text("1")
        assert names(tmp_path) == [folder.name]
        raise KeyError
    assert names(tmp_path) == []


def test_a_scratch_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError) as error, files.scratch_folder(tmp_path / "file" / "x"):
        pass
    assert_one_line(error.value, "cannot write")


NOBODY = 1 << 30  # no process has that number


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (f".x.{NOBODY}.tmp", f".x.{NOBODY}.old"):
        (tmp_path / name / "deep").mkdir(parents=True)
    kept = ["x", f".x.{os.getpid()}.tmp", f".x.y.{NOBODY}.tmp", f".x.{NOBODY}.log", ".x.notes.tmp", f".xy.{NOBODY}.tmp"]
    for name in [f".x[1].{NOBODY}.tmp", *kept]:
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path / "x")
    files.remove_leftovers(tmp_path / "x[1]")
    files.remove_leftovers(tmp_path / "absent" / "x")
    assert names(tmp_path) == sorted(kept)


def test_the_cure_of_a_cache_is_another_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError) as error, files.into_cache():
        files.write_text(tmp_path / "file" / "x", "1")
    assert_one_line(error.value, "cannot write", "PARETUNE_CACHE")
    assert "-o" not in error.value.cure
    with pytest.raises(ParetuneError, match="no cure of ours"), files.into_cache():
        raise ParetuneError("x", "no cure of ours")
