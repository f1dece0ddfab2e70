// Stores slabs in a folder's NVMe file until it is killed: slab_writer FOLDER SEED. Writes the
// number of each slab to stdout (uint32) once the tier has it.
#include <poll.h>
#include <unistd.h>

#include <cstdlib>
#include <random>

#include "kvstore/internal/nvme_tier.h"
#include "tests/kvstore/test_slab.h"

namespace foretoken::kvstore {
namespace {

TimePoint now() { return std::chrono::steady_clock::now(); }

void finish_store(NvmeTier& tier) {
  while (!tier.is_idle()) {
    static_cast<void>(tier.advance(now()));
    pollfd ready{tier.completion_fd(), POLLIN, 0};
    if (!tier.is_idle() && !tier.has_more()) poll(&ready, 1, 10);
  }
}

[[noreturn]] void write_for_ever(const char* folder, unsigned seed) {
  const NvmeFile file(folder);
  const NvmeOpening opening{kTestModel, kill_test_geometry().file_bytes(), 0,
                            NvmeReuse::kKeepSlabs};
  const auto tier = NvmeTier::open(file, opening).value_or_throw();
  std::mt19937 random(seed);
  for (;;) {
    const auto number = static_cast<std::uint32_t>(random());
    const SlabName name = test_name(0, number);
    if (!tier->can_store(now()) || tier->knows(name)) continue;
    tier->store(name, test_slab(name).data(), now());
    finish_store(*tier);
    if (write(STDOUT_FILENO, &number, sizeof number) != sizeof number) _exit(1);
  }
}

}  // namespace
}  // namespace foretoken::kvstore

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  foretoken::kvstore::write_for_ever(argv[1], static_cast<unsigned>(std::atoi(argv[2])));
}
