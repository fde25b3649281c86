#!/usr/bin/env bash
# Everything `make demo` and `make test` need, from a bare Debian 12 with root, Python 3.11+ and cargo.
# Idempotent: each step leaves a stamp keyed by its inputs, so a second run takes well under a second.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
STAMPS=.venv/stamps
MIN_RUST=1.87

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
die() { printf 'error[setup.%s]: %s\nhint: %s\n' "$1" "$2" "$3" >&2; exit "${4:-1}"; }
fresh() { [ -f "$STAMPS/$1" ] && [ "$(cat "$STAMPS/$1")" = "$2" ]; }
stamp() { mkdir -p "$STAMPS" && printf '%s' "$2" >"$STAMPS/$1"; }

# program:package, what the product runs with and what its tests compare with
RUNTIME="nft:nftables ip:iproute2 sysctl:procps cc:gcc make:make cmake:cmake openssl:openssl"
TESTING="wg:wireguard-tools wireguard-go:wireguard-go iperf3:iperf3 ping:iputils-ping strace:strace spin:spin faketime:faketime softhsm2-util:softhsm2 pg_ctlcluster:postgresql systemd-analyze:systemd nebula:nebula"
# The kernel lane is part of the tests in CI; elsewhere `make test-kernel` installs its emulator itself.
[ -z "${CI:-}" ] || TESTING="$TESTING qemu-system-x86_64:qemu-system-x86"

system_packages() {
  local missing=() entry
  for entry in $RUNTIME $TESTING; do
    command -v "${entry%%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${entry%%:*}" ] || missing+=("${entry##*:}")
  done
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  [ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
  # Faster ciphers for CPUs with AVX-512; the engine builds without it, too.
  [ "$(uname -m)$(id -u)" != x86_640 ] || [ -e /usr/include/intel-ipsec-mb.h ] || missing+=(libipsec-mb-dev)
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" = 0 ] || die packages "missing system packages: ${missing[*]}" "run as root, or: apt-get install ${missing[*]}" 4
  command -v apt-get >/dev/null || die packages "missing programs of: ${missing[*]}" "install them with your distribution's package manager" 1
  say "installing system packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get install -y -q --no-install-recommends "${missing[@]}" ||
    { apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; }; } >.setup.log 2>&1 ||
    { tail -5 .setup.log >&2; die packages "apt-get could not install ${missing[*]}" "see .setup.log"; }
  rm -f .setup.log
}

rust() {
  command -v cargo >/dev/null || [ -x "$HOME/.cargo/bin/cargo" ] ||
    die cargo "cargo is not on the PATH" "install a Rust toolchain $MIN_RUST or later (rustup)"
  export PATH="$HOME/.cargo/bin:$PATH"
  local have
  have=$(cargo --version | cut -d' ' -f2)
  [ "$(printf '%s\n%s\n' "$MIN_RUST" "$have" | sort -V | head -1)" = "$MIN_RUST" ] ||
    die cargo "cargo $have is older than $MIN_RUST" "rustup update stable"
}

python_environment() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die python "Python 3.11 or later is needed ($($PYTHON --version 2>&1))" "install python3.11, or: make PYTHON=python3.12 …" 1
  local key
  key=$("$PYTHON" -c 'import sys; print(sys.version)' | cat - requirements.lock | sha256sum | cut -d' ' -f1)
  fresh python "$key" && return
  say "making the Python environment in .venv (hashes checked)"
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
  stamp python "$key"
}

native_build() {
  local key
  key=$(find mesh/engine -path mesh/engine/target -prune -o -type f \( -name '*.rs' -o -name '*.c' -o -name 'Cargo.*' \) -print0 |
    sort -z | xargs -0 cat pyproject.toml <(ls /usr/include/intel-ipsec-mb.h 2>/dev/null) | sha256sum | cut -d' ' -f1)
  [ -n "$(find mesh -maxdepth 1 -name '_native*.so')" ] && fresh native "$key" && return
  say "building the engine (Rust, release); the first time takes a few minutes"
  VIRTUAL_ENV=$PWD/.venv .venv/bin/maturin develop --release --locked >.setup.log 2>&1 ||
    { tail -20 .setup.log >&2; die native "the engine did not build" "see .setup.log"; }
  rm -f .setup.log
  stamp native "$key"
}

PATH=$PATH:/usr/sbin:/sbin
system_packages
rust
python_environment
native_build
