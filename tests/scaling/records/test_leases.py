"""Leases: one owner, however it ends, without flock; a claim that only one of many wins."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from recscale.scaling.records import locks
from recscale.scaling.records.locks import Busy, hold, is_held


def of(path, **changes):
    """Writes the lease of an owner on another machine."""
    owner = {"host": "elsewhere", "pid": 1, "machine": "elsewhere", "started": "9", "token": "abc"} | changes
    path.write_text(json.dumps(owner))


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_lease_is_held_by_one_and_gone_afterwards(tmp_path):
    path = tmp_path / "folder" / "lock"
    with hold(path):
        assert is_held(path)
        with pytest.raises(Busy, match=rf"process {os.getpid()} on {socket.gethostname()}") as caught, hold(path):
            pass
        assert caught.value.owner == f"process {os.getpid()} on {socket.gethostname()}"
    assert not path.exists() and not is_held(path) and list(path.parent.iterdir()) == []


def test_a_dead_process_of_this_machine_loses_its_lease_at_once(tmp_path):
    path = tmp_path / "lock"
    script = "import os, sys; from pathlib import Path; from recscale.scaling.records.locks import hold\n"
    script += "with hold(Path(sys.argv[1])): os._exit(9)"
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert path.exists() and not is_held(path)
    with hold(path):
        assert is_held(path)


def test_one_of_another_machine_loses_it_when_it_does_not_renew_it(tmp_path):
    path = tmp_path / "lock"
    of(path)
    assert is_held(path)
    with pytest.raises(Busy, match="process 1 on elsewhere"), hold(path):
        pass
    age(path, locks.EXPIRES_S + 5)
    assert not is_held(path)
    with hold(path):
        assert is_held(path)


def test_a_file_of_no_owner_is_no_lease_for_long(tmp_path):
    """An owner that died before it wrote its name, or the lock file of an earlier version."""
    path = tmp_path / "lock"
    path.touch()
    assert is_held(path)
    age(path, 10)
    with hold(path):
        assert is_held(path)


def test_of_many_that_find_it_expired_one_takes_it(tmp_path):
    path, won, held = tmp_path / "lock", [], threading.Event()
    of(path)
    age(path, locks.EXPIRES_S + 5)

    def attempt():
        try:
            with hold(path):
                won.append(1)
                held.wait(5)
        except Busy:
            pass

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert won == [1]
    held.set()
    for thread in threads:
        thread.join()


def test_an_owner_renews_it_and_ends_when_it_was_replaced(tmp_path):
    path = tmp_path / "lock"
    script = (
        "import sys, time; from pathlib import Path; from recscale.scaling.records import locks\nlocks.BEAT_S = .05\n"
    )
    script += "with locks.hold(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    owner.stdout.readline()
    age(path, 30)
    time.sleep(0.5)
    assert time.time() - path.stat().st_mtime < 10
    of(path)
    assert owner.wait(10) == 75 and b"taken over by process 1 on elsewhere" in owner.stderr.read()
