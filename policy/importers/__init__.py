"""Importers: foreign firewall configurations to a Program and an inventory, keeping the source's truth table.

Each importer is a pure function of the configuration's files. What the source system itself rejects is refused here too;
what cannot be carried over is listed, and left out in the direction of less access.
"""

from __future__ import annotations

from typing import Final

from identity.errors import BadInput
from policy.importers.model import Files, Imported

KINDS: Final = ("tailscale", "kubernetes", "nsx", "aws", "iptables", "nftables", "cisco-ios")


def run(kind: str, files: Files) -> Imported:
    """Import `files` (relative name -> text). Raises BadInput for an unknown kind, SourceRefused for a bad source."""
    match kind:
        case "tailscale":
            from policy.importers.tailscale import import_tailscale

            return import_tailscale(files)
        case "kubernetes":
            from policy.importers.kubernetes import import_kubernetes

            return import_kubernetes(files)
        case "nsx":
            from policy.importers.nsx import import_nsx

            return import_nsx(files)
        case "aws":
            from policy.importers.aws import import_aws

            return import_aws(files)
        case "iptables":
            from policy.importers.netfilter.iptables import import_iptables

            return import_iptables(files)
        case "nftables":
            from policy.importers.netfilter.nft import import_nft

            return import_nft(files)
        case "cisco-ios":
            from policy.importers.cisco import import_cisco

            return import_cisco(files)
    raise BadInput("import.kind", f"cannot import {ascii(kind)[:40]}", hint=f"one of {', '.join(KINDS)}")
