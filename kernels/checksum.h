// The checksum of a KV block (kv_layout.h defines it: mix_word, finish_checksum), for host code.
// 8-byte words, read in any order; bytes of a block are a multiple of 8.
//
// Thread-safe. Example: tests/kernels/kv_ops_test.cc
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_layout.h"

namespace foretoken::kernels {

// Checksum of `block` ([0, 16) of its run, or the sequence's: only block % 16 counts) of `layer`.
std::uint64_t block_checksum(const std::byte* data, std::size_t bytes, int layer, int block);

// The same while copying data to `to`: the copy and its proof in one pass over memory.
std::uint64_t copy_with_checksum(std::byte* to, const std::byte* data, std::size_t bytes, int layer,
                                 int block);

}  // namespace foretoken::kernels
