// Attention of the CPU device: splits it among the pool and merges the parts. Splits and orders of
// sums are fixed by the shapes, never by the number of threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "common/check.h"
#include "kernels/checksum.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/simd/decode_attention.h"
#include "kernels/cpu/simd/key_sketch.h"
#include "kernels/cpu/simd/prefill_attention.h"
#include "kernels/cpu/slot_table.h"
#include "kernels/key_sketch.h"

namespace foretoken::kernels {
namespace {

using simd::kPartBlocks;
using simd::KvBlock;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int divide_up(int a, int b) { return (a + b - 1) / b; }

void check_shape(int num_heads, int num_kv_heads, int head_dim, DataType kv_type) {
  FT_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0, num_heads, num_kv_heads);
  FT_CHECK(head_dim > 0 && head_dim % 32 == 0, head_dim);
  FT_CHECK(kv_type != DataType::kFp32);
}

// One block of the sequence and KV head, or nothing to attend to.
struct FoundBlock {
  const std::byte* data = nullptr;
  int block = 0;
};

// The columns of a decode step's attention: slots of the device, or blocks of the sequence. find()
// may make a block in `room`, of room_bytes(). block_max() is where a query head's maxima go,
// [width()]; null: they are not wanted.
class SlotColumns {
 public:
  explicit SlotColumns(const DecodeAttentionArgs& args) : args_(args) {}
  int count(const SequenceKv& kv) const {
    return std::min(kv.num_slots, *kv.length / kBlockTokens + 1);
  }
  static std::size_t room_bytes(const KvShape&) { return 0; }
  FoundBlock find(const SequenceKv& kv, int head, int slot, std::byte*) const {
    const int block = block_in_slot(kv, args_.layer, head, slot);
    if (block == kAbsent) return {};
    return {slot_bytes(kv, args_.layer, head, slot), block};
  }
  static int width(const SequenceKv& kv) { return kv.num_slots; }
  float* block_max(const SequenceKv& kv, int, int head) const {
    if (kv.block_max == nullptr) return nullptr;
    return block_max_of(kv, args_.layer, args_.num_heads, head);
  }

 private:
  const DecodeAttentionArgs& args_;
};

// All blocks of the sequence, wherever they are.
class AllColumns {
 public:
  explicit AllColumns(const DecodeAttentionArgs& args) : args_(args) {}
  static int count(const SequenceKv& kv) { return *kv.length / kBlockTokens + 1; }
  int width(const SequenceKv&) const { return args_.pitch; }
  float* block_max(const SequenceKv&, int row, int head) const {
    if (args_.block_max == nullptr) return nullptr;
    return args_.block_max + (std::ptrdiff_t{row} * args_.num_heads + head) * args_.pitch;
  }

 protected:
  const DecodeAttentionArgs& args_;
};

class BlockColumns : public AllColumns {
 public:
  using AllColumns::AllColumns;
  static std::size_t room_bytes(const KvShape&) { return 0; }
  FoundBlock find(const SequenceKv& kv, int head, int block, std::byte*) const {
    const int slot = slot_of_block(kv, args_.layer, head, block);
    if (slot != kAbsent) return {slot_bytes(kv, args_.layer, head, slot), block};
    return {from_arena(kv, head, block), block};
  }

