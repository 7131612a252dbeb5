"""What all scripts promise: bad input is told in one line, and files are written whole."""

import os

import pytest

from safety import BadInput, check_out


def test_an_out_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "read.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "read.json")
    refused = {
        "out.npz": "end in .json",
        "nowhere/out.json": "no folder",
        "folder.json": "is a folder",
        "summary.json": "train.py's own",
        "read.json": "is what is read",
        "link.json": "is what is read",
    }
    for name, reason in refused.items():
        with pytest.raises(BadInput, match=reason):
            check_out(tmp_path / name, ".json", "python", tmp_path / "read.json")
    check_out(None, ".json")
    check_out(tmp_path / "out.json", ".json", tmp_path / "read.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="no leave to write"):
        check_out(tmp_path / "out.json", ".json")
