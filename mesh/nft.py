"""nftables as a service: run one transaction, list one table, notice that somebody else changed the rules.

Transactions go through the `nft` program: one process a change, one netlink batch, all or nothing. The kernel's
generation number (NFT_MSG_GETGEN, one message) tells cheaply whether anything changed since our own last commit.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import struct
from typing import Any, Final

from identity.errors import Bug, NoPrivilege, NotFound, TimedOut

TIMEOUT: Final = 30.0  # seconds for one transaction

# linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_MSG_GETGEN: Final = 16
NEWGEN: Final = _NFNL_SUBSYS_NFTABLES << 8 | 15  # type of the message that tells the generation
_NFTA_GEN_ID: Final = 1
_NETLINK_NETFILTER: Final = 12
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2


def program() -> str:
    """Path of nft. Raises NotFound."""
    path = shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")
    if path is None:
        raise NotFound("firewall.no_nft", "the nft program is not installed", hint="install the package nftables")
    return path


async def _nft(*args: str, text: str | None = None) -> tuple[int, bytes, bytes]:
    process = await asyncio.create_subprocess_exec(
        program(), *args,
        stdin=asyncio.subprocess.DEVNULL if text is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    # A task of its own: its output has to be read to the end whatever becomes of the caller, for nft would wait for
    # that, and we for nft.
    talk = asyncio.ensure_future(process.communicate(None if text is None else text.encode()))
    try:
        async with asyncio.timeout(TIMEOUT):
            out, err = await asyncio.shield(talk)
    except TimeoutError:
        process.kill()
        await asyncio.wait((talk,))
        raise TimedOut("firewall.slow", f"nft did not finish within {TIMEOUT:.0f} s") from None
    except BaseException:
        # A cancelled caller must not leave a transaction that may or may not still happen. A listing changes nothing.
        if text is None and process.returncode is None:
            process.kill()
        await asyncio.wait((talk,))
        raise
    assert process.returncode is not None
    return process.returncode, out, err


class Rejected(Bug):
    """The kernel refused a transaction; nothing of it is in force."""


async def run(text: str) -> None:
    """One transaction. Raises Rejected (nothing changed), NoPrivilege, NotFound, TimedOut."""
    code, _, err = await _nft("-f", "-", text=text)
    if code == 0:
        return
    message = err.decode(errors="replace").strip()
    if "Operation not permitted" in message:
        raise NoPrivilege("firewall.privilege", "may not change nftables", hint="run as root (CAP_NET_ADMIN)")
    first = message.splitlines()[0] if message else f"exit status {code}"
    raise Rejected("firewall.rejected", f"nft refused a transaction: {first[:300]}")


async def list_table(name: str) -> list[dict[str, Any]] | None:
    """The objects of the table `inet name` as nft's JSON has them, None when there is no such table."""
    return await _list("table", "inet", name)


async def list_objects(*what: str) -> list[dict[str, Any]]:
    """`nft list WHAT` as JSON objects; empty when it is not there."""
    return await _list(*what) or []


async def _list(*what: str) -> list[dict[str, Any]] | None:
    code, out, err = await _nft("-j", "-p", "list", *what)
    if code != 0:
        if b"No such file" in err:
            return None
        if b"not permitted" in err:
            raise NoPrivilege("firewall.privilege", "may not read nftables", hint="run as root (CAP_NET_ADMIN)")
        raise Bug("firewall.list", f"nft cannot list {what[0]}: {err.decode(errors='replace').strip()[:200]}")
    objects = json.loads(out)["nftables"]
    assert isinstance(objects, list)
    return objects


async def has(table: str, name: str, element: str) -> bool:
    """Is an element in a set of the table `inet table`?"""
    code, _, err = await _nft("get", "element", "inet", table, name, f"{{ {element} }}")
    if code != 0 and b"not permitted" in err:
        raise NoPrivilege("firewall.privilege", "may not read nftables", hint="run as root (CAP_NET_ADMIN)")
    return code == 0


def generation() -> int:
    """The rule-set generation of this network namespace: it grows by one with every commit of anyone."""
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    kind = (_NFNL_SUBSYS_NFTABLES << 8) | _NFT_MSG_GETGEN
    message = struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
        sock.settimeout(5)
        sock.sendto(message, (0, 0))
        reply = sock.recv(4096)
    return generation_of(reply)


def generation_of(message: bytes) -> int:
    """What an NFT_MSG_NEWGEN says. Raises NoPrivilege for an error in its place."""
    length, kind = struct.unpack_from("=IH", message)
    if kind == _NLMSG_ERROR:
        raise NoPrivilege("firewall.privilege", "may not read nftables", hint="run as root (CAP_NET_ADMIN)")
    offset = 20  # header and nfgenmsg
    while offset + 4 <= length:
        size, attribute = struct.unpack_from("=HH", message, offset)
        if attribute & 0x3FFF == _NFTA_GEN_ID and size >= 8:
            return int(struct.unpack_from(">I", message, offset + 4)[0])
        if size < 4:
            break
        offset += (size + 3) & ~3
    raise Bug("firewall.generation", "the kernel did not tell the nftables generation")