 private:
  const std::byte* from_arena(const SequenceKv& kv, int head, int block) const {
    const int layer = args_.layer;
    const std::byte* data = arena_block(kv, layer, head, block);
    if (data != nullptr) {
      std::uint64_t expected = 0;
      std::memcpy(&expected, arena_checksum(kv, layer, head, block), sizeof expected);
      if (block_checksum(data, kv.shape.block_bytes(), layer, block) == expected) return data;
    }
    std::atomic_ref(*kv.mismatches).fetch_add(1, std::memory_order_relaxed);
    return nullptr;
  }
};

// ... of keys alone: those without a slot as their sketches give them.
class SketchColumns : public AllColumns {
 public:
  using AllColumns::AllColumns;
  static std::size_t room_bytes(const KvShape& shape) { return shape.block_bytes() / 2; }
  FoundBlock find(const SequenceKv& kv, int head, int block, std::byte* room) const {
    const int slot = slot_of_block(kv, args_.layer, head, block);
    if (slot != kAbsent) return {slot_bytes(kv, args_.layer, head, slot), block};
    FT_CHECK(kv.sketches != nullptr, args_.layer, head, block);
    simd::restore_keys(kv.sketches + sketch_offset(kv, args_.layer, head, block), kv.shape.head_dim,
                       kv.shape.kv_type, room);
    return {room, block};
  }
};

// A decode step's attention, split into parts of kPartBlocks columns of one row and KV head.
template <typename Columns>
class DecodeAttention {
 public:
  DecodeAttention(const DecodeAttentionArgs& args, const Columns& columns)
      : args_(args), columns_(columns), group_(args.num_heads / args.num_kv_heads) {
    for (int row = 0; row < args.rows; ++row) {
      const SequenceKv& kv = args.sequences[row];
      check_shape(args.num_heads, args.num_kv_heads, args.head_dim, kv.shape.kv_type);
      check_open_block(kv);
      FT_CHECK(columns.block_max(kv, row, 0) == nullptr || columns.count(kv) <= columns.width(kv),
               columns.count(kv), columns.width(kv));
      first_part_.push_back(num_parts());
      const int parts = divide_up(columns.count(kv), kPartBlocks);
      for (int part = 0; part < parts * args.num_kv_heads; ++part) {
        parts_.push_back({row, part / parts, part % parts * kPartBlocks});
      }
    }
    first_part_.push_back(num_parts());
    results_.resize(parts_.size() * static_cast<std::size_t>(group_) * head_floats());
  }

  int num_parts() const { return static_cast<int>(parts_.size()); }

  void attend(int index) {
    const Part& part = parts_[static_cast<std::size_t>(index)];
    const SequenceKv& kv = args_.sequences[part.row];
    const int end = std::min(part.column + kPartBlocks, columns_.count(kv));
    const int first_head = part.kv_head * group_;
    const int pitch = columns_.width(kv);
    float* block_max = columns_.block_max(kv, part.row, first_head);
    const std::size_t room = Columns::room_bytes(kv.shape);
    std::vector<std::byte> made(room * kPartBlocks);
    std::array<KvBlock, kPartBlocks> blocks;
    std::size_t num_blocks = 0;
    for (int column = part.column; column < end; ++column) {
      const FoundBlock found =
          columns_.find(kv, part.kv_head, column, made.data() + room * num_blocks);
      if (found.data != nullptr) {
        const int tokens = std::min(kBlockTokens, *kv.length + 1 - found.block * kBlockTokens);
        blocks[num_blocks++] = {found.data, tokens, column};
      } else if (block_max != nullptr) {
        for (int h = 0; h < group_; ++h) block_max[h * pitch + column] = kMinusInfinity;
      }
    }
    const float* q =
        static_cast<const float*>(args_.q) + offset(part.row, first_head, args_.head_dim);
    simd::attend_part({q, group_, args_.head_dim, kv.shape.kv_type, args_.scale, block_max, pitch},
                      {blocks.data(), num_blocks}, result(index));
  }

  // Merges the parts of one (row, query head).
  void merge(int row, int head) const {
    const int per_head = (first_part_[static_cast<std::size_t>(row) + 1] -
                          first_part_[static_cast<std::size_t>(row)]) /
                         args_.num_kv_heads;
    const int first = first_part_[static_cast<std::size_t>(row)] + head / group_ * per_head;
    simd::DecodePartResult parts = result(first);
    float* out = nullptr;
    if (args_.out != nullptr) {
      out = static_cast<float*>(args_.out) + offset(row, head, args_.head_dim);
      parts.out +=
          static_cast<std::size_t>(head % group_) * static_cast<std::size_t>(args_.head_dim);
    }
    parts.maximum += head % group_;
    parts.sum += head % group_;
    args_.lse[offset(row, head, 1)] = simd::merge_parts(
        parts, static_cast<std::size_t>(group_) * head_floats(), per_head, args_.head_dim, out);
    const SequenceKv& kv = args_.sequences[row];
    float* block_max = columns_.block_max(kv, row, head);
    if (block_max == nullptr) return;
    std::fill(block_max + columns_.count(kv), block_max + columns_.width(kv), kMinusInfinity);
  }

 private:
  struct Part {
    int row;
    int kv_head;
    int column;
  };

