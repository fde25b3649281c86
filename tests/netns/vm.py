"""A machine whose network card is a tap of the host: frames go between the tap and a card in the guest's namespace.

    python vm.py HOST-NETNS GUEST-NETNS DEVICE
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_TAP_NO_PI = 0x1002


def _tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_NO_PI))
    return fd


def main() -> None:
    from mesh.lab_process import enter
    from mesh.sd_notify import notify

    host, guest, device = sys.argv[1:]
    enter(host)
    outside = _tap(device)
    enter(guest)
    inside = _tap("eth0")
    notify("READY=1")
    other = {outside: inside, inside: outside}
    while True:
        for fd in select.select(list(other), [], [])[0]:
            try:
                os.write(other[fd], os.read(fd, 65536))
            except OSError:
                continue  # the other side is down: a card drops then


if __name__ == "__main__":
    main()
