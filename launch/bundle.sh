#!/usr/bin/env bash
# Makes a self-contained folder of Foretoken's programs, for machines where nothing can be installed.
#
#   bash launch/bundle.sh [--cuda] [--tests] FOLDER
#
# FOLDER/bin has the programs of build/release/bin, FOLDER/lib the libraries they need. Not in it, since
# they belong to the machine: the C and C++ runtimes, MPI (it must fit the machine's mpirun or srun), the
# GPU driver, and the CUDA libraries (cuBLAS, cuDNN, NCCL) unless --cuda is given. With --tests there is
# also FOLDER/gpu.sh, which runs the GPU tests and benchmarks (tests/gpu.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

with_cuda=false
programs=(foretoken foretoken-coordinator foretoken-worker foretoken-kvstore)
extras=()
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --cuda) with_cuda=true ;;
    --tests)
      programs+=(cuda_test worker_test cuda_ops_bench collective_bench upload_bench)
      extras=(tests/gpu.sh tests/gpu/faults.py tests/gpu/footprint.py tests/gpu/groups.py
        tests/gpu/interleaved.py tests/gpu/load.py tests/gpu/oracle.py tests/gpu/prefix.py
        tests/gpu/service.py tests/gpu/smollm2.py tests/gpu/timeline.py
        tests/bench/transformers_peer.py tests/oracles/data/smollm2.json
        /usr/share/common-licenses/GPL-3)
      old_nccl=build/release/lib/old/libold_nccl.so
      if [[ -f "$old_nccl" ]]; then extras+=("$old_nccl"); fi
      trace=build/release/lib/libkernel_trace.so  # built where CUPTI is found
      if [[ -f "$trace" ]]; then extras+=("$trace"); fi
      ;;
    *) break ;;
  esac
  shift
done
if (($# != 1)) || [[ "$1" == --* ]]; then
  echo "usage: $0 [--cuda] [--tests] FOLDER" >&2
  exit 2
fi
folder=$1

# The machine's own: the C and C++ runtimes, and MPI with what it brings.
left_out='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|stdc\+\+|gcc_s|mpi.*|open-.*|pmix|hwloc|event.*|util|z)\.so.*)$'
cuda_libraries='^lib(cublas.*|nccl|cudart).*\.so.*$'
# What is loaded at run time, so that ldd lists none of it: cuDNN and its parts, and its compiler.
loaded_later='^lib(cudnn.*[.]so[.]9|nvrtc(-builtins)?[.]so[.][0-9.]+)$'

mkdir -p "$folder/bin" "$folder/lib"
for program in "${programs[@]}"; do
  path=build/release/bin/$program
  if [[ ! -x "$path" ]]; then
    echo "$path is missing: cmake --preset release && cmake --build --preset release" >&2
    exit 1
  fi
  strip -o "$folder/bin/$program" "$path"
  while read -r library; do
    name=$(basename "$library")
    if [[ "$name" =~ $left_out ]]; then continue; fi
    if [[ "$name" =~ $cuda_libraries ]] && ! $with_cuda; then continue; fi
    cp -uL "$library" "$folder/lib/$name"
  done < <(ldd "$path" | awk '$2 == "=>" && $3 ~ "^/" {print $3}')
done
if $with_cuda; then
  libraries=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p | awk -v wanted="$loaded_later" '$1 ~ wanted {print $NF}')
  if [[ "$libraries" != *libcudnn.so.9* ]]; then
    echo "libcudnn.so.9 is not in the linker's cache (ldconfig -p): install cuDNN, or leave --cuda out" >&2
    exit 1
  fi
  for library in $libraries; do cp -uL "$library" "$folder/lib/"; done
fi
mkdir -p "$folder/share/foretoken"
cp build/release/share/foretoken/* "$folder/share/foretoken/"
for extra in "${extras[@]}"; do cp "$extra" "$folder/"; done
if ((${#extras[@]} > 0)); then
  python3 tests/gpu/make_bench_model.py "$folder/models/llama-8b"
  # What converts a GGUF file; its other packages come with transformers.
  gguf=$(build/venv/bin/python3 -c 'import gguf, os; print(os.path.dirname(gguf.__file__))')
  mkdir -p "$folder/python/foretoken" "$folder/python/gguf"
  cp client/python/foretoken/*.py "$folder/python/foretoken/"
  cp "$gguf"/*.py "$folder/python/gguf/"
fi
du -sh "$folder" | cut -f1 | sed "s|^|bundle: $folder, |" >&2
