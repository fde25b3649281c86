"""The demo told to a person: the same events as `--json`, in sentences. A denial is told as loudly as a success."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from identity.cliout import clean

ROMAN: Final = ("", "I", "II", "III", "IV", "V", "VI")
OPENING: Final = (
    "Three machines on one network, a small certificate authority, and three workloads: [b]web[/], [b]api[/] and [b]batch[/].\n"
    "Everything below happens now, on real packets; every figure was just measured."
)
ACT_INTRO: Final = {
    1: "Nobody is trusted for where they are. Each host proves itself once, with a token that works once.",
    2: "The policy has one sentence about this: [b]web[/] may ask [b]api[/]. It names identities, no address.",
    3: "We sit on the switch between the machines and read every frame that passes.",
    4: "[b]web[/] sends 100 requests a second. Meanwhile [b]api[/] changes machines. Nobody edits a rule.",
    5: "Permissions grow by a rule and shrink by a revocation. Both reach connections that are already open.",
}


class Story:
    """Prints to the terminal with rich. `tell` never fails on an event it does not know."""

    def __init__(self, console: Any = None) -> None:
        if console is None:
            from rich.console import Console

            console = Console(highlight=False)
        self.console = console
        self.seen: dict[str, dict[str, Any]] = {}

    def tell(self, event: str, data: dict[str, Any]) -> None:
        """One event."""
        teller: Callable[[dict[str, Any]], None] | None = getattr(self, f"_on_{event}", None)
        if teller is not None:
            teller(data)
        elif data.get("ok") is False:
            self._bad(f"{event}: {data}")
        self.seen[event] = data

    # ---- lines

    def _say(self, text: str, *, mark: str = "") -> None:
        """One paragraph; continued lines keep its indent, under the mark when there is one."""
        from rich.padding import Padding
        from rich.table import Table

        if not mark:
            self.console.print(Padding(text, (0, 0, 0, 2), expand=False))
            return
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column()
        line.add_row(mark, text)
        self.console.print(Padding(line, (0, 0, 0, 2), expand=False))

    def _good(self, text: str) -> None:
        self._say(text, mark="[bold green]✔[/]")

    def _bad(self, text: str) -> None:
        self._say(text, mark="[bold white on red] ✘ NOT AS PROMISED [/]")

    def _claim(self, data: dict[str, Any], text: str) -> None:
        (self._good if data.get("ok", True) else self._bad)(text)

    # ---- stage

    def _on_swept(self, data: dict[str, Any]) -> None:
        if data["labs"]:
            self._say(f"[dim]Cleared away what {_count(len(data['labs']), 'interrupted run')} had left behind.[/]")

    def _on_lab(self, data: dict[str, Any]) -> None:
        from rich.panel import Panel

        self.console.print(Panel(OPENING, title="[b]Retinue[/]: the guard that goes where its principal goes", border_style="cyan"))
        self._say(f"[dim]The stage: {', '.join(data['hosts'])}, a CA and a switch in network namespaces, up in {data['ms']:.0f} ms.[/]")

    def _on_act(self, data: dict[str, Any]) -> None:
        from rich.rule import Rule

        self.console.print()
        self.console.print(Rule(f"[b]Act {ROMAN[data['number']]}[/]  {data['title']}", align="left", style="cyan"))
        self._say(f"[italic]{ACT_INTRO.get(data['number'], '')}[/]")
        self.console.print()

    # ---- I

    def _on_ca(self, data: dict[str, Any]) -> None:
        self._say(f"The CA of [b]{data['trust_domain']}[/] is up. Join tokens pin its root, [dim]{data['root_fingerprint'][:16]}…[/]")

    def _on_enrolled(self, data: dict[str, Any]) -> None:
        self._good(f"[b]{data['host']}[/] joined as [cyan]{data['spiffe_id']}[/], tunnel key [dim]{data['tunnel_key'][:12]}…[/] {_ms(data['ms'])}")
        if "enrolled" not in self.seen:
            self._say(f"  [dim]tunnels by {clean(data['device'])}[/]")

    def _on_identity(self, data: dict[str, Any]) -> None:
        self._good(f"[b]{data['workload']}[/] lives on {data['host']}: [cyan]{data['spiffe_id']}[/]  [dim]{'  '.join(data['addresses'])}[/]")

    def _on_policy(self, data: dict[str, Any]) -> None:
        self._good(f"Policy revision {data['revision']}: {_count(data['rules'], 'rule')}, signed, digest [dim]{data['digest'][:12]}…[/], enforced by every host")

    # ---- II

    def _on_request(self, data: dict[str, Any]) -> None:
        if data["ok"]:
            self._say(
                f"[b]{data['src']} → {data['dst']}[/] over {_family(data)}: {data['status']}, “{clean(data['says'])}”,"
                f" from {data['served_by']}, {_ms(data['ms'])}",
                mark="[bold white on green] ALLOWED [/]",
            )
        else:
            self._bad(f"{data['src']} → {data['dst']} over {_family(data)}: {data['error'] or data['status']}")

    def _on_denied(self, data: dict[str, Any]) -> None:
        place = " [i]on the very same host[/]" if data["same_host"] else ""
        text = f"[b]{data['src']} → {data['dst']}[/]{place} over {_family(data)}"
        if data["ok"]:
            said = f"{text}: {_errno(data['error'])} after {_ms(data['ms'])}, no silent time-out"
            self._say(said, mark="[bold white on red] DENIED  [/]")
        else:
            self._bad(f"{text} should be refused at once, and was not: {data['error'] or data['status']} after {_ms(data['ms'])}")

    def _on_explained(self, data: dict[str, Any]) -> None:
        from rich.panel import Panel

        change = f"\n[b]What would change it[/]  {clean(data['smallest_change'])}" if data["smallest_change"] else ""
        self.console.print(Panel(
            f"[b]Why[/]  {clean(data['reason'])}{change}",
            title=f"retinue explain {data['src']} {data['dst']} {data['port']}", border_style="red", padding=(0, 1),
        ))  # fmt: skip

    # ---- III

    def _on_control(self, data: dict[str, Any]) -> None:
        self._claim(data, f"A control first: [b]{data['marker'][:14]}…[/] sent in clear is read in {_count(data['marker_frames'], 'frame')}. The reader works.")

    def _on_capture(self, data: dict[str, Any]) -> None:
        readable = data["readable"]
        self._claim(
            data,
            f"Then web and api exchange it {data['answered_with_marker']} times: {data['tunnel_frames']} tunnel frames,"
            f" {data['tunnel_bytes']:,} bytes.\nReadable on the way: the marker in [b]{readable['marker']}[/], api's overlay address in"
            f" [b]{readable['address']}[/], its name in [b]{readable['name']}[/] of {data['frames']} frames.",
        )

    # ---- IV

    def _on_prepared_place(self, data: dict[str, Any]) -> None:
        self._say(f"[dim]A second api stands ready on {data['host']}. Without a placement it has no address and no voice.[/]")

    def _on_moved(self, data: dict[str, Any]) -> None:
        steps = "  ".join(f"{n} {data[n + '_ms']:.0f} ms" for n in ("prepared", "committed", "released") if data[n + "_ms"] is not None)
        self._say(f"[b]retinue-ca workload move api --to {data['to']}[/]   [dim]{steps}, epoch {data['epoch']}[/]")
        served = ", ".join(f"{n} by {who}" for who, n in data["served_by"].items())
        self._claim(
            data,
            f"{data['sent']} requests: {served}; [b]{data['lost']} lost[/], {data['retried']} retried within a second,"
            f" longest gap [b]{data['gap_ms']:.0f} ms[/]",
        )
        self._claim({"ok": data["address_kept"] and data["policy_digest_kept"]}, "Same identity, same addresses, same policy digest. Zero edits.")

    def _on_old_holder(self, data: dict[str, Any]) -> None:
        self._claim(
            data,
            f"{data['host']} went on talking as api: [b]{data['accepted_before']}[/] messages were accepted before the move,"
            f" [b]{data['accepted_after']}[/] of {data['attempts_after']} after it",
        )

    # ---- V

    def _on_policy_diff(self, data: dict[str, Any]) -> None:
        self._say("[b]retinue-ca policy apply shop.yaml --dry-run[/]")
        self._say(f"[green]+ {clean(data['added']).removeprefix('- ')}[/]")
        for pair in data["gained"]:
            self._say(f"[green]+ {pair['src']} → {pair['dst']}  {clean(pair['ports'])}[/]   [dim](and no other pair changes)[/]")
        for pair in data["lost"]:
            self._say(f"[red]- {pair['src']} → {pair['dst']}  {clean(pair['ports'])}[/]")
        self._claim(data, "Exactly the one pair that was meant. Now in earnest.")

    def _on_revoked(self, data: dict[str, Any]) -> None:
        self._say("[b]retinue-ca workload revoke batch[/]   [dim]while batch and web each read an open stream from api[/]")
        self._claim(
            data,
            f"batch's open connection got its last byte [b]{data['cut_ms']:.0f} ms[/] after the order; web's went on,"
            f" at most {data['bystander_gap_ms']:.0f} ms between two of its bytes",
        )

    def _on_after_revoke(self, data: dict[str, Any]) -> None:
        self._claim(data, f"A new attempt of batch: [b]{_errno(data['error'])}[/] after {_ms(data['ms'])}")

    # ---- end

    def _on_failed(self, data: dict[str, Any]) -> None:
        error = data["error"]
        self._bad(f"[{clean(error['code'])}] {clean(error['message'])}")
        if error.get("hint"):
            self._say(f"[dim]{clean(error['hint'])}[/]")

    def _on_not_held(self, data: dict[str, Any]) -> None:
        self._bad(f"these claims did not hold: {', '.join(data['claims'])}")

    def _on_leftovers(self, data: dict[str, Any]) -> None:
        self._bad(f"left on the machine: {', '.join(map(clean, data['left']))}")

    def _on_kept(self, data: dict[str, Any]) -> None:
        prefix = f"rtnlab-{data['id']}"
        self.console.print()
        self._say(f"The lab stays up ({data['dir']}). Look around:")
        here = f"sudo RETINUE_RUN_DIR={data['dir']}/nodes/host-a/run nsenter --net=/run/netns/{prefix}-host-a"
        for line in (
            f"{here} retinue status",
            f"{here} retinue ping api 8080 --as web",
            f"{here} retinue explain web api 8080",
            f"sudo retinue-ca workload list --dir {data['dir']}/nodes/ca/state",
            "sudo retinue demo --clean      # takes it down",
        ):
            self.console.print(f"    [cyan]{line}[/]", soft_wrap=True)  # whole lines, to be copied

    def _on_summary(self, data: dict[str, Any]) -> None:
        from rich.table import Table

        table = Table(title="Measured just now", title_justify="left", header_style="bold")
        for column in ("claim", "measured", "aim"):
            table.add_column(column)
        move = data["move"] or {}
        for claim, measured, aim in (
            ("a forbidden request is answered with a refusal", _unit(data["denied_ms"], "ms"), "< 100 ms"),
            ("the marker on the underlay (control: in clear)", f"{_plain(data['marker_on_underlay'])} ({_plain(data['marker_in_control'])})", "0 (> 0)"),
            ("requests lost while api moved", f"{_plain(move.get('lost'))} of {_plain(move.get('sent'))}", "0"),
            ("longest gap between answers meanwhile", _unit(move.get("gap_ms"), "ms"), "≤ 200 ms"),
            ("a revocation cuts an open connection after", _unit(data["revoke_cut_ms"], "ms"), "≤ 1000 ms"),
            ("things left on this machine", _plain(data["leftovers"]), "kept on purpose" if "kept" in self.seen else "0"),
            ("the whole story", _unit(data["duration_s"], "s"), "≤ 20 s"),
        ):
            table.add_row(claim, measured, aim)
        self.console.print()
        self.console.print(table)
        if data["ok"]:
            self.console.print("[bold green]Every claim held.[/]")
        else:
            self.console.print("[bold red]Not every claim held.[/] The lines marked NOT AS PROMISED say which.")
        if "kept" not in self.seen:
            self.console.print(
                "\nTry next:  [cyan]sudo retinue demo --keep[/]  to look around in it,  [cyan]--pace 2[/]  to read along,"
                "  [cyan]--json[/]  for programs;\n           [cyan]examples/shop[/]  a policy with its tests,"
                "  [cyan]examples/sidecar[/]  [cyan]examples/gateway[/]  to run yourself."
            )


def _family(data: dict[str, Any]) -> str:
    return {"ipv4": "IPv4", "ipv6": "IPv6"}.get(data["family"], "?")


def _errno(name: str | None) -> str:
    """The words of an errno: ``connection refused``."""
    import errno
    import os

    number = getattr(errno, name or "", None)
    return os.strerror(number).lower() if isinstance(number, int) else str(name)


def _ms(value: float) -> str:
    return f"[b]{value:.1f} ms[/]" if value < 1000 else f"[b]{value / 1000:.1f} s[/]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _plain(value: Any) -> str:
    return "not measured" if value is None else str(value)


def _unit(value: Any, unit: str) -> str:
    return "not measured" if value is None else f"{value} {unit}"
