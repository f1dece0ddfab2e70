#!/usr/bin/env bash
# All GPU tests and benchmarks, from a bundle:
#
#   bash launch/bundle.sh --tests FOLDER     where Foretoken is built
#   bash FOLDER/gpu.sh RESULTS [STAGE...]    where the GPU is (MPI, CUDA, cuDNN, NCCL; torch and
#                                            transformers for oracle, smollm2 and peer)
#
# Stages: kernels sanitize engine faults oracle ops upload gather predictor decode predicted choice
# device_bytes auto streamed steps calibration outsized prefix batch batches pressure load prefill
# interleaved peer timeline, and where there are several GPUs sums groups parallel; default: all.
# Only by name: longest, which takes up to ten minutes, and smollm2, as its model is too large for the
# bundle: $FORETOKEN_SMOLLM2 names the model's folder, or its GGUF file, whole or as parts in their
# order.
# Each leaves its log in RESULTS; RESULTS/summary.json has every figure and which stages failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($# == 0)); then
  echo "usage: $0 RESULTS [STAGE...]" >&2
  exit 2
fi
results=$1
shift
stages=("$@")
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
if ((${#stages[@]} == 0)); then
  stages=(kernels sanitize engine faults oracle ops upload gather predictor decode predicted choice
    device_bytes auto streamed steps calibration outsized prefix batch batches pressure load prefill
    interleaved peer timeline)
  if ((gpus > 1)); then stages+=(sums groups parallel); fi
fi
mkdir -p "$results"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PYTHONUNBUFFERED=1
export FORETOKEN_KVSTORE=$here/bin/foretoken-kvstore
nvme=${FORETOKEN_NVME:-/tmp/foretoken-nvme}  # a folder on such a disk

# The service in the shape of Llama-3.1-8B, random weights.
bench() {
  "$here/bin/foretoken" bench "$1" --model "$here/models/llama-8b" --load-format dummy \
    --device cuda --max-batched-tokens 8192 --json "${@:2}"
}

kernels() { timeout 300 "$here/bin/cuda_test"; }
# Each kernel of ours that uses shared memory, at a small size: racecheck makes some a thousand times
# slower. Left out are larger sizes, two tests of attention that call it often, two that draw tokens
# in 8 and 50 launches of seconds each (RunsInAGraph draws in 3), and ranks that wait for each other,
# as racecheck runs kernels one by one: what they have in shared memory, a rank alone has too.
# memcheck takes two ranks.
checked_tests() {
  local tests=(
    'CudaTest.*' 'CudaSampleRow.*' 'Select.*' 'ResolveNothing.*'
    Shapes/SelectTop.IsTheCpus/{1,2}
    Shapes/CudaLinear.*/{1x64x96,2x96x50,8x1024x33} 'Chains/CudaChainsOfOneRank.*/0'
    Shapes/CudaRope.*/0 Shapes/CudaDecodeAttention.*/{0,1} Shapes/CudaStreamedAttention.*/1
    Shapes/CudaKeySketch.*/1 Shapes/CudaPrefill.BlockMaximaEqualTheCpus/0
    Shapes/KvBlocks.*/0 'Shapes/Resolve.*/6' 'Cases/CudaHistory.*/2'
    CudaPredict.RunsFromARecordedGraph Types/CudaPredictTypes.SurvivesSkipped*/1
    CudaSegmentScores.ComeWithAPrediction "$@")
  local but=('*GivesUp*' 'CudaTest.PeerSumInTwoSteps*' '*.DrawsATokenWhereScaledLogitsOverflow'
    '*.DrawsAmongEqualLogits' '*.SharesComeAndGo' '*.AttentionSeesTheStepsOwnToken')
  (IFS=: && echo "${tests[*]}-${but[*]}")
}
# Clean is what says so: a hazard of the level "warning" need not change the exit status.
sanitize() {
  timeout 150 compute-sanitizer --tool memcheck --error-exitcode 9 "$here/bin/cuda_test" \
    --gtest_filter="$(checked_tests 'Ranks/CudaPeerSum*/1')" || return 1
  timeout 400 compute-sanitizer --tool racecheck --error-exitcode 9 "$here/bin/cuda_test" \
    --gtest_filter="$(checked_tests)" | tee "$results/racecheck.txt" &&
    grep -q 'RACECHECK SUMMARY: 0 hazards' "$results/racecheck.txt"
}
engine() { FORETOKEN_TEST_DEVICE=cuda timeout 300 "$here/bin/worker_test"; }
faults() {
  timeout 120 python3 "$here/faults.py" --bin "$here/bin" --model "$here/models/llama-8b" \
    --gpus "$gpus" --json "$results/faults.json"
}
oracle() {
  timeout 400 python3 "$here/oracle.py" --bin "$here/bin" --tokenizer "$here/models/llama-8b" \
    --tensor-parallel "$(if ((gpus > 1)); then echo "1,$gpus"; else echo 1; fi)" \
    --json "$results/oracle.json"
}
smollm2() {
  local model
  read -ra model <<<"${FORETOKEN_SMOLLM2:-$here/models/smollm2-135m}"
  PYTHONPATH=$here/python timeout 400 python3 "$here/smollm2.py" --bin "$here/bin" \
    --model "${model[@]}" --oracle "$here/smollm2.json" --text "$here/GPL-3" \
    --json "$results/smollm2.json"
}
ops() { timeout 200 "$here/bin/cuda_ops_bench" | tee "$results/ops.json"; }
# Host memory to the device, from memory that isn't pinned; and what pinning it takes.
upload() { timeout 150 "$here/bin/upload_bench" | tee "$results/upload.json"; }
gather() {
  timeout 300 "$here/bin/foretoken" bench gather --model "$here/models/llama-8b" --device cuda \
    --block-kib 4,8,16 --json | tee "$results/gather.json"
}
predictor() {
  timeout 300 "$here/bin/foretoken" bench predictor --model "$here/models/llama-8b" --device cuda \
    --json | tee "$results/predictor.json"
}
decode() {
  local context
  for context in 1024 8192 32768 130000; do
    bench decode --kv-policy full --context "$context" --tokens 128 --repeat 2 \
      --max-model-len 131072 --kv-host-gib 40 | tee "$results/decode-$context.json" || return 1
  done
}
# Predicted decode with the KV in host memory, and dense decode on the device in the same run; once
# also full attention streamed from host memory, and once the predictor's own choice.
predict() {
  local name=$1 context=$2 budget=$3
  bench decode --kv-policy attention-predictor --calibrate-with none --context "$context" \
    --kv-budget "$budget" --tokens 128 --max-model-len 131072 --kv-host-gib 24 --baseline dense \
    --baseline-tokens 32 --plot "$results/predicted-$name.svg" "${@:4}" |
    tee "$results/predicted-$name.json"
}
predicted() {
  local churn
  for churn in 2 8 20 100; do
    predict "130000-churn$churn" 130000 2304 --trace "churn=$churn" || return 1
    predict "32768-churn$churn" 32768 2304 --trace "churn=$churn" || return 1
  done
  predict 130000-budget1024-churn100 130000 1024 --trace churn=100 &&
    predict 130000-live 130000 2304 --baseline streamed
}
# What history, predictor and resolver add to a step: with maps of either kind, whose choice nothing
# comes of as blocks stay what they are, and without any.
choice() {
  local words name flags
  for words in "none streaming-llm" "kv-head attention-predictor --predict-per kv-head" \
    "query-head attention-predictor --predict-per query-head --kv-budget-per kv-head"; do
    read -r name flags <<<"$words"
    if [[ "$name" != none ]]; then flags+=" --calibrate-with none --trace churn=0"; fi
    # shellcheck disable=SC2086  # words of a flag
    bench decode --kv-policy $flags --context 130000 --kv-budget 2304 --tokens 256 \
      --max-model-len 131072 --kv-host-gib 24 | tee "$results/choice-$name.json" || return 1
  done
}
# What a sequence has on the device, of a map a KV head and of one a query head.
device_bytes() {
  local maps
  for maps in kv-head query-head; do
    predict "32000-bytes-$maps" 32000 2048 --history-type e5m3 --predict-per "$maps" --trace churn=8 &&
      predict "130000-bytes-$maps" 130000 2304 --history-type e5m3 --predict-per "$maps" \
        --trace churn=8 || return 1
  done
}
# While all fits, auto is dense decode: to be compared with stage decode.
auto() {
  local context
  for context in 1024 8192 32768 130000; do
    bench decode --kv-policy auto --context "$context" --tokens 128 --max-model-len 131072 \
      --kv-host-gib 40 | tee "$results/auto-$context.json" || return 1
  done
}
streamed() {
  bench decode --kv-policy full --kv-resident never --context 130000 --tokens 12 \
    --max-model-len 131072 --kv-host-gib 40 | tee "$results/streamed.json"
}
# The longest context that seven tenths of host memory hold, at 128 KiB a token, up to a million.
longest() {
  local kib context status=0 folder=$results/long-model
  kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
  context=$((kib * 7 / 10 / 128 / 10000 * 10000))
  if ((context > 1000000)); then context=1000000; fi
  cp -r "$here/models/llama-8b" "$folder"
  sed -i "s/\"max_position_embeddings\": *[0-9]*/\"max_position_embeddings\": $((context + 10000))/" \
    "$folder/config.json"
  timeout 590 "$here/bin/foretoken" bench decode --model "$folder" --load-format dummy --device cuda \
    --max-batched-tokens 8192 --json --kv-policy attention-predictor --calibrate-with none \
    --kv-budget 2304 --context "$context" --tokens 64 --max-model-len $((context + 10000)) \
    --kv-host-gib $((context * 128 / 1048576 + 5)) --tensor-parallel-size "$gpus" |
    tee "$results/longest.json" || status=$?
  rm -r "$folder"
  return $status
}
# Ten thousand steps of one recorded graph: neither the device's memory nor the ranks' may grow.
steps() {
  bench decode --kv-policy attention-predictor --calibrate-with none --kv-budget 2304 \
    --trace churn=8 --context 8000 --tokens 10000 --max-model-len 131072 --kv-host-gib 24 |
    python3 "$here/footprint.py" | tee "$results/steps.json"
}
# What each source of calibrations costs at 128K, beside none.
calibration() {
  local words source every
  for words in "none 5" "sketch 20" "sketch 5" "sketch 1" "exact 20" "exact 5"; do
    read -r source every <<<"$words"
    bench decode --kv-policy attention-predictor --calibrate-with "$source" \
      --calibrate-every "$every" --context 130000 --kv-budget 2304 --trace churn=8 --tokens 64 \
      --max-model-len 131072 --kv-host-gib 24 | tee "$results/calibration-$source-$every.json" ||
      return 1
  done
}
# 128K with a quarter of its KV in host memory and all of it on NVMe, and the same with all of it in
# memory; what the predictor chooses, or a share of new blocks. An audit reads all from the disk: 9 s.
outsized() {
  local words late name more
  for words in "skip churn8 --trace churn=8" "skip churn2 --trace churn=2" "skip live" "wait live" \
    "skip audited --audit-every 32"; do
    read -r late name more <<<"$words"
    # shellcheck disable=SC2086  # words of a flag
    bench decode --kv-policy attention-predictor --calibrate-with none --context 130000 \
      --kv-budget 2304 $more --tokens 96 --max-model-len 131072 --kv-host-gib 4 \
      --kv-nvme-path "$nvme" --kv-nvme-gib 24 --on-late "$late" --baseline memory \
      --plot "$results/outsized-$late-$name.svg" | tee "$results/outsized-$late-$name.json" ||
      return 1
  done
}
# A prefix of 32K from host memory, and from NVMe, with and without a restart.
prefix() {
  mkdir -p "$nvme"
  chmod 700 "$nvme"
  timeout 200 python3 "$here/prefix.py" --bin "$here/bin" --model "$here/models/llama-8b" \
    --nvme "$nvme/prefix" --json "$results/prefix.json"
}
batch() {
  bench decode --kv-policy full --context 2000 --tokens 200 --batch 32 --max-num-seqs 32 \
    --max-model-len 4096 --kv-host-gib 12 | tee "$results/batch-32.json"
}
batches() {
  bench decode --kv-policy attention-predictor --calibrate-with none --kv-budget 1024 \
    --trace churn=8 --context 64000 --tokens 300 --batch 8 --max-num-seqs 8 \
    --max-inter-token-ms 0 --max-model-len 65536 --kv-host-gib 72 | tee "$results/batch-8-64000.json"
}
# A share of an H200's memory that four dense contexts of 32,000 tokens fill, and four times as many.
pressure() {
  local flags=(--gpu-memory-utilization 0.24 --context 32000 --max-model-len 32768
    --kv-host-gib 76 --max-inter-token-ms 0)
  bench decode "${flags[@]}" --kv-policy full --tokens 100 --batch 4 --max-num-seqs 4 |
    tee "$results/pressure-full.json" || return 1
  bench decode "${flags[@]}" --kv-policy attention-predictor --calibrate-with none \
    --kv-budget 1024 --trace churn=8 --tokens 150 --batch 16 --max-num-seqs 16 |
    tee "$results/pressure-predicted.json" || return 1
  bench decode "${flags[@]}" --kv-policy auto --calibrate-with none --kv-budget 1024 \
    --tokens 150 --batch 16 --max-num-seqs 16 | tee "$results/pressure-auto.json"
}
# Weights from files, 16 GB, which are written to $FORETOKEN_FILES, a folder on a local disk.
load() {
  timeout 500 python3 "$here/load.py" --bin "$here/bin" --model "$here/models/llama-8b" \
    --folder "${FORETOKEN_FILES:-/tmp}" --json "$results/load.json"
}
prefill() {
  local context
  for context in 8192 32768 130000; do
    bench prefill --kv-policy full --context "$context" --repeat 4 --max-model-len 131072 \
      --kv-host-gib 80 | tee "$results/prefill-$context.json" || return 1
  done
}
# A stream's tokens beside long prompts of others. The log says which steps took longer than the
# bound.
interleaved() {
  FORETOKEN_LOG=debug timeout 200 python3 "$here/interleaved.py" --bin "$here/bin" \
    --model "$here/models/llama-8b" --json "$results/interleaved.json"
}
# The kernels of a decode step at 128K, as the service runs it.
timeline() {
  local cupti
  cupti=$(find -L /usr/local/cuda*/ -name 'libcupti.so.13' 2>/dev/null | head -n 1)
  LD_LIBRARY_PATH="$(dirname "$cupti"):${LD_LIBRARY_PATH:-}" KERNEL_TRACE="$results/step.csv" \
    CUDA_INJECTION64_PATH="$here/libkernel_trace.so" \
    bench decode --kv-policy attention-predictor --calibrate-with none --context 130000 \
    --kv-budget 2304 --trace churn=8 --tokens 48 --max-model-len 131072 --kv-host-gib 24 || return 1
  python3 "$here/timeline.py" "$results/step.csv" --json "$results/timeline.json" \
    --svg "$results/decode_step.svg"
}
sums() {
  timeout 100 mpirun -n "$gpus" "$here/bin/collective_bench" | tee "$results/sums.json"
}
groups() {
  timeout 120 python3 "$here/groups.py" --bin "$here/bin" --model "$here/models/llama-8b" \
    --json "$results/groups.json"
}
# Decode, predicted decode and prefill on one GPU and on all.
parallel() {
  local ranks flags=(--max-model-len 131072 --kv-host-gib 40)
  for ranks in 1 "$gpus"; do
    bench decode --kv-policy full --context 8192 --tokens 128 --repeat 2 "${flags[@]}" \
      --tensor-parallel-size "$ranks" | tee "$results/parallel-decode-$ranks.json" || return 1
    bench decode --kv-policy attention-predictor --calibrate-with none --kv-budget 2304 \
      --trace churn=8 --context 130000 --tokens 128 "${flags[@]}" \
      --tensor-parallel-size "$ranks" | tee "$results/parallel-predicted-$ranks.json" || return 1
    bench prefill --kv-policy full --context 32768 --repeat 4 "${flags[@]}" \
      --tensor-parallel-size "$ranks" | tee "$results/parallel-prefill-$ranks.json" || return 1
  done
}
peer() { timeout 300 python3 "$here/transformers_peer.py" --json "$results/peer.json"; }

failed=()
for stage in "${stages[@]}"; do
  echo "gpu: $stage" >&2
  if ! "$stage" >"$results/$stage.log" 2>&1; then
    failed+=("$stage")
    echo "gpu: $stage failed:" >&2
    tail -n 20 "$results/$stage.log" >&2
  fi
done
python3 - "$results" "${failed[@]}" <<'PYTHON'
import json, pathlib, sys
results = pathlib.Path(sys.argv[1])
found = {}
for file in sorted(results.glob("*.json")):
    if file.name != "summary.json":
        try:
            found[file.stem] = json.loads(file.read_text())
        except ValueError:
            found[file.stem] = None
(results / "summary.json").write_text(json.dumps({"failed": sys.argv[2:], **found}, indent=1))
PYTHON
if ((${#failed[@]} > 0)); then
  echo "gpu: failed: ${failed[*]}" >&2
  exit 1
fi
