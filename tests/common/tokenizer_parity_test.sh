#!/usr/bin/env bash
# tokenizer_parity_test.sh TOKENIZER_CLI: runs tokenizer_parity_test.py in the environment that
# launch/setup.sh makes, over the test data and each model in models/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=build/venv/bin/python3
if [[ ! -x "$python" ]]; then
  echo "skipped: there is no $python; launch/setup.sh --tests makes it"
  [[ -z "${CI:-}" ]] && exit 77
  exit 1
fi
folders=()
for file in models/*/tokenizer.json; do
  if [[ -f "$file" ]]; then folders+=("$(dirname "$file")"); fi
done
exec "$python" tests/common/tokenizer_parity_test.py "$1" "${folders[@]}"
