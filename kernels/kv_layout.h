// How KV lies in memory: what the store, the worker and the device's ops agree on.
//
//   block    [2 (K, V), 16, head_dim] in the KV type: one layer, one KV head, 16 tokens
//   run      the 16 blocks of one layer inside a slab, contiguous
//   slab     [num_layers, 16, block] of one segment and one KV head, then the checksums
//            [num_layers, 16] uint64, then padding to 4 KiB
//   slots    [num_layers, num_kv_heads, num_slots, block] device memory of one sequence
//   maxima   [num_layers, query heads, num_slots] floats beside them: what attention found there
//   frame    a run's place in the arena, of a sequence that is larger than it (outsized); a run
//            without one is on NVMe
//
// Plain structs, read by device code: no constructors, no ownership.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/ids.h"

namespace foretoken::kernels {

inline constexpr std::int32_t kAbsent = -1;  // in device tables only: no slot, or no block

enum class DataType { kFp32, kFp16, kBf16 };
constexpr std::size_t bytes_of(DataType type) { return type == DataType::kFp32 ? 4 : 2; }

struct KvShape {
  int num_layers = 0;
  int num_kv_heads = 0;  // of this rank
  int head_dim = 0;
  DataType kv_type = DataType::kFp16;  // kFp16 or kBf16: the model's; fp32 models store bf16

