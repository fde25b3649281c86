"""The agent's local API: `retinue`, sidecars and the gateway <-> agent over a unix socket (root, 0600).

    GET  /v1/status                  -> Status
    POST /v1/attach    Attach        -> AttachReply
    POST /v1/detach    InstanceRef   -> AttachReply
    GET  /v1/explain?src=&dst=&proto=&port=  -> identity.wire.admin.ExplainReply
    GET  /v1/snapshot                -> SnapshotReply   (envelopes; the reader verifies them again)
    GET  /v1/watch                   -> newline-delimited SnapshotReply, one at every applied change
    POST /v1/svid      InstanceRef   -> SvidFiles       (key material for the service of a sidecar or attachment)
    POST /v1/down      Down          -> {}            (the agent ends; with clean, its data plane too)
    POST /v1/sidecar-token  identity.wire.enroll.SidecarTokenRequest -> SidecarTokenReply
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from identity.grown import Grown
from identity.wire import Message


class InstanceRef(Message):
    name: str = Field(max_length=255)
    instance: int = Field(default=0, ge=0)


class Attach(Message, Grown):
    """Give an instance a place on this host.

    kind netns: `netns` is a named network namespace (``ip netns``) or an absolute path such as /proc/PID/ns/net;
    kind host: the instance is this network namespace itself;
    kind tap: `device` is the host's side of a link to a guest, such as a VM's tap;
    kind unit: the processes of a control group in this network namespace; `cgroup` is its path from the root of the
    unified hierarchy, `uid` the user among them whose connections choose the instance's addresses by themselves.
    """

    later: ClassVar[frozenset[str]] = frozenset({"device", "cgroup", "uid"})

    name: str = Field(max_length=255)
    instance: int = Field(default=0, ge=0)
    kind: Literal["netns", "host", "tap", "unit"] = "netns"
    netns: str | None = Field(default=None, max_length=4096)
    device: str | None = Field(default=None, max_length=15)
    cgroup: str | None = Field(default=None, max_length=4096)
    uid: int | None = Field(default=None, ge=0, lt=0xFFFF_FFFF)


class Attachment(Message, Grown):
    later: ClassVar[frozenset[str]] = frozenset({"device", "gateways", "overlay", "mtu", "cgroup", "uid", "running"})

    name: str
    instance: int
    kind: Literal["netns", "host", "tap", "unit"]
    netns: str | None
    state: Literal["waiting", "prepared", "active", "fenced"]
    epoch: int | None
    addresses: list[str]
    device: str | None = None
    gateways: list[str] = []  # kind tap: what the guest routes `overlay` to
    overlay: list[str] = []
    mtu: int | None = None
    cgroup: str | None = None
    uid: int | None = None
    running: bool = True  # kind unit: is the control group there?


class Down(Message):
    clean: bool = True


class AttachReply(Message):
    attachment: Attachment | None


class PeerStatus(Message):
    endpoint: str
    tunnel_key: str
    underlay: str | None
    allowed_ips: list[str]
    cipher: str
    latest_handshake: int | None
    rx_bytes: int
    tx_bytes: int


class Condition(Message):
    """One coded health condition."""

    code: str
    severity: Literal["info", "warning", "error"]
    text: str


class Status(Message, Grown):
    later: ClassVar[frozenset[str]] = frozenset({"policy_signers", "policy_trial"})

    version: str
    trust_domain: str
    endpoint: str
    kind: Literal["host", "sidecar"]
    spiffe_id: str
    device: str  # "userspace (retinue-engine)", "kernel"
    interface: str
    control: Literal["connected", "disconnected"]
    timeline: str | None
    revision: int | None
    policy_revision: int | None
    policy_digest: str | None
    policy_signers: str = ""  # whose signatures a policy needs here
    policy_trial: str = ""  # a policy that is being rolled out, and for whom
    staleness_s: float | None  # since the newest heartbeat
    svid_expires: int
    attachments: list[Attachment]
    peers: list[PeerStatus]
    firewall_elements: int
    conditions: list[Condition]
    ready: bool


class SnapshotReply(Message):
    timeline: str | None
    revision: int | None
    trust_domain: str
    objects: dict[str, str]


class SvidFiles(Message):
    """PEM texts; the key is the workload's and is made on this host."""

    spiffe_id: str
    certificate: str
    key: str
    bundle: str
    expires: int
