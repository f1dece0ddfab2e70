// embed, rms_norm, swiglu and rope of the CPU device: splits rows among the pool.
#include "kernels/cpu/simd/elementwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/slot_table.h"

namespace foretoken::kernels {
namespace {

// Elements of a task: less is not worth waking a thread for. Guessed.
constexpr int kTaskElements = 16384;

// Calls body(row) for all rows, several rows a task.
template <typename Body>
void for_each_row(ThreadPool& pool, int rows, int columns, const Body& body) {
  const int step = std::max(1, kTaskElements / std::max(1, columns));
  pool.parallel_for((rows + step - 1) / step, [&](int task, int) {
    const int end = std::min(rows, (task + 1) * step);
    for (int row = task * step; row < end; ++row) body(row);
  });
}

std::size_t offset(int row, int columns) {
  return static_cast<std::size_t>(row) * static_cast<std::size_t>(columns);
}

TokenId token_of(const EmbedArgs& args, int row) {
  if (args.tokens != nullptr) return args.tokens[row];
  const SequenceKv& kv = args.sequences[row];
  return kv.tokens[*kv.length];
}

// Normed and rotated heads of one row; k and v go where the caller says.
class RopeRow {
 public:
  RopeRow(const RopeArgs& args, int row, int position)
      : args_(args),
        qkv_(static_cast<const float*>(args.qkv) +
             offset(row, (args.num_heads + 2 * args.num_kv_heads) * args.head_dim)),
        q_out_(static_cast<float*>(args.q_out) + offset(row, args.num_heads * args.head_dim)) {
    const auto half = static_cast<std::size_t>(args.head_dim / 2);
    cos_.resize(half);
    sin_.resize(half);
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * args.inv_freq[i];
      cos_[i] = std::cos(angle) * args.scale;
      sin_[i] = std::sin(angle) * args.scale;
    }
  }

  void write_q() {
    for (int h = 0; h < args_.num_heads; ++h) {
      turn(qkv_ + offset(h, args_.head_dim), args_.q_norm, q_out_ + offset(h, args_.head_dim));
    }
  }
  void write_k(int head, DataType type, void* to) {
    k_.resize(static_cast<std::size_t>(args_.head_dim));
    turn(qkv_ + offset(args_.num_heads + head, args_.head_dim), args_.k_norm, k_.data());
    simd::from_float(k_.data(), args_.head_dim, type, to);
  }
  void write_v(int head, DataType type, void* to) const {
    simd::from_float(qkv_ + offset(args_.num_heads + args_.num_kv_heads + head, args_.head_dim),
                     args_.head_dim, type, to);
  }

 private:
  void turn(const float* x, const float* norm, float* out) {
    if (norm != nullptr) {
      simd::rms_norm(x, norm, args_.norm_eps, args_.head_dim, out);
      x = out;
    }
    simd::rotate(x, cos_.data(), sin_.data(), args_.head_dim, out);
  }

  const RopeArgs& args_;
  const float* qkv_;
  float* q_out_;
  std::vector<float> cos_;
  std::vector<float> sin_;
  std::vector<float> k_;
};

}  // namespace

void CpuDevice::embed(const EmbedArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    const std::size_t row_bytes = bytes_of(args.table_type) * static_cast<std::size_t>(args.hidden);
    for_each_row(pool_, args.num_tokens, args.hidden, [&](int row) {
      float* out = static_cast<float*>(args.out) + offset(row, args.hidden);
      const int table_row = token_of(args, row) - args.first_token;
      if (table_row < 0 || table_row >= args.table_tokens) {
        std::fill_n(out, args.hidden, 0.0F);
      } else {
        const auto* from = static_cast<const std::byte*>(args.table) +
                           static_cast<std::size_t>(table_row) * row_bytes;
        simd::to_float(from, args.table_type, args.hidden, out);
      }
    });
  });
}

void CpuDevice::rms_norm(const RmsNormArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    for_each_row(pool_, args.rows, args.columns, [&](int row) {
      simd::rms_norm(static_cast<const float*>(args.x) + offset(row, args.columns), args.weight,
                     args.eps, args.columns,
                     static_cast<float*>(args.out) + offset(row, args.columns));
    });
  });
}

void CpuDevice::swiglu(const SwiGluArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    for_each_row(pool_, args.rows, args.columns, [&](int row) {
      const float* gate = static_cast<const float*>(args.gate_up) + offset(row, 2 * args.columns);
      simd::swiglu(gate, gate + args.columns, args.columns,
                   static_cast<float*>(args.out) + offset(row, args.columns));
    });
  });
}

void CpuDevice::rope_prefill(const RopePrefillArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    FT_CHECK(args.begin + args.rows <= args.scratch_tokens, args.begin, args.rows,
             args.scratch_tokens);
    const std::size_t row_bytes = bytes_of(args.kv_type) * static_cast<std::size_t>(args.head_dim);
    const int columns = (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
    for_each_row(pool_, args.rows, columns, [&](int row) {
      RopeRow rope(args, row, args.begin + row);
      rope.write_q();
      for (int head = 0; head < args.num_kv_heads; ++head) {
        const std::size_t at =
            (offset(head, args.scratch_tokens) + static_cast<std::size_t>(args.begin + row)) *
            row_bytes;
        rope.write_k(head, args.kv_type, static_cast<std::byte*>(args.k_out) + at);
        rope.write_v(head, args.kv_type, static_cast<std::byte*>(args.v_out) + at);
      }
    });
  });
}

void CpuDevice::rope_decode(const RopeDecodeArgs& args, Stream& stream) {
  enqueue(stream, [this, args] {
    const int columns = (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
    for_each_row(pool_, args.rows, columns, [&](int row) {
      const SequenceKv& kv = args.sequences[row];
      const int position = *kv.length;
      RopeRow rope(args, row, position);
      rope.write_q();
      const std::size_t row_bytes = kv.shape.block_bytes() / (2 * kBlockTokens);
      for (int head = 0; head < args.num_kv_heads; ++head) {
        const int slot = slot_of_block(kv, args.layer, head, position / kBlockTokens);
        FT_CHECK(slot != kAbsent, row, args.layer, head, position);
        std::byte* k = slot_bytes(kv, args.layer, head, slot) +
                       static_cast<std::size_t>(position % kBlockTokens) * row_bytes;
        rope.write_k(head, kv.shape.kv_type, k);
        rope.write_v(head, kv.shape.kv_type, k + kBlockTokens * row_bytes);
      }
    });
  });
}

}  // namespace foretoken::kernels