  void check_open_block(const SequenceKv& kv) const {
    for (int head = 0; head < args_.num_kv_heads; ++head) {
      const int open = slot_of_block(kv, args_.layer, head, *kv.length / kBlockTokens);
      FT_CHECK(open != kAbsent, args_.layer, head, *kv.length);
    }
  }
  std::size_t offset(int row, int head, int width) const {  // in [rows, num_heads, width]
    return (static_cast<std::size_t>(row) * static_cast<std::size_t>(args_.num_heads) +
            static_cast<std::size_t>(head)) *
           static_cast<std::size_t>(width);
  }
  std::size_t head_floats() const { return static_cast<std::size_t>(args_.head_dim) + 2; }
  simd::DecodePartResult result(int part) const {
    const auto group = static_cast<std::size_t>(group_);
    float* at = const_cast<float*>(results_.data()) +
                static_cast<std::size_t>(part) * group * head_floats();
    return {args_.out == nullptr ? nullptr : at, at + group * (head_floats() - 2),
            at + group * (head_floats() - 1)};
  }

  const DecodeAttentionArgs& args_;
  const Columns& columns_;
  int group_;
  std::vector<Part> parts_;
  std::vector<int> first_part_;  // [rows + 1]
  std::vector<float> results_;   // [parts, out [group, head_dim] | maxima [group] | sums [group]]
};

template <typename Columns>
void run_decode_attention(ThreadPool& pool, const DecodeAttentionArgs& args,
                          const Columns& columns) {
  DecodeAttention<Columns> attention(args, columns);
  pool.parallel_for(attention.num_parts(), [&](int part, int) { attention.attend(part); });
  for (int row = 0; row < args.rows; ++row) {
    for (int head = 0; head < args.num_heads; ++head) attention.merge(row, head);
  }
}

}  // namespace

void CpuDevice::prefill_attention(const PrefillAttentionArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    check_shape(args.num_heads, args.num_kv_heads, args.head_dim, args.kv_type);
    const int group = args.num_heads / args.num_kv_heads;
    const int tile = simd::query_tile_tokens(group);
    const int tiles = divide_up(args.rows, tile);
    std::vector<std::vector<float>> scratch(static_cast<std::size_t>(pool_.num_threads()));
    pool_.parallel_for(tiles * args.num_kv_heads, [&](int task, int thread) {
      auto& memory = scratch[static_cast<std::size_t>(thread)];
      memory.resize(simd::prefill_scratch(group, args.head_dim));
      // The last tile sees the most keys: it goes first, so that threads end together.
      const int first = (tiles - 1 - task / args.num_kv_heads) * tile;
      simd::prefill_attention_tile(args, task % args.num_kv_heads, first,
                                   std::min(tile, args.rows - first), memory.data());
    });
  });
}

void CpuDevice::prefill_block_max(const PrefillBlockMaxArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    check_shape(args.num_heads, args.num_kv_heads, args.head_dim, args.kv_type);
    const int group = args.num_heads / args.num_kv_heads;
    const int tile = simd::query_tile_tokens(group);
    const int blocks = blocks_for(args.begin + args.rows);
    FT_CHECK(blocks <= args.pitch, blocks, args.pitch);
    for (int row = 0; row < args.rows * args.num_heads; ++row) {
      float* block_max = args.block_max + static_cast<std::ptrdiff_t>(row) * args.pitch;
      std::fill(block_max + blocks, block_max + args.pitch, kMinusInfinity);
    }
    const int key_tiles = divide_up(args.begin + args.rows, simd::kKeyTile);
    std::vector<std::vector<float>> scratch(static_cast<std::size_t>(pool_.num_threads()));
    pool_.parallel_for(key_tiles * args.num_kv_heads, [&](int task, int thread) {
      auto& memory = scratch[static_cast<std::size_t>(thread)];
      memory.resize(simd::prefill_scratch(group, args.head_dim));
      for (int first = 0; first < args.rows; first += tile) {
        simd::prefill_block_max_tile(args, task / key_tiles, first,
                                     std::min(tile, args.rows - first),
                                     task % key_tiles * simd::kKeyTile, memory.data());
      }
    });
  });
}

void CpuDevice::decode_attention(const DecodeAttentionArgs& args, Stream& stream) {
  FT_CHECK(args.block_max == nullptr);
  enqueue(stream, [this, args] { run_decode_attention(pool_, args, SlotColumns(args)); });
}

void CpuDevice::streamed_attention(const DecodeAttentionArgs& args, Stream& stream) {
  enqueue(stream, [this, args] { run_decode_attention(pool_, args, BlockColumns(args)); });
}

void CpuDevice::sketched_attention(const DecodeAttentionArgs& args, Stream& stream) {
  FT_CHECK(args.out == nullptr);
  enqueue(stream, [this, args] { run_decode_attention(pool_, args, SketchColumns(args)); });
}

}  // namespace foretoken::kernels
