"""`retinue` on a node: enroll, status, attach, detach, explain, ping, svid, doctor, down."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, NotFound, Refused

if TYPE_CHECKING:
    from identity.wire.admin import ExplainReply
    from identity.wire.local import Attachment, Status
    from mesh.local_client import LocalClient

T = TypeVar("T")

STATE_DIR = Path("/var/lib/retinue")
MAX_TOKEN_FILE = 4096

Format = Annotated[Output, typer.Option("-o", "--output", help="table, json, jsonl or yaml.")]
Json = Annotated[bool, typer.Option("--json", help="The same as -o json.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", envvar="RETINUE_RUN_DIR", help="Where the agent's socket is [/run/retinue].")
]
StateDirOpt = Annotated[Path, typer.Option("--state-dir", metavar="DIR", envvar="RETINUE_STATE_DIR", help="The agent's state.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A workload, such as web or shop/api.")]
Instance = Annotated[int, typer.Option("--instance", metavar="N", min=0, help="Which instance of it.")]


def _format(output: Output, as_json: bool) -> Output:
    return Output.JSON if as_json else output


def ask(run_dir: Path | None, question: Callable[[LocalClient], Awaitable[T]]) -> T:
    """Ask the agent of this machine one thing."""
    import asyncio

    from mesh.local_client import LocalClient, socket_path

    async def body() -> T:
        async with LocalClient(socket_path(run_dir)) as agent:
            return await question(agent)

    return asyncio.run(body())


def register(app: typer.Typer) -> None:
    """Put the commands under `app`."""
    app.command(epilog="Example: retinue enroll --ca https://ca.example:8443 --token-file token")(enroll)
    app.command(epilog="Example: retinue status -o json")(status)
    app.command(epilog="Example: retinue attach shop/api --netns blue --wait 10")(attach)
    app.command(epilog="Example: retinue detach shop/api")(detach)
    app.command(epilog="Example: retinue explain web shop/api tcp/8080")(explain)
    app.command(epilog="Example: retinue ping shop/api 8080 --as web")(ping)
    app.command(epilog="Example: retinue doctor")(doctor)
    app.command(epilog="Example: retinue down")(down)
    svid = typer.Typer(help="Certificates of the workloads on this host.", no_args_is_help=True, rich_markup_mode=None)
    svid.command("fetch", epilog="Example: retinue svid fetch web --dir /run/web/svid")(svid_fetch)
    app.add_typer(svid, name="svid")


# ---- enroll


def read_token(path: str | None) -> str:
    """The token from a file, standard input or RETINUE_TOKEN; never from the command line. Raises BadInput."""
    if path == "-":
        return sys.stdin.read(MAX_TOKEN_FILE).strip()
    if path is not None:
        try:
            with open(path, encoding="ascii", errors="replace") as f:
                return f.read(MAX_TOKEN_FILE).strip()
        except OSError as e:
            raise BadInput("token.file", f"cannot read the token file {path}: {e.strerror}") from None
    token = os.environ.get("RETINUE_TOKEN", "")
    if not token:
        raise BadInput(
            "token.missing", "no join token",
            hint="give --token-file FILE, --token-file - for standard input, or RETINUE_TOKEN; make one with: retinue-ca token create",
        )  # fmt: skip
    return token


def enroll(
    ca: Annotated[str, typer.Option("--ca", metavar="URL", envvar="RETINUE_CA", help="https://HOST:PORT of the CA.")],
    token_file: Annotated[str | None, typer.Option("--token-file", metavar="FILE", help="File with the join token; - is standard input.")] = None,
    state_dir: StateDirOpt = STATE_DIR,
    underlay: Annotated[
        list[str] | None, typer.Option("--underlay", metavar="ADDRESS:PORT", help="ADDRESS:PORT where peers reach this host; may be repeated.")
    ] = None,
    cipher: Annotated[
        list[str] | None, typer.Option("--cipher", metavar="CIPHER", help="chacha20poly1305 or aes-256-gcm; what the tunnel offers, found out by itself without it.")
    ] = None,
    listen_port: Annotated[
        int, typer.Option(metavar="PORT", envvar="RETINUE_LISTEN_PORT", min=1, max=65535, help="Tunnel port of the hint that is found out without --underlay.")
    ] = 51820,
    replace: Annotated[bool, typer.Option("--replace", help="Give up the enrolment that is there.")] = False,
    policy_authority: Annotated[
        str | None, typer.Option("--policy-authority", metavar="FINGERPRINT", help="Fingerprint of the policy authority, from its operators (default: pin the one the CA shows).")
    ] = None,
    device_cert: Annotated[Path | None, typer.Option("--device-cert", metavar="FILE", help="Instead of a token: a device certificate with its issuers, PEM.")] = None,
    device_key: Annotated[Path | None, typer.Option("--device-key", metavar="FILE", help="Its key.")] = None,
    root_fp: Annotated[str | None, typer.Option("--root-fp", metavar="FINGERPRINT", help="The CA's root, with --device-cert; a token names it itself.")] = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Join a trust domain with a one-time token, or with a device certificate. The keys are made here and stay here."""
    import asyncio

    from mesh.device_join import device_pin, load_device

    device = None
    if device_cert is not None:
        if device_key is None or root_fp is None or token_file is not None:
            raise BadInput("enroll.device", "a device certificate goes with --device-key and --root-fp, and with no token")
        device, token = load_device(device_cert, device_key), device_pin(root_fp)
    else:
        token = read_token(token_file)
    from mesh.companion import guess_underlay
    from mesh.devices.offers import offers
    from mesh.enroll import enroll as join

    ciphers = check_ciphers(cipher) if cipher else asyncio.run(offers())
    hints = underlay or guess_underlay(ca, listen_port)
    done = asyncio.run(join(ca, token, state_dir, hints, ciphers, replace=replace, policy_authority=policy_authority, device=device))
    data = {
        "trust_domain": str(done.trust_domain), "endpoint": done.endpoint, "kind": done.kind, "spiffe_id": str(done.spiffe_id),
        "workload": done.workload, "tunnel_key": done.tunnel_public, "svid_expires": done.svid.not_after,
        "state_dir": str(state_dir), "ca": done.ca_url,
    }  # fmt: skip

    def human() -> None:
        print(f"Enrolled as {done.spiffe_id}")
        cliout.note("next: retinue-agent" + ("" if state_dir == STATE_DIR else f" --state-dir {state_dir}"))

    cliout.emit(data, _format(output, as_json), human=human)