  constexpr std::size_t element_bytes() const { return bytes_of(kv_type); }
  constexpr std::size_t block_bytes() const {
    return std::size_t{2} * kBlockTokens * static_cast<std::size_t>(head_dim) * element_bytes();
  }
  constexpr std::size_t run_bytes() const { return block_bytes() * kSegmentBlocks; }
  constexpr std::size_t slab_payload_bytes() const {
    return run_bytes() * static_cast<std::size_t>(num_layers);
  }
  constexpr std::size_t slab_bytes() const {
    const std::size_t checksums =
        std::size_t{8} * kSegmentBlocks * static_cast<std::size_t>(num_layers);
    return (slab_payload_bytes() + checksums + 4095) / 4096 * 4096;
  }
};

// One sequence's KV on this rank, as ops see it. All pointers are device pointers; slabs are
// device addresses of arena memory (host memory on both kinds of device).
struct SequenceKv {
  std::byte* slots;             // [num_layers, num_kv_heads, num_slots, block]
  std::int32_t* block_to_slot;  // [num_layers, num_kv_heads, max_blocks] kAbsent: not resident
  std::int32_t* slot_to_block;  // [num_layers, num_kv_heads, num_slots] kAbsent: empty
  std::byte* const* slabs;      // [num_kv_heads, max_segments]
  std::int32_t* length;         // tokens whose KV is stored in all layers; the step's token is next
  std::int32_t num_slots;       // resident blocks lie in slots [0, min(num_slots, blocks so far))
  std::int32_t max_blocks;
  std::int32_t max_segments;
  KvShape shape;
  TokenId* tokens = nullptr;  // [max_blocks * 16] prompt, then output
  // Of an outsized sequence, in place of slabs: pinned host memory, which the host changes for runs
  // that no op in flight touches. Null: the sequence has whole slabs.
  std::byte* const* runs = nullptr;    // [num_layers, num_kv_heads, max_segments] null: on NVMe
  std::uint64_t* checksums = nullptr;  // [num_layers, num_kv_heads, max_segments, 16]
  // [num_layers, num_kv_heads, max_blocks, sketch] of complete blocks (kernels/key_sketch.h); null:
  // none are kept.
  std::byte* sketches = nullptr;
  std::uint32_t* mismatches = nullptr;  // [1] reads of its arena blocks that failed their check
  // [num_layers, query heads, num_slots] the last step's block maxima; null: nobody observes them.
  float* block_max = nullptr;
};

constexpr std::size_t slot_offset(const SequenceKv& kv, int layer, int head, int slot) {
  return ((static_cast<std::size_t>(layer) * static_cast<std::size_t>(kv.shape.num_kv_heads) +
           static_cast<std::size_t>(head)) *
              static_cast<std::size_t>(kv.num_slots) +
          static_cast<std::size_t>(slot)) *
         kv.shape.block_bytes();
}
// The block maxima of one of num_heads query heads: [num_slots].
constexpr float* block_max_of(const SequenceKv& kv, int layer, int num_heads, int head) {
  return kv.block_max + (static_cast<std::size_t>(layer) * static_cast<std::size_t>(num_heads) +
                         static_cast<std::size_t>(head)) *
                            static_cast<std::size_t>(kv.num_slots);
}
// Offset of a block in its slab, and of its checksum.
constexpr std::size_t slab_block_offset(const KvShape& shape, int layer, int block) {
  return static_cast<std::size_t>(layer) * shape.run_bytes() +
         static_cast<std::size_t>(block % kSegmentBlocks) * shape.block_bytes();
}
constexpr std::size_t slab_checksum_offset(const KvShape& shape, int layer, int block) {
  return shape.slab_payload_bytes() +
         std::size_t{8} * static_cast<std::size_t>(layer * kSegmentBlocks + block % kSegmentBlocks);
}

// Where a block lies in the arena, and its checksum. Null: it isn't in host memory.
constexpr std::size_t run_index(const SequenceKv& kv, int layer, int head, int block) {
  return (static_cast<std::size_t>(layer) * static_cast<std::size_t>(kv.shape.num_kv_heads) +
          static_cast<std::size_t>(head)) *
             static_cast<std::size_t>(kv.max_segments) +
         static_cast<std::size_t>(block / kSegmentBlocks);
}
constexpr std::byte* arena_block(const SequenceKv& kv, int layer, int head, int block) {
  if (kv.runs != nullptr) {
    std::byte* run = kv.runs[run_index(kv, layer, head, block)];
    return run == nullptr ? nullptr : run + slab_block_offset(kv.shape, 0, block);
  }
  std::byte* slab = kv.slabs[run_index(kv, 0, head, block)];
  return slab == nullptr ? nullptr : slab + slab_block_offset(kv.shape, layer, block);
}
constexpr void* arena_checksum(const SequenceKv& kv, int layer, int head, int block) {
  if (kv.runs != nullptr) {
    return kv.checksums + run_index(kv, layer, head, block) * kSegmentBlocks +
           block % kSegmentBlocks;
  }
  std::byte* slab = kv.slabs[run_index(kv, 0, head, block)];
  return slab == nullptr ? nullptr : slab + slab_checksum_offset(kv.shape, layer, block);
}

// The checksum of a block: each 64-bit word is mixed with its place by a bijection, and the sum is
// mixed with the block's place in its slab. One changed word is always seen; swapped words, swapped
// blocks of a slab and torn writes with probability 1 - 2^-64. Cheap on a GPU: no order, no carry.
constexpr std::uint64_t mix_word(std::uint64_t word, std::uint64_t index) {
  std::uint64_t x = word + (index + 1) * 0x9E3779B97F4A7C15ULL;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93ULL;
  x ^= x >> 29;
  return x;
}
constexpr std::uint64_t finish_checksum(std::uint64_t sum, int layer, int block) {
  return mix_word(sum, static_cast<std::uint64_t>(layer) * kSegmentBlocks +
                           static_cast<std::uint64_t>(block % kSegmentBlocks) + (1ULL << 32));
}

// What the next step shall have resident beside sink and local: a policy's choice.
struct Selection {
  std::int32_t* blocks;  // [num_layers, num_kv_heads, max_selected], sorted within a head
  std::int32_t* counts;  // [num_layers, num_kv_heads]
  std::int32_t max_selected;
  // How near each segment is to being wanted, by the predictor's scores: of its blocks that were
  // not chosen, the highest score over the lowest that was; 0 where there are no scores. Null: not
  // wanted.
  float* segment_scores = nullptr;  // [num_layers, num_kv_heads, max_segments] pinned host memory
  std::int32_t max_segments = 0;
};

struct FetchEntry {
  std::int32_t block;
  std::int32_t slot;
};
// What the resolver found absent: [num_layers, num_kv_heads, max_entries].
struct FetchList {
  FetchEntry* entries;
  std::int32_t* counts;  // [num_layers, num_kv_heads]
  std::int32_t max_entries;
  std::uint64_t* totals =
      nullptr;  // [2] blocks chosen by the policy, and fetched, so far; null: not wanted
};

// The attention history of one sequence on this rank: for every layer and map a ring of rows.
inline constexpr int kHistoryRows = 64;  // the CNN's window
inline constexpr int kRingRows = 68;     // 64, the leaving row and its neighbours, and padding
struct HistoryState {
  std::byte* rows;            // [num_layers, num_maps, kRingRows, pitch] of the history type
  std::byte* stream;          // [num_layers, num_maps, predictor_state_bytes]
  std::int64_t* num_rows;     // [num_layers] rows appended so far; row r lies at r % kRingRows
  std::int32_t* num_columns;  // [num_layers] columns of the newest row
  std::uint32_t* fallbacks;   // [1] maps without finite scores so far: they chose the latest blocks
  std::int32_t num_layers;
  std::int32_t num_kv_heads;
  std::int32_t maps_per_kv_head;  // 1, or the rank's query heads of a KV head
  std::int32_t max_columns;
  std::int32_t pitch;         // max_columns rounded up to 8
  std::int32_t top_k;         // selected a map
  std::int32_t max_per_head;  // selected a KV head after the union: <= Selection::max_selected
  std::int32_t type;          // HistoryType
};

}  // namespace foretoken::kernels
