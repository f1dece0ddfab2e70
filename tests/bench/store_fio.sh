#!/usr/bin/env bash
# The NVMe tier and fio on the same disk, in turns: whole slabs of the 8B shape, as the store moves
# them, and runs of 128 KiB, as a rank does; each with our sizes and depths.
#
#   bash tests/bench/store_fio.sh DIR [ROUNDS]     DIR: mode 0700; about 2 GiB are written and removed
set -euo pipefail
folder=$1
rounds=${2:-3}
bin=${FORETOKEN_BIN:-$(dirname "${BASH_SOURCE[0]}")/../../build/release/bin}
readonly slab=4198400 slabs=511 depth=15 run=131072 runs=16384

# GB/s of one pattern: PATTERN BLOCK_BYTES BLOCKS DEPTH
measure() {
  fio --name="$1" --filename="$folder/fio" --rw="$1" --bs="$2" --size=$(($2 * $3)) \
    --iodepth="$4" --ioengine=io_uring --fixedbufs=1 --direct=1 --fallocate=none \
    --output-format=terse --terse-version=3 |
    awk -F';' '{ printf "%.2f", ($7 + $48) * 1024 / 1e9 }'
}

# BLOCK_BYTES BLOCKS WRITE_DEPTH READ_DEPTH. Files have their length from the start, as the tier's.
fio_line() {
  truncate -s $(($1 * $2)) "$folder/fio"
  echo "fio GB/s: new file $(measure write "$1" "$2" "$3"), over it $(measure write "$1" "$2" "$3")," \
    "random reads $(measure randread "$1" "$2" "$4")"
  rm -f "$folder/fio"
}

for ((round = 1; round <= rounds; ++round)); do
  "$bin/foretoken" bench store "$folder" --json 2>/dev/null
  fio_line $slab $slabs $depth $depth
  "$bin/run_io_bench" "$folder" 2>/dev/null
  fio_line $run $runs 32 64
done
