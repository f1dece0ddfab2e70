#!/usr/bin/env bash
# Everything in full: what tests/check.sh, which CI runs, does a part of. Takes about a day on 2 cores.
#
#   bash tests/soak.sh              all stages
#   bash tests/soak.sh STAGE...     these: check simulation store kills disk arena fuzz faults
#   SOAK=0.01 bash tests/soak.sh    ... with a hundredth of the counts, to try them
#
# Every stage runs even when one before it failed; a stage's output is in build/soak/STAGE.log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PYTHONPATH="$PWD/client/python"
cores="$(nproc)"
python=build/venv/bin/python3
logs=build/soak
stages=(check simulation store kills disk arena fuzz faults)

# So many, or the share of them that $SOAK asks for; at least one.
scaled() { awk -v full="$1" -v share="${SOAK:-1}" 'BEGIN {n = full * share; print (n < 1 ? 1 : int(n))}'; }

build() { cmake --preset "$1" && cmake --build --preset "$1" -j "$cores" "${@:2}"; }

# The whole of tests/check.sh, TSan and lint included.
stage_check() {
  local names
  read -ra names <<<"$(bash tests/check.sh --list)"
  bash tests/check.sh "${names[@]}" tsan tidy_all
}
# Games of the coordinator with simulated workers: 10,000 with all faults at once, and others.
stage_simulation() {
  build release --target coordinator_simulation_test &&
    FORETOKEN_SIMULATION_FACTOR="$(scaled 200)" build/release/bin/coordinator_simulation_test
}
# Ten million random operations on the store's book beside a plain model, under ASan and UBSan, and TSan.
stage_store() {
  local preset
  for preset in asan-long tsan-long; do
    build "$preset" --target kvstore_store_book_test &&
      FORETOKEN_STORE_OPS="$(scaled 10000000)" "build/$preset/bin/kvstore_store_book_test" \
        --gtest_filter='*PlainModel' || return 1
  done
}
# A writer of the NVMe file, killed a thousand times.
stage_kills() {
  build release --target kvstore_nvme_kill_test &&
    FORETOKEN_KILLS="$(scaled 1000)" build/release/bin/kvstore_nvme_kill_test
}
# 10,000 injections into the NVMe file, and into blocks on their way from host memory.
stage_disk() {
  local -x FORETOKEN_FAULTS
  FORETOKEN_FAULTS="$(scaled 10000)"
  build release --target kvstore_nvme_faults_test kernels_kv_ops_test &&
    build/release/bin/kvstore_nvme_faults_test && build/release/bin/kernels_kv_ops_test
}
# 10,000 injections into the arena under a running service.
stage_arena() {
  build release && FORETOKEN_FAULTS="$(scaled 10000)" "$python" -m pytest -q -p no:cacheprovider \
    tests/launch/arena_faults_test.py -k every_kind
}
# 10^8 executions of each decoder, one a core; the inputs that are kept begin the next run.
stage_fuzz() {
  local sources=(tests/fuzz/*_fuzz.cc) targets
  targets=("${sources[@]##*/}")
  targets=("${targets[@]%.cc}")
  build asan-long --target "${targets[@]}" || return 1
  export logs
  export -f fuzz_one
  # shellcheck disable=SC2016  # for the inner shell
  printf '%s\n' "${targets[@]}" |
    RUNS="$(scaled 100000000)" xargs -P "$cores" -n 1 bash -c 'fuzz_one "$0"'
}
fuzz_one() {
  local name="${1%_fuzz}" status=0
  mkdir -p "$logs/$name"
  "build/asan-long/bin/$1" -runs="$RUNS" -artifact_prefix="$logs/$name-" "$logs/$name" \
    "tests/fuzz/corpus/$name" >"$logs/fuzz-$name.log" 2>&1 || status=$?
  echo "$name: $(tail -n 1 "$logs/fuzz-$name.log")"
  return "$status"
}
# Half an hour of load, with a random fault every ten seconds.
stage_faults() {
  build release && "$python" tests/launch/soak.py --minutes "$(scaled 30)" --json "$logs/faults.json"
}

if (($# > 0)); then stages=("$@"); fi
mkdir -p "$logs"
failed=()
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" >/dev/null; then
    echo "soak: no stage '$stage'" >&2
    exit 2
  fi
done
for stage in "${stages[@]}"; do
  start=$SECONDS
  echo "soak: $stage"
  if "stage_$stage" >"$logs/$stage.log" 2>&1 </dev/null; then
    echo "soak: $stage, $((SECONDS - start)) s: ok"
  else
    failed+=("$stage")
    tail -n 50 "$logs/$stage.log"
    echo "soak: $stage, $((SECONDS - start)) s: failed, all of it in $logs/$stage.log"
  fi
done
echo "soak: ${#stages[@]} stages, ${#failed[@]} failed${failed[*]:+: ${failed[*]}}"
((${#failed[@]} == 0))
