#!/bin/bash
# Runs every fuzz target for SECONDS_EACH (default 20) with libFuzzer's coverage feedback, on stable Rust.
set -euo pipefail
cd "$(dirname "$0")"
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
target="$(rustc -vV | sed -n 's/^host: //p')"
cargo build --quiet --release --locked --target "$target"
for t in datagrams handshake tun_read coalesce uapi command_line; do
  work="$(mktemp -d)"
  "target/$target/release/$t" -max_total_time="${SECONDS_EACH:-20}" -max_len=4096 -print_final_stats=1 \
    -artifact_prefix="$work/" "$work" "corpus/$t" 2>"$work/log" || { tail -30 "$work/log"; echo "$t: FAILED, input in $work"; exit 1; }
  echo "$t: $(grep -E 'number_of_executed_units' "$work/log" | tr -s ' ') without a finding"
  rm -rf "$work"
done
