"""Facts about the process at the other end, with real sockets and processes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys

import pytest

from mesh import attestation
from mesh.attestation import NotAttested, attest, effective_uid, namespace_at, own_namespace

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()"


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        yield made


@pytest.fixture
def child(listener):
    """A process that has connected and waits; ends when its standard input is closed."""
    with subprocess.Popen([sys.executable, "-c", CONNECT, listener.getsockname()], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate()


def no_peer_pidfd(_connection) -> int:
    raise OSError(errno.ENOPROTOOPT, "as before Linux 6.5")


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_caller_is_known_until_it_ends(listener, child, old_kernel, monkeypatch):
    if old_kernel:
        monkeypatch.setattr(attestation, "_peer_pidfd", no_peer_pidfd)
    connection, _ = listener.accept()
    with connection:
        caller = attest(connection)
        try:
            assert (caller.pid, caller.uid, caller.gid) == (child.pid, os.geteuid(), os.getegid())
            assert caller.alive()
            with caller.namespace() as space:
                assert space == own_namespace()
            child.communicate()
            assert not caller.alive()
            with pytest.raises(NotAttested) as caught, caller.namespace():
                pass
            assert caught.value.code == "attest.gone"
        finally:
            caller.close()


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_caller_that_ended_before_it_was_asked_about_is_nobody(listener, child, old_kernel, monkeypatch):
    if old_kernel:
        monkeypatch.setattr(attestation, "_peer_pidfd", no_peer_pidfd)
    connection, _ = listener.accept()
    child.communicate()
    with connection, pytest.raises(NotAttested) as caught:
        caller = attest(connection)  # a kernel that knows the peer by pidfd may still name the dead one
        with contextlib.closing(caller), caller.namespace():
            pass
    assert caught.value.code == "attest.gone"


def test_another_failure_of_the_kernel_is_not_a_reason_to_guess(monkeypatch):
    def fail(_connection) -> int:
        raise OSError(errno.ESRCH, "no such process")

    monkeypatch.setattr(attestation, "_peer_pidfd", fail)
    one, other = socket.socketpair()
    with one, other, pytest.raises(NotAttested):
        attest(one)


def test_a_number_that_is_somebody_else_by_now_is_nobody(monkeypatch):
    monkeypatch.setattr(attestation, "_peer_pidfd", no_peer_pidfd)
    monkeypatch.setattr(attestation, "effective_uid", lambda _: 12345)
    before = len(os.listdir("/proc/self/fd"))
    one, other = socket.socketpair()
    with one, other, pytest.raises(NotAttested) as caught:
        attest(one)
    assert caught.value.code == "attest.gone"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_of_another_pid_namespace_is_nobody(monkeypatch):
    class Unseen:
        def getsockopt(self, *_):
            return attestation._CREDENTIALS.pack(0, 0, 0)

    with pytest.raises(NotAttested) as caught:
        attest(Unseen())
    assert caught.value.code == "attest.unseen"


def test_a_process_that_may_not_be_looked_at_is_nobody(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        caller = attest(one)

        def refuse(*_):
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(NotAttested) as caught, caller.namespace():
            pass
        monkeypatch.undo()
        caller.close()
    assert caught.value.code == "attest.hidden"


def test_the_pidfd_is_not_shown():
    one, other = socket.socketpair()
    with one, other:
        caller = attest(one)
        caller.close()
    assert "pidfd" not in repr(caller)


def test_effective_user():
    assert effective_uid(os.getpid()) == os.geteuid()
    assert effective_uid(4_194_305) is None


def test_a_file_is_not_a_namespace(tmp_path):
    (tmp_path / "file").write_text("")
    assert namespace_at(str(tmp_path / "file")) is None
    assert namespace_at(f"/proc/{os.getpid()}/ns/net") == own_namespace()
    assert namespace_at(str(tmp_path / "missing")) is None
    assert namespace_at("../x") is None
