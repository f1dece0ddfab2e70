#!/usr/bin/env bash
# The checks: format, layering, build, tests, and on demand sanitizers, fuzzing and lint.
#
#   bash tests/check.sh              what CI runs; under 40 minutes on 2 cores from a fresh clone
#   bash tests/check.sh STAGE...     these stages
#   bash tests/check.sh asan tsan fuzz tidy    what CI has no time for: a build each
#
# Every stage runs even when one before it failed; a stage's output is in build/check/STAGE.log and,
# when it fails, on the screen. The last line counts tests (a stage without tests counts as one).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PYTHONPATH="$PWD/client/python"
cores="$(nproc)"
python=build/venv/bin/python3
logs=build/check
stages=(setup format shell layering release python unit e2e)
passed=0
failed=0

cpp_files() { git ls-files '*.h' '*.cc' '*.cu' '*.cuh'; }

build() { cmake --preset "$1" && cmake --build --preset "$1" -j "$cores"; }

# Tests of one label; a test that hangs is ended.
run_ctest() {
  local preset="$1" label="$2" jobs="$3"
  ctest --test-dir "build/$preset" -L "^$label\$" -j "$jobs" --timeout 600 --output-on-failure \
    --no-tests=error
}

stage_setup() { bash launch/setup.sh --tests; }
stage_format() { cpp_files | xargs clang-format --dry-run -Werror; }
stage_shell() { git ls-files '*.sh' '*.sbatch' .ci/run | xargs shellcheck; }
stage_layering() { python3 tests/layering_test.py; }
stage_release() { build release; }
stage_python() { "$python" -m pytest -q tests/client; }
stage_unit() { run_ctest release unit "$cores"; }
stage_e2e() { run_ctest release "(mpi|e2e)" 1; }
stage_tidy() {
  cpp_files | grep '\.cc$' | grep -v '^tests/' | xargs -P "$cores" -n 4 clang-tidy -p build/release --quiet
}
stage_asan() { build asan && run_ctest asan unit "$cores"; }
stage_tsan() {
  local -x TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp"
  build tsan && run_ctest tsan unit "$cores"
}
stage_fuzz() {
  local targets
  targets="$(cd tests/fuzz && basename -s .cc -- *_fuzz.cc)"
  # shellcheck disable=SC2086
  cmake --preset fuzz && cmake --build --preset fuzz -j "$cores" --target $targets &&
    run_ctest fuzz fuzz "$cores"
}

# Adds a log's test counts: ctest's and pytest's closing lines; else the stage counts as one.
count() {
  local log="$1" status="$2" line
  if line="$(grep -E '^[0-9]+% tests passed, ' "$log" | tail -1)" && [[ -n "$line" ]]; then
    local bad total
    bad="$(sed -E 's/.* ([0-9]+) tests failed.*/\1/' <<<"$line")"
    total="$(sed -E 's/.* out of ([0-9]+).*/\1/' <<<"$line")"
    ((passed += total - bad, failed += bad))
    if ((status != 0 && bad == 0)); then ((failed += 1)); fi
  elif line="$(grep -E '^[0-9]+ passed' "$log" | tail -1)" && [[ -n "$line" && "$status" == 0 ]]; then
    ((passed += ${line%% *}))
  elif ((status == 0)); then
    ((passed += 1))
  else
    ((failed += 1))
  fi
}

run_stage() {
  local name="$1" log="$logs/$1.log" start=$SECONDS status=0
  "stage_$name" >"$log" 2>&1 </dev/null || status=$?
  count "$log" "$status"
  if ((status == 0)); then
    echo "ok    $name ($((SECONDS - start)) s)"
  else
    tail -n 150 "$log"
    echo "FAIL  $name ($((SECONDS - start)) s), all of it in $log"
  fi
}

if [[ "${1:-}" == --list ]]; then
  echo "${stages[@]}"
  exit 0
fi
if (($# > 0)); then stages=("$@"); fi
mkdir -p "$logs"
for name in "${stages[@]}"; do
  if ! declare -F "stage_$name" >/dev/null; then
    echo "no stage '$name'; there are: $(bash "$0" --list)" >&2
    exit 2
  fi
done
for name in "${stages[@]}"; do run_stage "$name"; done
echo "$passed passed, $failed failed"
((failed == 0))
