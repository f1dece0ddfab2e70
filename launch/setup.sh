#!/usr/bin/env bash
# Installs what Foretoken builds and runs with, on Debian 12 and Ubuntu 24.04. Run it again at any
# time: what is there already is left alone.
#
#   bash launch/setup.sh            packages, and the Python environment in build/venv
#   bash launch/setup.sh --tests    the same, and what tests/check.sh needs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(
  # building
  g++ cmake ninja-build ccache pkg-config
  # sockets, messages, configuration, logs, metrics
  libzmq3-dev cppzmq-dev libsodium-dev libmsgpack-cxx-dev libboost-dev nlohmann-json3-dev
  libcli11-dev libtomlplusplus-dev libspdlog-dev prometheus-cpp-dev libssl-dev
  # tokenizer
  libpcre2-dev libicu-dev
  # compute, topology, disk
  libhwy-dev libnuma-dev liburing-dev libxxhash-dev
  libopenmpi-dev openmpi-bin
  # tests are built by default
  libgtest-dev libgmock-dev
  # tools around the model
  python3 python3-venv
)
python_requirements=(launch/requirements.txt)
if command -v nvcc >/dev/null || [[ -x /usr/local/cuda/bin/nvcc ]]; then
  python_requirements+=(launch/requirements-cuda.txt)
fi
case "${1:-}" in
  "") ;;
  --tests)
    packages+=(clang clang-format clang-tidy libclang-rt-dev lld shellcheck git
      slurmctld slurmd slurm-client)
    python_requirements+=(tests/requirements.txt)
    ;;
  *)
    echo "usage: $0 [--tests]" >&2
    exit 2
    ;;
esac

say() { echo "setup: $*" >&2; }

is_installed() {
  [[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]
}

install_packages() {
  local missing=() name
  for name in "$@"; do
    is_installed "$name" || missing+=("$name")
  done
  if ((${#missing[@]} == 0)); then return; fi
  local as_root=()
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      say "these packages are missing, and only root can install them:"
      say "  apt-get install ${missing[*]}"
      exit 1
    fi
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# A requirements file is installed again when it has changed.
make_python_environment() {
  local venv=build/venv file stamp sum options
  mkdir -p build
  if [[ ! -x "$venv/bin/python3" ]]; then
    say "making the Python environment $venv"
    /usr/bin/python3 -m venv "$venv"
  fi
  for file in "$@"; do
    stamp="$venv/installed-${file//\//-}"
    sum="$(sha256sum <"$file")"
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$sum" ]]; then continue; fi
    say "installing $file"
    options=(--quiet --disable-pip-version-check)
    if [[ "$file" == *-cuda.txt ]]; then options+=(--no-deps); fi  # headers need no packages
    "$venv/bin/python3" -m pip install "${options[@]}" -r "$file" >&2
    echo "$sum" >"$stamp"
  done
}

if ! command -v apt-get >/dev/null; then
  say "this is no Debian or Ubuntu: install these packages' equivalents by hand:"
  say "  ${packages[*]}"
  exit 1
fi
install_packages "${packages[@]}"
make_python_environment "${python_requirements[@]}"
say "done"
