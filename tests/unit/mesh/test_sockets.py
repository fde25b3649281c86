"""Which process has a socket, asked of the kernel over loopback."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from mesh import sockets
from mesh.netfilter import Conversation
from policy.flows import ProcessInfo

HERE = str(Path(sys.executable).resolve())


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["v4", "v6"])
def test_both_ends_of_a_connection_and_then_its_listener(family: int, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as client:
            flow = Conversation(host, host, 6, client.getsockname()[1], port)
            served, _ = listener.accept()
            with served:
                for source in (True, False):
                    found = sockets.owner(flow, source=source)
                    assert (found.executable, found.uid) == (HERE, os.getuid())
                listed = sockets._sockets(flow, host, port)
                assert {os.fstat(s.fileno()).st_ino for s in (listener, served)} <= set(listed)
                gone = 1 << 31  # a connection that ended between the listing and the search
                monkeypatch.setattr(sockets, "_sockets", lambda *_: {gone: 5, **listed})
                assert sockets.owner(flow, source=False).executable == HERE
                monkeypatch.setattr(sockets, "_sockets", lambda *_: {gone: 5, gone + 1: 6})
                assert sockets.owner(flow, source=False) == ProcessInfo(uid=5)
    monkeypatch.undo()
    assert sockets.owner(flow, source=False) == ProcessInfo()
    assert sockets.owner(Conversation(host, host, 1, 0, 0), source=True) == ProcessInfo()
