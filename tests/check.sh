#!/usr/bin/env bash
# The checks: format, layering, build, tests, sanitizers, fuzzing, lint.
#
#   bash tests/check.sh              what CI runs; 31 to 42 minutes on 2 cores from a fresh clone
#   bash tests/check.sh STAGE...     these stages; --list names those of CI
#   bash tests/check.sh tsan tidy    what CI has no time for: a build, and 15 s a file. tidy takes the
#                                    files that differ from TIDY_BASE (main), tidy_all every file
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
stages=(setup format shell layering release python unit e2e asan fuzz)
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

# The unit tests of a sanitizer's build. What it finds in any process, a test's child too, is a file
# in a folder of reports: one is a failure, whatever the test made of it.
run_sanitized() {
  local preset="$1" reports="$PWD/$logs/$1-reports" status=0
  rm -rf "$reports"
  mkdir -p "$reports"
  local -x ASAN_OPTIONS="log_path=$reports/asan"
  local -x UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/ubsan"
  local -x FORETOKEN_SIMULATION_FACTOR=0.2 FORETOKEN_FAULTS=400
  local -x TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp:log_path=$reports/tsan"
  run_ctest "$preset" unit "$cores" || status=$?
  if [[ -n "$(ls -A "$reports")" ]]; then
    cat "$reports"/*
    status=1
  fi
  return "$status"
}

stage_setup() { bash launch/setup.sh --tests; }
stage_format() { cpp_files | xargs clang-format --dry-run -Werror; }
stage_shell() { git ls-files '*.sh' '*.sbatch' .ci/run | xargs shellcheck; }
stage_layering() { python3 tests/layering_test.py && python3 tests/paths_test.py; }
stage_release() { build release; }
stage_python() { "$python" -m pytest -q tests/client; }
stage_unit() { run_ctest release unit "$cores"; }
stage_e2e() { run_ctest release e2e "$cores"; }
lint() { cmake --preset asan && xargs -r -P "$cores" -n 1 clang-tidy -p build/asan --quiet; }
stage_tidy() { git diff --name-only --diff-filter=d "${TIDY_BASE:-main}" -- '*.cc' ':!tests' | lint; }
stage_tidy_all() { git ls-files -- '*.cc' ':!tests' | lint; }
stage_asan() { build asan && run_sanitized asan; }
stage_tsan() { build tsan && run_sanitized tsan; }
stage_fuzz() { build asan && run_ctest asan fuzz "$cores"; }  # asan's build: nothing is compiled twice

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