def check_ciphers(given: list[str] | None) -> list[Cipher]:
    """Known ciphers, in the order of preference. Raises BadInput."""
    known: list[Cipher] = ["aes-256-gcm", "chacha20poly1305"]
    for one in given or []:
        if one not in known:
            raise BadInput("usage", f"not a cipher: {ascii(one)[:40]}", hint="use chacha20poly1305 or aes-256-gcm")
    # Every WireGuard has ChaCha; a record without it would promise what a stock peer cannot do.
    return [c for c in known if c in (given or []) or c == "chacha20poly1305"]


if TYPE_CHECKING:
    from identity.wire.enroll import Cipher


# ---- status


def status(
    run_dir: RunDir = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 unless ready and without errors.")] = False,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """What this host holds: instances with their epochs, tunnels, policy, freshness, and what is wrong."""
    found = ask(run_dir, lambda agent: agent.status())
    cliout.emit(found, _format(output, as_json), human=lambda: show_status(found, time.time()))
    if check and (not found.ready or any(c.severity == "error" for c in found.conditions)):
        raise typer.Exit(1)


def show_status(s: Status, now: float) -> None:
    """The status for people; `now` in seconds since the epoch."""
    rows = [
        ("identity", f"{s.spiffe_id} ({s.kind}), certificate for {duration(s.svid_expires - now)}"),
        ("control", f"{s.control}, heartbeat {age(s.staleness_s)}"),
        ("state", f"revision {s.revision} of timeline {s.timeline}" if s.revision is not None else "nothing received yet"),
        ("policy", f"revision {s.policy_revision}, digest {(s.policy_digest or '')[:12]}" if s.policy_digest else "none: nothing is permitted"),
        *([("signers", s.policy_signers)] if s.policy_signers else []),
        *([("trial", s.policy_trial)] if s.policy_trial else []),
        ("device", f"{s.device}, {s.interface}, {s.firewall_elements} firewall elements"),
        ("ready", "yes" if s.ready else "no"),
    ]  # fmt: skip
    for label, text in rows:
        print(f"{label:<9} {cliout.clean(text)}")
    if s.conditions:
        print()
        cliout.table(("condition", "severity", "text"), [(c.code, c.severity, c.text) for c in s.conditions])
    print()
    if s.attachments:
        cliout.table(
            ("instance", "state", "epoch", "place", "addresses"),
            [(f"{a.name}/{a.instance}", a.state, a.epoch, _place(a), " ".join(a.addresses)) for a in s.attachments],
        )
    else:
        print("No instance is attached here.")
    print()
    if s.peers:
        cliout.table(
            ("peer", "underlay", "handshake", "received", "sent", "allowed"),
            [
                (
                    p.endpoint, p.underlay, age(now - p.latest_handshake) if p.latest_handshake else "never",
                    size(p.rx_bytes), size(p.tx_bytes), " ".join(p.allowed_ips) or "(warm)",
                )
                for p in s.peers
            ],
        )  # fmt: skip
    else:
        print("No tunnels: policy permits no pair with another host.")


def _place(a: Attachment) -> str:
    """Where an instance has its place on this host, in a word or two."""
    if a.cgroup:
        return a.cgroup if a.running else f"{a.cgroup} (not running)"
    return a.netns or a.device or a.kind


def duration(seconds: float) -> str:
    """``1 h 5 min``, ``40 s``; ``expired`` when negative."""
    if seconds < 0:
        return "expired"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def age(seconds: float | None) -> str:
    """``3 s ago``; ``never``."""
    return "never" if seconds is None else f"{duration(max(0.0, seconds))} ago"


def size(count: int) -> str:
    """Bytes for people: ``1.2 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


# ---- attach, detach


def attach(
    name: Name,
    instance: Instance = 0,
    netns: Annotated[str | None, typer.Option("--netns", metavar="NAME", help="A network namespace: its name or path.")] = None,
    pid: Annotated[int | None, typer.Option("--pid", metavar="PID", min=1, help="The network namespace of this process.")] = None,
    host: Annotated[bool, typer.Option("--host", help="This host's own network namespace.")] = False,
    tap: Annotated[str | None, typer.Option("--tap", metavar="DEVICE", help="The host's side of a link to a guest, such as a VM's tap.")] = None,
    unit: Annotated[str | None, typer.Option("--unit", metavar="NAME", help="A systemd unit in the host's own network namespace.")] = None,
    cgroup: Annotated[str | None, typer.Option("--cgroup", metavar="PATH", help="A control group, from the root of the unified hierarchy.")] = None,
    uid: Annotated[int | None, typer.Option("--uid", metavar="UID", min=0, help="With --unit or --cgroup: processes of this user use its addresses without binding them.")] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, help="Seconds to wait until it is active.")] = 0.0,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Give an instance its place on this host. It gets its addresses once the CA has placed it here."""
    from identity.wire.local import Attach

    if sum((netns is not None, pid is not None, host, tap is not None, unit is not None, cgroup is not None)) != 1:
        raise BadInput("usage", "give one of --netns, --pid, --tap, --unit, --cgroup and --host")
    if uid is not None and unit is None and cgroup is None:
        raise BadInput("usage", "--uid goes with --unit or --cgroup", hint="the kernel cannot tell whose user a receiving socket is; its control group it can")
    if unit is not None or cgroup is not None:
        from mesh.units import group_of_unit

        request = Attach(name=name, instance=instance, kind="unit", cgroup=cgroup or group_of_unit(unit or ""), uid=uid)
    else:
        place = f"/proc/{pid}/ns/net" if pid is not None else netns
        request = Attach(name=name, instance=instance, kind="host" if host else "tap" if tap is not None else "netns", netns=place, device=tap)

    async def body(agent: LocalClient) -> Attachment:
        return await wait_active(agent, request, wait)

    found = ask(run_dir, body)
    where = " ".join(found.addresses) or "no addresses yet"

    def human() -> None:
        print(f"{name}/{instance} is {found.state} here: {where}")
        for address, gateway, overlay in zip(found.addresses, found.gateways, found.overlay, strict=False):
            six = " -6" if ":" in address else ""
            cliout.note(f"in the guest: ip addr add {address}/{128 if six else 32} dev DEV; ip link set DEV up mtu {found.mtu};"
                        f" ip{six} route add {overlay} via {gateway} dev DEV onlink")  # fmt: skip

    cliout.emit(found, _format(output, as_json), human=human)


async def wait_active(agent: LocalClient, request: Attach, seconds: float) -> Attachment:
    """Attach, then wait until active. Raises TimedOut ``attach.timeout`` with the reason, when there is something to wait."""
    import asyncio

    from identity.errors import TimedOut

    found = (await agent.attach(request)).attachment
    assert found is not None
    if found.state == "active" or not seconds:
        return found
    try:
        async with asyncio.timeout(seconds):
            async for _ in agent.watch():
                for one in (await agent.status()).attachments:
                    if (one.name, one.instance) == (request.name, request.instance):
                        found = one
                if found.state == "active":
                    break
    except TimeoutError:
        raise TimedOut(
            "attach.timeout", f"{request.name}/{request.instance} is still {found.state} after {seconds:g} s",
            hint="is it placed on this host? See: retinue-ca workload list",
        ) from None  # fmt: skip
    return found


if TYPE_CHECKING:
    from identity.wire.local import Attach


def detach(
    name: Name,
    instance: Instance = 0,
    if_attached: Annotated[bool, typer.Option("--if-attached", help="Exit 0 also when it is not attached here.")] = False,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Take an instance's place on this host away. Exit 1 when it is not attached here."""
    from identity.wire.local import InstanceRef

    was = True
    try:
        ask(run_dir, lambda agent: agent.detach(InstanceRef(name=name, instance=instance)))
    except NotFound as e:
        if not if_attached or e.code != "attach.unknown":
            raise
        was = False
    data = {"name": name, "instance": instance, "attached": False, "changed": was}
    cliout.emit(data, _format(output, as_json), human=lambda: print(f"{name}/{instance} {'is detached' if was else 'was not attached'}"))


