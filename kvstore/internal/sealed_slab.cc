#include "kvstore/internal/sealed_slab.h"

#include <algorithm>
#include <cstring>

namespace foretoken::kvstore {
namespace {

struct SealedRun {
  std::span<std::byte> bytes;
  std::uint64_t offset = 0;   // in the file
  std::byte* seal = nullptr;  // behind the slab
};

SealedRun run_of(const kernels::KvShape& slab, std::span<std::byte> slot, std::uint64_t offset,
                 int layer) {
  const std::size_t at = static_cast<std::size_t>(layer) * slab.run_bytes();
  return {slot.subspan(at, slab.run_bytes()), offset + at,
          slot.data() + slab.slab_bytes() + static_cast<std::size_t>(layer) * sizeof(Seal)};
}

}  // namespace

std::span<const std::byte> place_at(const std::uint64_t& offset) {
  return std::as_bytes(std::span(&offset, 1));
}

Seal seal_slab(const KvCipher& cipher, const kernels::KvShape& slab, std::span<std::byte> slot,
               std::uint64_t offset) {
  std::ranges::fill(slot.subspan(slab.slab_bytes()), std::byte{0});
  for (int layer = 0; layer < slab.num_layers; ++layer) {
    const SealedRun run = run_of(slab, slot, offset, layer);
    const Seal seal = cipher.seal(run.bytes, place_at(run.offset));
    std::memcpy(run.seal, &seal, sizeof seal);
  }
  const std::uint64_t table = offset + slab.slab_payload_bytes();
  return cipher.seal(slot.subspan(slab.slab_payload_bytes()), place_at(table));
}

bool open_slab(const KvCipher& cipher, const kernels::KvShape& slab, std::span<std::byte> slot,
               std::uint64_t offset, const Seal& table) {
  const std::uint64_t at = offset + slab.slab_payload_bytes();
  if (!cipher.open(slot.subspan(slab.slab_payload_bytes()), place_at(at), table)) return false;
  for (int layer = 0; layer < slab.num_layers; ++layer) {
    const SealedRun run = run_of(slab, slot, offset, layer);
    Seal seal;
    std::memcpy(&seal, run.seal, sizeof seal);
    if (!cipher.open(run.bytes, place_at(run.offset), seal)) return false;
  }
  return true;
}

}  // namespace foretoken::kvstore
