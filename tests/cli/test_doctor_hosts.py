"""``fxckpt doctor --hosts``: what one host does in a shared directory, another one sees, or it is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from repository import python_path
from waiting import TIMEOUT

from fxckpt.cli import hosts, main
from fxckpt.store import lock

COMMAND = "import sys; from fxckpt.cli import main; sys.exit(main(sys.argv[1:]))"


def started(directory, count):
    environment = {**os.environ, "PYTHONPATH": python_path()}
    argv = [sys.executable, "-c", COMMAND, "doctor", str(directory), "--hosts", str(count), "--json"]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def verdicts(text):
    return {each["what"]: (each["verdict"], each["detail"]) for each in json.loads(text)["findings"]}


def test_hosts_that_share_a_directory_see_each_other_and_leave_nothing(tmp_path):
    processes = [started(tmp_path, 2) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, err
        found = verdicts(out)
        assert found["hosts"][0] == "ok" and found["hosts"][1].startswith("2: ")
        assert found["data seen"] == ("ok", "as it was written")
        assert found["locks across hosts"] == ("ok", "OFD, POSIX, flock")
        assert found["renames seen"][1].startswith("after 0.")
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_nobody_else_meets_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "PATIENCE", 0.05)
    assert main(["doctor", str(tmp_path), "--hosts", "2", "--json"]) == 1
    verdict, detail = verdicts(capsys.readouterr().out)["hosts"]
    assert verdict == "wrong" and detail.startswith("1 of 2 hosts are here") and "one directory on all of them" in detail


def test_a_meeting_that_another_host_has_ended_is_said(tmp_path, monkeypatch):
    alone = hosts.Hosts(str(tmp_path), 1)
    monkeypatch.setattr(alone, "_seen", lambda: shutil.rmtree(tmp_path / hosts.MEETING))
    *_, last = alone.findings()
    assert (last.what, last.verdict) == ("hosts", "wrong") and last.detail.startswith("another host gave up")


@pytest.mark.parametrize("arguments", [["--hosts", "2"], ["DIR", "--hosts", "1"]])
def test_hosts_need_a_directory_and_each_other(arguments, tmp_path, capsys):
    assert main(["doctor", *(str(tmp_path) if each == "DIR" else each for each in arguments)]) == 2
    assert "--hosts takes two or more" in capsys.readouterr().err


def test_what_is_read_otherwise_than_it_was_written_is_said(tmp_path, monkeypatch):
    alone = hosts.Hosts(str(tmp_path), 1)
    monkeypatch.setattr(alone, "_content", lambda name: b"stale" if name.startswith("data") else b"1")
    found = {each.what: each for each in alone.findings()}
    assert found["data seen"].verdict == "wrong" and "cannot share this store" in found["data seen"].detail


def test_locks_that_keep_no_other_host_out_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "KINDS", {"none": lambda fd: None})
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda _: {each.what: each for each in hosts.Hosts(str(tmp_path), 2).findings()}, range(2))
        for found in both:
            assert found["locks across hosts"].verdict == "wrong" and "two jobs could write" in found["locks across hosts"].detail
