#!/usr/bin/env bash
# The NVMe tier and fio on the same disk, in turns: sizes and depth of the 8B shape's slabs.
#
#   bash tests/bench/store_fio.sh DIR [ROUNDS]     DIR: mode 0700; about 2 GiB are written and removed
set -euo pipefail
folder=$1
rounds=${2:-3}
bin=${FORETOKEN_BIN:-$(dirname "${BASH_SOURCE[0]}")/../../build/release/bin}
readonly slab=4198400 slabs=511 depth=15

# MB/s of one pattern.
measure() {
  fio --name="$1" --filename="$folder/fio" --rw="$1" --bs=$slab --size=$((slab * slabs)) \
    --iodepth=$depth --ioengine=io_uring --fixedbufs=1 --direct=1 --fallocate=none \
    --output-format=terse --terse-version=3 |
    awk -F';' '{ printf "%.2f", ($7 + $48) * 1024 / 1e9 }'
}

for ((round = 1; round <= rounds; ++round)); do
  "$bin/foretoken" bench store "$folder" --json 2>/dev/null
  echo "fio GB/s: new file $(measure write), over it $(measure write), random reads $(measure randread)"
  rm -f "$folder/fio"
done
