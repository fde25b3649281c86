"""A sidecar beside a plain HTTP server, in a lab of network namespaces. Run as root: sudo python3 examples/sidecar/run.py

The ledger's machine has no agent. The service and `retinue-sidecar` share one network namespace; the sidecar brings a
tunnel key, an identity and the firewall. The service is not changed and not told.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mesh.lab import Lab
from mesh.lab_process import command, run

HERE = Path(__file__).parent
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode(), end='')"


def get(netns: str, url: str) -> subprocess.CompletedProcess[str]:
    """The service's page, read from inside a namespace."""
    return run([sys.executable, "-c", GET, url], netns=netns, codes=(0, 1))


def main() -> int:
    with Lab(["office", "pod"], trust_domain="books.example") as lab:
        lab.bring_up(["office"])  # the CA, and a host with an agent; "pod" stays without one

        print("$ retinue-ca workload add desk --host office --label role=desk     (guest and ledger likewise)")
        for name, *place in (("desk", "--host", "office"), ("guest", "--host", "office"), ("ledger",)):
            made = lab.ca("workload", "add", name, *place, "--label", f"role={name}")
        addresses = made["addresses"]
        desk, guest = (lab.add_workload(name) for name in ("desk", "guest"))
        for name, netns in (("desk", desk), ("guest", guest)):
            lab.retinue("office", "attach", name, "--netns", netns, "--wait", "15")

        pod = lab.nodes["pod"]
        lab.spawn([sys.executable, str(HERE / "service.py"), "8000"], name="service", netns=pod.netns).wait_ready()

        print("$ retinue-ca token create --sidecar ledger --out token")
        token = pod.dir / "token"
        lab.ca("token", "create", "--sidecar", "ledger", "--out", str(token))
        print("$ retinue-sidecar --ca https://... --token-file token --svid-dir svid")
        svid = pod.dir / "svid"
        lab.spawn(
            [*command("retinue-sidecar"), "--ca", lab.ca_url, "--token-file", str(token), "--svid-dir", str(svid),
             "--state-dir", str(pod.state_dir), "--run-dir", str(pod.run_dir), "--underlay", ",".join(pod.underlay)],
            name="sidecar", netns=pod.netns,
        ).wait_ready(30)  # fmt: skip
        print("$ retinue-ca policy apply policy.yaml")
        lab.ca("policy", "apply", str(HERE / "policy.yaml"))

        ok = True
        for address in addresses:
            url = f"http://{f'[{address}]' if ':' in address else address}:8000/"
            for _ in range(50):  # the policy is on its way to both ends
                said = get(desk, url)
                if said.returncode == 0:
                    break
            denied = get(guest, url)
            print(f"desk  -> {url}  {said.stdout.strip() or said.stderr.strip().splitlines()[-1]}")
            print(f"guest -> {url}  {'NOT DENIED' if denied.returncode == 0 else denied.stderr.strip().splitlines()[-1]}")
            ok &= said.returncode == 0 and denied.returncode == 1

        ready = run([sys.executable, "-c", GET, "http://127.0.0.1:15020/readyz"], netns=pod.netns, codes=(0, 1))
        files = sorted(p.name for p in svid.iterdir())
        print(f"sidecar readyz: {'ok' if ready.returncode == 0 else 'NOT READY'}; certificate files kept fresh for the service: {' '.join(files)}")
        ok &= ready.returncode == 0 and {"cert.pem", "key.pem", "bundle.pem"} <= set(files)
    print("as promised" if ok else "NOT as promised")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
