"""What the parts of an interface's firewall are called: table, bit of the packet mark, log group (pure)."""

from __future__ import annotations

import re
from typing import Final

from identity.errors import BadInput

LOG_GROUP: Final = 0x5254  # plus the slot of the interface; a group belongs to one namespace
_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")


def slot(interface: str) -> int:
    """0-3 from the trailing digits of an interface name: agents that share a namespace use different marks."""
    digits = re.search(r"\d+$", interface)
    return int(digits[0]) % 4 if digits else 0


def log_group(interface: str) -> int:
    """The netlink log group of the table of an interface."""
    return LOG_GROUP + slot(interface)


def accepted_mark(interface: str) -> int:
    """The one bit of the packet mark that says "our firewall let it pass"."""
    return 0x0200_0000 << (2 * slot(interface))


def table_name(interface: str) -> str:
    """``retinue`` for rtn0, else ``retinue_IFNAME``. Raises BadInput for what is no interface name."""
    if not _INTERFACE.fullmatch(interface):
        raise BadInput("interface.name", f"not an interface name: {ascii(interface)[:40]}",
                       hint="up to 15 letters, digits, '.', '_' and '-'")  # fmt: skip
    return "retinue" if interface == "rtn0" else "retinue_" + re.sub(r"[^A-Za-z0-9]", "_", interface)