# ---- explain


def parse_flow(text: str) -> tuple[str, int | None]:
    """(protocol, port) of ``8080``, ``tcp/8080``, ``udp/53``, ``icmp``. Raises BadInput."""
    from policy.ports import PORTED, mask, proto_name, proto_number

    word = text.strip().lower()
    if word.isascii() and word.isdigit():
        word = f"tcp/{word}"
    if word[:1].isdigit() and "/" not in word:
        raise BadInput("port.form", f"not a port: {ascii(text)[:40]}", hint="write 8080, tcp/8080, udp/53 or icmp")
    proto, slash, port = word.partition("/")
    number = proto_number(proto)
    if not slash:
        return proto_name(number), None
    if number not in PORTED:
        raise BadInput("port.form", f"{proto} has no ports")
    if not (port.isascii() and port.isdigit()) or len(port) > 6:
        raise BadInput("port.form", f"not a port: {ascii(port)[:40]}", hint="write 8080, tcp/8080, udp/53 or icmp")
    mask(int(port), int(port))
    return proto_name(number), int(port)


def explain(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The workload that asks; or the word identity.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked, or whose identity it is.")],
    flow: Annotated[str, typer.Argument(metavar="PORT", help="8080, tcp/8080, udp/53 or icmp.")] = "",
    instance: Annotated[int, typer.Option("--instance", metavar="N", min=0, help="identity: which instance.")] = 0,
    pid: Annotated[int | None, typer.Option("--pid", metavar="PID", min=1, help="identity: is it given to this process?")] = None,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Why SRC may, or may not, reach DST: the rule, the near misses, the smallest change. Exit 1 when denied.

    retinue explain identity NAME: why this host, or a process of it, has that identity or has not; since when, until when.
    """
    if src == "identity" and not flow:
        _explain_identity(run_dir, dst, instance, pid, _format(output, as_json))
        return
    if not flow:
        raise BadInput("usage", "explain needs a port", hint="retinue explain web shop/api tcp/8080, or: retinue explain identity shop/api")
    proto, port = parse_flow(flow)
    found = ask(run_dir, lambda agent: agent.explain(src, dst, proto, port))
    cliout.emit(found, _format(output, as_json), human=lambda: show_explanation(found))
    if found.verdict == "deny":
        raise typer.Exit(1)


def _explain_identity(run_dir: Path | None, name: str, instance: int, pid: int | None, output: Output) -> None:
    from mesh.explain_identity import lines

    found = ask(run_dir, lambda agent: agent.explain_identity(name, instance, pid))
    cliout.emit(found, output, human=lambda: print("\n".join(map(cliout.clean, lines(found)))))
    if not found.holds:
        raise typer.Exit(1)


def show_explanation(e: ExplainReply) -> None:
    """An explanation for people."""
    flow = e.proto if e.port is None else f"{e.proto}/{e.port}"
    mark = "ALLOWED" if e.verdict == "allow" else "DENIED"
    print(cliout.clean(f"{mark}  {e.src} -> {e.dst} {flow}"))
    none = "an audit: no rule permits it" if e.audited else "default deny: no rule permits it"
    rule = f"rule {e.rule}" + (f" ({e.where})" if e.where else "") if e.rule else none
    print(cliout.clean(f"  by       {rule}"))
    if e.audited:
        print(cliout.clean(f"  audit    will be denied by {e.would_deny} when the audit ends"))
    print(cliout.clean(f"  because  {e.reason}"))
    for one in e.conditions:
        print(cliout.clean(f"  limit    {one}"))
    for miss in e.near_misses:
        print(cliout.clean(f"  nearly   {miss}"))
    if e.smallest_change:
        denies = e.verdict == "allow" and not e.audited
        print(cliout.clean(f"  {'to deny ' if denies else 'to allow'} {e.smallest_change}"))
    print(cliout.clean(f"  policy   {e.digest[:12]}"))


# ---- ping


def ping(
    name: Name,
    port: Annotated[int, typer.Argument(metavar="PORT", min=1, max=65535, help="TCP port to connect to.")],
    source: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Which instance here asks [the only one].")] = None,
    count: Annotated[int, typer.Option("-c", "--count", metavar="N", min=1, max=1000, help="How often, to each address.")] = 3,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.01, max=60, help="How long to wait for each answer.")] = 2.0,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Connect to a workload by TCP from an instance attached here, over IPv4 and IPv6, and say how long it took."""
    from mesh.ping import ping_workload

    found = ask(run_dir, lambda agent: ping_workload(agent, name, port, source, count, timeout))
    columns = ("address", "sent", "answered", "min ms", "median ms", "max ms", "error")
    rows = [(r.address, r.sent, r.answered, r.minimum, r.median, r.maximum, r.error) for r in found.results]
    cliout.emit(found.as_dict(), _format(output, as_json), columns=columns, rows=rows)
    if found.reason:
        cliout.note(found.reason)
    if not any(r.answered for r in found.results):
        raise typer.Exit(1)


# ---- svid


def svid_fetch(
    name: Name,
    instance: Instance = 0,
    directory: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Write cert.pem, key.pem and bundle.pem here.")] = None,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """The certificate of an instance that is active here. The key is written to --dir only, never printed."""
    from identity.wire.local import InstanceRef
    from mesh import svid_files

    files = ask(run_dir, lambda agent: agent.svid(InstanceRef(name=name, instance=instance)))
    if directory is not None:
        svid_files.write(directory, files)
    data = {"spiffe_id": files.spiffe_id, "expires": files.expires, "dir": str(directory) if directory else None}

    def human() -> None:
        print(f"{files.spiffe_id}, for {duration(files.expires - time.time())}")
        if directory is None:
            print(files.certificate, end="")
        else:
            print(f"cert.pem, key.pem and bundle.pem are in {directory}")

    cliout.emit(data if directory else data | {"certificate": files.certificate}, _format(output, as_json), human=human)


# ---- doctor, down


def doctor(
    run_dir: RunDir = None, state_dir: StateDirOpt = STATE_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Look for what keeps the mesh from working on this machine. Exit 1 when something fails."""
    import asyncio

    from mesh.doctor import examine
    from mesh.local_client import socket_path

    checks = asyncio.run(examine(state_dir, socket_path(run_dir)))
    rows = [({"ok": "ok", "warn": "!!", "fail": "XX"}[c.result], c.name, c.text + (f" -> {c.hint}" if c.hint else "")) for c in checks]
    data = [{"check": c.name, "result": c.result, "text": c.text, "hint": c.hint} for c in checks]
    cliout.emit(data, _format(output, as_json), columns=("", "check", "finding"), rows=rows)
    if any(c.result == "fail" for c in checks):
        raise typer.Exit(1)


def down(
    run_dir: RunDir = None,
    state_dir: StateDirOpt = STATE_DIR,
    interface: Annotated[str, typer.Option(metavar="NAME", envvar="RETINUE_INTERFACE", help="The tunnel device, when no agent runs.")] = "rtn0",
    keep_traffic: Annotated[bool, typer.Option("--keep-traffic", help="End the agent only; tunnels and rules stay.")] = False,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:  # fmt: skip
    """End the agent and take its tunnels, routes and firewall table away. The enrolment stays."""
    import asyncio

    from mesh.down import take_down
    from mesh.local_client import socket_path

    how = asyncio.run(take_down(socket_path(run_dir), state_dir, interface, clean=not keep_traffic))
    cliout.emit({"down": True, "how": how}, _format(output, as_json), human=lambda: print(how))


def only_attachment(found: Status, source: str | None) -> Attachment:
    """The active instance to speak as. Raises NotFound, BadInput, Refused."""
    active = [a for a in found.attachments if a.state == "active"]
    if source is not None:
        chosen = [a for a in found.attachments if source in {a.name, f"{a.name}/{a.instance}"}]
        if not chosen:
            raise NotFound("attach.unknown", f"{source} is not attached here", hint="see: retinue status")
        if chosen[0].state != "active":
            raise Refused("attach.inactive", f"{source} is {chosen[0].state} here")
        return chosen[0]
    if len(active) != 1:
        raise BadInput("usage", f"{len(active)} active instances are attached here", hint="name one with --as")
    return active[0]
