// Making the sketches of blocks' keys. Reading them: attention.cc.
#include "kernels/key_sketch.h"

#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/half.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/slot_table.h"

namespace foretoken::kernels {
namespace {

// Of 16 keys [16, head_dim], one behind the other.
void sketch_keys(const KvShape& shape, const std::byte* keys, std::byte* sketch) {
  const int dims = shape.head_dim;
  std::vector<float> values(static_cast<std::size_t>(kBlockTokens * dims));
  simd::to_float(keys, shape.kv_type, kBlockTokens * dims, values.data());
  auto* codes = reinterpret_cast<std::uint32_t*>(sketch);
  std::byte* lows = sketch + sketch_low_offset(dims);
  auto* steps = reinterpret_cast<std::uint8_t*>(sketch + sketch_step_offset(dims));
  for (int dim = 0; dim < dims; ++dim) {
    const auto key = [&](int token) {
      return values[static_cast<std::size_t>(token * dims + dim)];
    };
    int least = 0;
    float high = key(0);
    for (int token = 1; token < kBlockTokens; ++token) {
      if (key(token) < key(least)) least = token;
      if (key(token) > high) high = key(token);
    }
    const float low = key(least);
    steps[dim] = step_from_half(half_from_float(exact_step(low, high)));
    const float step = float_from_half(half_from_step(steps[dim]));
    std::memcpy(lows + 2 * dim, keys + 2 * (least * dims + dim), 2);
    codes[dim] = 0;
    for (int token = 0; token < kBlockTokens; ++token) {
      codes[dim] |= level_of(key(token), low, step) << 2 * token;
    }
  }
}

// A block that failed its check has no slot, and keeps a sketch of zeros.
void sketch_filled_block(const SequenceKv& kv) {
  FT_CHECK(kv.sketches != nullptr);
  if (*kv.length == 0 || *kv.length % kBlockTokens != 0) return;
  const int block = *kv.length / kBlockTokens - 1;
  for (int layer = 0; layer < kv.shape.num_layers; ++layer) {
    for (int head = 0; head < kv.shape.num_kv_heads; ++head) {
      const int slot = slot_of_block(kv, layer, head, block);
      if (slot == kAbsent) continue;
      sketch_keys(kv.shape, slot_bytes(kv, layer, head, slot),
                  kv.sketches + sketch_offset(kv, layer, head, block));
    }
  }
}

}  // namespace

void CpuDevice::sketch_blocks(const SketchBlocksArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    const SequenceKv& kv = *args.sequence;
    FT_CHECK(kv.sketches != nullptr && args.num_kv_heads == kv.shape.num_kv_heads,
             args.num_kv_heads);
    FT_CHECK(args.num_blocks * kBlockTokens <= args.scratch_tokens, args.num_blocks);
    const std::size_t row_bytes = kv.shape.block_bytes() / (2 * kBlockTokens);
    pool_.parallel_for(args.num_kv_heads * args.num_blocks, [&](int task, int) {
      const int head = task / args.num_blocks;
      const int block = task % args.num_blocks;
      const std::ptrdiff_t row =
          static_cast<std::ptrdiff_t>(head) * args.scratch_tokens + block * kBlockTokens;
      sketch_keys(kv.shape,
                  static_cast<const std::byte*>(args.k) + static_cast<std::size_t>(row) * row_bytes,
                  kv.sketches + sketch_offset(kv, args.layer, head, block));
    });
  });
}

void CpuDevice::sketch_filled(const SketchFilledArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int row = 0; row < args.rows; ++row) sketch_filled_block(args.sequences[row]);
  });
}

}  // namespace foretoken::kernels
