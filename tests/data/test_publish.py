"""Files appear whole or not at all."""

import os
import subprocess
import sys

import pytest
from karmma.data import publish as publish_module
from karmma.data.errors import CacheError
from karmma.data.publish import publish, publish_folder, publish_json, read_json


def test_published_file_replaces_the_old_one_and_leaves_no_temporary(tmp_path):
    publish(tmp_path / "a" / "x", b"old")
    publish(tmp_path / "a" / "x", b"new")
    assert (tmp_path / "a" / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path / "a") == ["x"]


def test_full_disk_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    publish(tmp_path / "x", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"x: cannot be written: No space left on device\. Free space"):
        publish(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_folder_that_fails_half_way_does_not_appear(tmp_path):
    def fill(folder):
        folder.mkdir()
        (folder / "part").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CacheError, match="No space left"):
        publish_folder(tmp_path / "store", fill)
    assert os.listdir(tmp_path) == []


def test_damaged_json_is_named(tmp_path):
    publish_json(tmp_path / "r.json", {"a": 1})
    assert read_json(tmp_path / "r.json") == {"a": 1}
    (tmp_path / "r.json").write_text('{"a": ')
    with pytest.raises(CacheError, match=r"r\.json: damaged, not JSON"):
        read_json(tmp_path / "r.json")


def test_sweep_removes_what_killed_processes_of_this_machine_left_and_nothing_else(tmp_path):
    code = "import os, sys; from pathlib import Path; from karmma.data.publish import _temporary; "
    code += f"one = _temporary(Path({str(tmp_path)!r}) / 'deep' / '0'); one.parent.mkdir(); one.write_bytes(b'half'); "
    code += "two = _temporary(one.parent / 'store.zarr'); two.mkdir(); (two / 'zarr.json').write_bytes(b''); "
    code += "os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list((tmp_path / "deep").iterdir())) == 2
    running, foreign = publish_module._temporary(tmp_path / "mine"), tmp_path / ".0.0123abcd-1.tmp"
    for path in (running, foreign, tmp_path / "shard", tmp_path / ".hidden.tmp"):
        path.write_bytes(b"whole")
    publish_module.sweep(tmp_path)
    assert not list((tmp_path / "deep").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"deep", running.name, foreign.name, "shard", ".hidden.tmp"}
