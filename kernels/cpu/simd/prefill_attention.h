// Causal attention of a tile of query rows over the keys of one KV head: flash attention
// (arXiv 2205.14135, algorithm 1), fp32 throughout.
//
// A tile's rows are the query heads of a KV head's group for some consecutive tokens, so all of
// them share the keys and values that were converted to float. Key tiles start at multiples of
// kKeyTile whatever the query tile: a row's result depends neither on the tile nor on the chunk
// that it was computed in.
#pragma once

#include <cstddef>

#include "kernels/device.h"

namespace foretoken::kernels::simd {

inline constexpr int kKeyTile = 128;  // keys converted at a time; a multiple of 16 * 8

// Query tokens of a tile: about 192 rows, so that converting keys and values costs little.
int query_tile_tokens(int group);
// Floats of scratch that a tile needs.
std::size_t prefill_scratch(int group, int head_dim);

// Tokens [first, first + count) of args.rows, KV head kv_head; count <= query_tile_tokens.
void prefill_attention_tile(const PrefillAttentionArgs& args, int kv_head, int first, int count,
                            float* scratch);

// The block maxima of the same rows over the key tile that begins at `key`, a multiple of kKeyTile
// before args.begin + args.rows.
void prefill_block_max_tile(const PrefillBlockMaxArgs& args, int kv_head, int first, int count,
                            int key, float* scratch);

}  // namespace foretoken::kernels::simd
