// Ops that move KV between the prefill scratch, the slots and the arena. The arena's checksums are
// written and verified here; docs/formats.md has the layout.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "kernels/checksum.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/slot_table.h"

namespace foretoken::kernels {
namespace {

std::uint64_t stored_checksum(const SequenceKv& kv, int layer, int head, int block) {
  std::uint64_t value = 0;
  std::memcpy(&value, arena_checksum(kv, layer, head, block), sizeof value);
  return value;
}
void store_checksum(const SequenceKv& kv, int layer, int head, int block, std::uint64_t value) {
  std::memcpy(arena_checksum(kv, layer, head, block), &value, sizeof value);
}

void count_mismatch(const SequenceKv& kv) {
  std::atomic_ref<std::uint32_t>(*kv.mismatches).fetch_add(1, std::memory_order_relaxed);
}

// Arena -> `to`, verified. False: the block is not there or not what was written.
bool read_block(const SequenceKv& kv, int layer, int head, int block, std::byte* to) {
  const std::byte* from = arena_block(kv, layer, head, block);
  if (from == nullptr) return false;
  return copy_with_checksum(to, from, kv.shape.block_bytes(), layer, block) ==
         stored_checksum(kv, layer, head, block);
}

// `from` -> arena, with its checksum. An outsized sequence may lack the frame: its owner knows.
void write_block(const SequenceKv& kv, int layer, int head, int block, const std::byte* from) {
  std::byte* to = arena_block(kv, layer, head, block);
  if (to == nullptr && kv.runs != nullptr) return;
  FT_CHECK(to != nullptr, layer, head, block);
  store_checksum(kv, layer, head, block,
                 copy_with_checksum(to, from, kv.shape.block_bytes(), layer, block));
}

// ---- pack and unpack: scratch rows <-> blocks -------------------------------------------------

// A scratch tensor [num_kv_heads, scratch_tokens, head_dim]: address of a block's first row.
template <typename Byte>
Byte* scratch_rows(Byte* base, int scratch_tokens, int head, int block, std::size_t row_bytes) {
  const auto row = static_cast<std::size_t>(head) * static_cast<std::size_t>(scratch_tokens) +
                   static_cast<std::size_t>(block) * kBlockTokens;
  return base + row * row_bytes;
}

// One half (K or V) of a block from `tokens` rows; the rest is zero, so that the block's checksum
// is defined.
void fill_half(std::byte* half, const std::byte* rows, int tokens, std::size_t row_bytes) {
  const std::size_t filled = static_cast<std::size_t>(tokens) * row_bytes;
  std::memcpy(half, rows, filled);
  std::memset(half + filled, 0, kBlockTokens * row_bytes - filled);
}

void pack(const PackBlocksArgs& args) {
  const SequenceKv& kv = *args.sequence;
  FT_CHECK(args.num_kv_heads == kv.shape.num_kv_heads, args.num_kv_heads, kv.shape.num_kv_heads);
  FT_CHECK(args.first_block + args.num_blocks <= kv.max_blocks, args.first_block, args.num_blocks);
  const std::size_t row_bytes = kv.shape.block_bytes() / (2 * kBlockTokens);
  std::vector<std::byte> packed(kv.shape.block_bytes());
  for (int head = 0; head < args.num_kv_heads; ++head) {
    for (int block = args.first_block; block < args.first_block + args.num_blocks; ++block) {
      const int tokens = std::min(kBlockTokens, args.num_tokens - block * kBlockTokens);
      if (tokens <= 0) break;
      const int slot = slot_of_block(kv, args.layer, head, block);
      if (slot == kAbsent && !args.to_arena) continue;
      fill_half(packed.data(),
                scratch_rows(static_cast<const std::byte*>(args.k), args.scratch_tokens, head,
                             block, row_bytes),
                tokens, row_bytes);
      fill_half(packed.data() + packed.size() / 2,
                scratch_rows(static_cast<const std::byte*>(args.v), args.scratch_tokens, head,
                             block, row_bytes),
                tokens, row_bytes);
      if (args.to_arena) write_block(kv, args.layer, head, block, packed.data());
      if (slot == kAbsent) continue;
      std::memcpy(slot_bytes(kv, args.layer, head, slot), packed.data(), packed.size());
    }
  }
}

void unpack(const UnpackBlocksArgs& args) {
  const SequenceKv& kv = *args.sequence;
  FT_CHECK(args.num_kv_heads == kv.shape.num_kv_heads, args.num_kv_heads, kv.shape.num_kv_heads);
  FT_CHECK((args.first_block + args.num_blocks) * kBlockTokens <= args.scratch_tokens);
  const std::size_t row_bytes = kv.shape.block_bytes() / (2 * kBlockTokens);
  std::vector<std::byte> packed(kv.shape.block_bytes());
  for (int head = 0; head < args.num_kv_heads; ++head) {
    for (int block = args.first_block; block < args.first_block + args.num_blocks; ++block) {
      if (!read_block(kv, args.layer, head, block, packed.data())) {
        count_mismatch(kv);
        std::ranges::fill(packed, std::byte{0});  // wrong bytes go no further
      }
      const std::size_t half = packed.size() / 2;
      std::memcpy(scratch_rows(static_cast<std::byte*>(args.k), args.scratch_tokens, head, block,
                               row_bytes),
                  packed.data(), half);
      std::memcpy(scratch_rows(static_cast<std::byte*>(args.v), args.scratch_tokens, head, block,
                               row_bytes),
                  packed.data() + half, half);
    }
  }
}

// ---- decode -----------------------------------------------------------------------------------

// The block that the step just filled, of one layer and head. Absent happens only after its bytes
// failed their check: then what the arena holds of it is older than the sequence, and must not
// pass for it.
void write_filled_block(const SequenceKv& kv, int layer, int head, int block) {
  const int slot = slot_of_block(kv, layer, head, block);
  if (slot != kAbsent) {
    write_block(kv, layer, head, block, slot_bytes(kv, layer, head, slot));
    return;
  }
  FT_CHECK(arena_checksum(kv, layer, head, block) != nullptr, layer, head, block);
  store_checksum(kv, layer, head, block, ~stored_checksum(kv, layer, head, block));
}

void write_filled_blocks(const SequenceKv& kv) {
  if (*kv.length == 0 || *kv.length % kBlockTokens != 0) return;
  const int block = *kv.length / kBlockTokens - 1;
  for (int layer = 0; layer < kv.shape.num_layers; ++layer) {
    for (int head = 0; head < kv.shape.num_kv_heads; ++head) {
      write_filled_block(kv, layer, head, block);
    }
  }
}

void gather_head(const SequenceKv& kv, const FetchList& fetches, int layer, int head) {
  const std::size_t row = head_index(kv, layer, head);
  const FetchEntry* entries = fetches.entries + row * static_cast<std::size_t>(fetches.max_entries);
  for (int i = 0; i < fetches.counts[row]; ++i) {
    const auto [block, slot] = entries[i];
    std::byte* to = slot_bytes(kv, layer, head, slot);
    if (read_block(kv, layer, head, block, to)) continue;
    const bool is_late = kv.runs != nullptr && arena_block(kv, layer, head, block) == nullptr;
    if (!is_late) count_mismatch(kv);
    if (block == *kv.length / kBlockTokens) {
      std::memset(to, 0, kv.shape.block_bytes());
      continue;
    }
    slot_of_block(kv, layer, head, block) = kAbsent;
    block_in_slot(kv, layer, head, slot) = kAbsent;
  }
}

}  // namespace

void CpuDevice::pack_blocks(const PackBlocksArgs& args, Stream& stream) {
  enqueue(stream, [args] { pack(args); });
}

void CpuDevice::unpack_blocks(const UnpackBlocksArgs& args, Stream& stream) {
  enqueue(stream, [args] { unpack(args); });
}

void CpuDevice::write_through(const WriteThroughArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int row = 0; row < args.rows; ++row) {
      const SequenceKv& kv = args.sequences[row];
      if (args.to_slabs || kv.runs != nullptr) write_filled_blocks(kv);
    }
  });
}

void CpuDevice::advance(const AdvanceArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int row = 0; row < args.rows; ++row) ++*args.sequences[row].length;
  });
}

void CpuDevice::gather(const GatherArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int layer = args.layer; layer < args.layer + args.num_layers; ++layer) {
      for (int row = 0; row < args.rows; ++row) {
        const SequenceKv& kv = args.sequences[row];
        for (int head = 0; head < kv.shape.num_kv_heads; ++head) {
          gather_head(kv, args.fetches[row], layer, head);
        }
      }
    }
  });
}

}  // namespace foretoken::kernels
