// Stores slabs in a folder's NVMe file until it is killed:
//   slab_writer FOLDER SEED KEY_FILE [POINT COUNT]
// KEY_FILE: of an encrypted file, else empty. POINT, COUNT: dies at this name of kDeathPoints, at
// the COUNT-th such write. Writes the number of each slab to stdout (uint32) once the tier has it.
#include <poll.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <span>
#include <string>

#include "common/check.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/sealing_device.h"
#include "tests/kvstore/dying_device.h"
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

const DeathPoint& point_of(std::string_view name) {
  const auto* point = std::ranges::find(kDeathPoints, name, &DeathPoint::name);
  FT_CHECK(point != kDeathPoints.end());
  return *point;
}

// As NvmeTier::open, on a device that dies where that is asked for.
std::unique_ptr<NvmeTier> open(const NvmeFile& file, std::span<char* const> death,
                               std::shared_ptr<const KvCipher> cipher) {
  IoMemory memory = NvmeTier::make_memory(kTestModel);
  auto disk = make_block_device(file.fd(), memory, NvmeTier::depth(kTestModel));
  if (!death.empty()) {
    disk = std::make_unique<DyingDevice>(std::move(disk), kill_test_geometry(cipher != nullptr),
                                         point_of(death[0]), std::atoi(death[1]));
  }
  auto device = make_sealing_device(std::move(disk), cipher);
  const auto contents =
      open_contents(*device, memory.bytes(), kill_test_opening(cipher)).value_or_throw();
  return std::make_unique<NvmeTier>(std::move(memory), std::move(device), contents, cipher);
}

[[noreturn]] void write_for_ever(NvmeTier& tier, unsigned seed) {
  std::mt19937 random(seed);
  for (;;) {
    const auto number = static_cast<std::uint32_t>(random());
    const SlabName name = test_name(0, number);
    if (!tier.can_store(now()) || tier.knows(name)) continue;
    tier.store(name, test_slab(name).data(), now());
    finish_store(tier);
    if (write(STDOUT_FILENO, &number, sizeof number) != sizeof number) _exit(1);
  }
}

}  // namespace
}  // namespace foretoken::kvstore

int main(int argc, char** argv) {
  using namespace foretoken::kvstore;
  if (argc != 4 && argc != 6) return 2;
  alarm(60);  // where nobody kills it
  const std::string key_file = argv[3];
  const NvmeFile file(argv[1]);
  const auto tier = open(file, std::span(argv, static_cast<std::size_t>(argc)).subspan(4),
                         key_file.empty() ? nullptr : KvCipher::from_file(key_file));
  write_for_ever(*tier, static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10)));
}
