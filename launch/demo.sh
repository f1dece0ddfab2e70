#!/usr/bin/env bash
# The whole of Foretoken on one machine, from a fresh clone: set-up, build, a small real model, a
# coordinator, a KV store, two tensor-parallel workers under mpirun, and a client that streams the
# answer to a question about a long text, while the AttentionPredictor chooses which KV blocks each
# step gets. The first run takes under 15 minutes on 2 cores, the next ones under 2.
#
#   bash launch/demo.sh [--max-tokens N] [--audit-every N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

max_tokens=96
audit_every=8
while (($# > 0)); do
  case "$1" in
    --max-tokens) max_tokens="$2" ;;
    --audit-every) audit_every="$2" ;;
    *)
      sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
  shift 2
done

say() { echo "demo: $*" >&2; }
bash launch/setup.sh
say "building (a first build takes some minutes)"
mkdir -p build
programs=(foretoken foretoken-coordinator foretoken-kvstore foretoken-worker)
cmake --preset release >build/demo-build.log
cmake --build --preset release --target "${programs[@]}" >>build/demo-build.log || {
  tail -n 40 build/demo-build.log >&2
  exit 1
}
model="$(build/release/bin/foretoken model fetch smollm2-135m)"
PYTHONPATH=client/python exec build/venv/bin/python3 launch/demo.py \
  --model "$model" --max-tokens "$max_tokens" --audit-every "$audit_every"
