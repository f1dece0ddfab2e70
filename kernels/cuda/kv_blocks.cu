// Ops that move KV between the prefill scratch, the slots and the arena. A warp moves a block, by
// 16-byte loads and stores; arena memory is pinned host memory, and its checksums are written and
// verified in the same pass. Bound by the host link, so few SMs are enough (docs/measurements.md).
// Even few are too many beside prefill: cuBLAS's products take every SM whole, and one that is
// taken from them makes a product wait. So a prompt's blocks are laid out in device memory, which
// is quick, and leave by the copy engines.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/checksum.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/cuda/warps.cuh"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 8;  // loads of a thread: 16 CTAs have 512 KiB on their way

__device__ int lane_index() { return threadIdx.x % 32; }

// Moves a block of `count` word pairs with the lanes of this warp: store(i, load(i)). Returns the
// sum of its mixed words.
template <typename Load, typename Store>
__device__ std::uint64_t move_block(int count, Load load, Store store) {
  std::uint64_t sum = 0;
  for (int first = lane_index(); first < count; first += 32 * kInFlight) {
    WordPair words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i < count) words[i] = load(first + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i >= count) continue;
      sum += mix_pair(words[i], first + 32 * i);
      store(first + 32 * i, words[i]);
    }
  }
  return warp_sum_words(sum);
}

__device__ int pairs_of(const KvShape& shape) {
  return static_cast<int>(shape.block_bytes() / sizeof(WordPair));
}
__device__ WordPair* slot_pairs(const SequenceKv& kv, int layer, int head, int slot) {
  return reinterpret_cast<WordPair*>(kv.slots + slot_offset(kv, layer, head, slot));
}
// Null: the block is not in host memory.
__device__ WordPair* arena_pairs(const SequenceKv& kv, int layer, int head, int block) {
  return reinterpret_cast<WordPair*>(arena_block(kv, layer, head, block));
}

// Arena -> store(i, pair), by one warp. False: the block is not there or not what was written.
template <typename Store>
__device__ bool read_block(const SequenceKv& kv, int layer, int head, int block, Store store) {
  const WordPair* from = arena_pairs(kv, layer, head, block);
  if (from == nullptr) return false;
  const std::uint64_t expected = *checksum_of(kv, layer, head, block);
  const std::uint64_t sum = move_block(
      pairs_of(kv.shape), [from](int i) { return __ldcs(from + i); }, store);
  return finish_checksum(sum, layer, block) == expected;
}

// ---- pack and unpack: scratch rows <-> blocks -------------------------------------------------

// A scratch tensor [num_kv_heads, scratch_tokens, head_dim]: a block's rows, which are contiguous.
template <typename Pair, typename Void>
__device__ Pair* scratch_pairs(Void* base, int scratch_tokens, int head, int block, int row_pairs) {
  const auto row = static_cast<std::size_t>(head) * scratch_tokens +
                   static_cast<std::size_t>(block) * kBlockTokens;
  return static_cast<Pair*>(base) + row * row_pairs;
}

// What lies past the last token is zero, so that the block's checksum is defined. Where `staged` is
// given, the block goes there instead of to the arena, and its checksum alone to the arena.
__device__ void pack_block(const PackBlocksArgs& args, const SequenceKv& kv, int head, int block,
                           WordPair* staged) {
  const int tokens = min(kBlockTokens, args.num_tokens - block * kBlockTokens);
  const int slot = block_to_slot(kv, args.layer, head)[block];
  if (tokens <= 0 || (!args.to_arena && slot == kAbsent)) return;
  const int half = pairs_of(kv.shape) / 2;
  const int row_pairs = half / kBlockTokens;
  const auto* k =
      scratch_pairs<const WordPair>(args.k, args.scratch_tokens, head, block, row_pairs);
  const auto* v =
      scratch_pairs<const WordPair>(args.v, args.scratch_tokens, head, block, row_pairs);
  const auto load = [=](int i) {
    const WordPair* rows = i < half ? k : v;
    const int at = i < half ? i : i - half;
    return at < tokens * row_pairs ? rows[at] : WordPair{0, 0};
  };
  WordPair* arena = args.to_arena ? arena_pairs(kv, args.layer, head, block) : nullptr;
  require(arena != nullptr || !args.to_arena);
  if (arena != nullptr && staged != nullptr) arena = staged;
  WordPair* device = slot == kAbsent ? nullptr : slot_pairs(kv, args.layer, head, slot);
  const std::uint64_t sum = move_block(2 * half, load, [=](int i, WordPair words) {
    if (arena != nullptr) arena[i] = words;
    if (device != nullptr) device[i] = words;
  });
  if (arena == nullptr || lane_index() != 0) return;
  *checksum_of(kv, args.layer, head, block) = finish_checksum(sum, args.layer, block);
}

// staging: [num_kv_heads, num_blocks, block], or null.
__global__ void __launch_bounds__(kThreads)
    pack_blocks_kernel(PackBlocksArgs args, WordPair* staging) {
  const SequenceKv kv = *args.sequence;
  require(args.num_kv_heads == kv.shape.num_kv_heads);
  require(args.first_block + args.num_blocks <= kv.max_blocks);
  const int items = args.num_kv_heads * args.num_blocks;
  for (int item = warp_index(); item < items; item += num_warps<kWarps>()) {
    pack_block(args, kv, item / args.num_blocks, args.first_block + item % args.num_blocks,
               staging == nullptr ? nullptr
                                  : staging + static_cast<std::size_t>(item) * pairs_of(kv.shape));
  }
}

__device__ void unpack_block(const UnpackBlocksArgs& args, const SequenceKv& kv, int head,
                             int block) {
  const int half = pairs_of(kv.shape) / 2;
  const int row_pairs = half / kBlockTokens;
  auto* k = scratch_pairs<WordPair>(args.k, args.scratch_tokens, head, block, row_pairs);
  auto* v = scratch_pairs<WordPair>(args.v, args.scratch_tokens, head, block, row_pairs);
  const auto store = [=](int i, WordPair words) { (i < half ? k + i : v + (i - half))[0] = words; };
  if (read_block(kv, args.layer, head, block, store)) return;
  if (lane_index() == 0) atomicAdd(kv.mismatches, 1U);
  // Wrong bytes go no further: each lane overwrites what it wrote.
  for (int i = lane_index(); i < 2 * half; i += 32) store(i, WordPair{0, 0});
}

__global__ void __launch_bounds__(kThreads) unpack_blocks_kernel(UnpackBlocksArgs args) {
  const SequenceKv kv = *args.sequence;
  require(args.num_kv_heads == kv.shape.num_kv_heads);
  const int items = args.num_kv_heads * args.num_blocks;
  for (int item = warp_index(); item < items; item += num_warps<kWarps>()) {
    unpack_block(args, kv, item / args.num_blocks, args.first_block + item % args.num_blocks);
  }
}

// ---- decode -----------------------------------------------------------------------------------

// The block that the step just filled, of one layer and head. Absent happens only after its bytes
// failed their check: then what the arena holds of it is older than the sequence, and must not
// pass for it.
__device__ void write_filled_block(const SequenceKv& kv, int layer, int head, int block) {
  WordPair* to = arena_pairs(kv, layer, head, block);
  require(to != nullptr || kv.runs != nullptr);
  if (to == nullptr) return;  // an outsized sequence that lacks the frame: its owner knows
  std::uint64_t* checksum = checksum_of(kv, layer, head, block);
  const int slot = block_to_slot(kv, layer, head)[block];
  if (slot == kAbsent) {
    if (lane_index() == 0) *checksum = ~*checksum;
    return;
  }
  const WordPair* from = slot_pairs(kv, layer, head, slot);
  const std::uint64_t sum = move_block(
      pairs_of(kv.shape), [from](int i) { return from[i]; },
      [to](int i, WordPair words) { to[i] = words; });
  if (lane_index() == 0) *checksum = finish_checksum(sum, layer, block);
}

// Whether the step filled a block that this rank writes.
__device__ bool is_to_write(const WriteThroughArgs& args, const SequenceKv& kv) {
  if (!args.to_slabs && kv.runs == nullptr) return false;
  return *kv.length > 0 && *kv.length % kBlockTokens == 0;
}

// In 15 of 16 steps of a row there is nothing to do: each thread looks at one row.
__global__ void __launch_bounds__(kThreads) write_through_kernel(WriteThroughArgs args) {
  __shared__ int filled[kThreads];
  for (int first = 0; first < args.rows; first += kThreads) {
    const int rows = min(kThreads, args.rows - first);
    const int mine = threadIdx.x;
    filled[mine] = mine < rows && is_to_write(args, args.sequences[first + mine]);
    const bool any = __syncthreads_or(filled[mine]) != 0;
    for (int row = 0; any && row < rows; ++row) {
      if (filled[row] == 0) continue;
      const SequenceKv kv = args.sequences[first + row];
      const int heads = kv.shape.num_kv_heads;
      const int block = *kv.length / kBlockTokens - 1;
      for (int i = warp_index(); i < kv.shape.num_layers * heads; i += num_warps<kWarps>()) {
        write_filled_block(kv, i / heads, i % heads, block);
      }
    }
    __syncthreads();  // `filled` is written again
  }
}

__device__ void gather_entry(const GatherArgs& args, int layer, int row, int head, int index) {
  const SequenceKv& kv = args.sequences[row];
  const FetchList& fetches = args.fetches[row];
  const auto [block, slot] =
      fetches.entries[head_index(kv, layer, head) * fetches.max_entries + index];
  WordPair* to = slot_pairs(kv, layer, head, slot);
  const bool good =
      read_block(kv, layer, head, block, [to](int i, WordPair words) { to[i] = words; });
  if (good) return;
  const bool is_open = block == *kv.length / kBlockTokens;
  for (int i = lane_index(); is_open && i < pairs_of(kv.shape); i += 32) to[i] = WordPair{0, 0};
  if (lane_index() != 0) return;
  const bool is_late = kv.runs != nullptr && arena_pairs(kv, layer, head, block) == nullptr;
  if (!is_late) atomicAdd(kv.mismatches, 1U);
  if (is_open) return;
  block_to_slot(kv, layer, head)[block] = kAbsent;
  slot_to_block(kv, layer, head)[slot] = kAbsent;
}

// The first of ends[0, kThreads), which never fall, that is above `value`.
__device__ int first_above(const int* ends, int value) {
  int low = 0;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (ends[low + width - 1] <= value) low += width;
  }
  return low;
}

// A list's length is known to the device alone: each CTA adds up the lengths of all lists (one for
// each layer, row and head, in this order), and its warps take every num_warps()-th entry.
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherArgs args) {
  __shared__ int ends[kThreads];
  __shared__ int warp_totals[32];
  const int heads = args.sequences[0].shape.num_kv_heads;
  const int lists_a_layer = args.rows * heads;
  const int lists = args.num_layers * lists_a_layer;
  int next = warp_index();
  for (int first = 0; first < lists; first += kThreads) {
    const int list = first + static_cast<int>(threadIdx.x);
    int count = 0;
    if (list < lists) {
      const int layer = args.layer + list / lists_a_layer;
      const int row = list % lists_a_layer / heads;
      count = args.fetches[row].counts[layer * heads + list % heads];
    }
    int total = 0;
    ends[threadIdx.x] = inclusive_sum<kThreads>(count, warp_totals, &total);
    __syncthreads();
    for (; next < total; next += num_warps<kWarps>()) {
      const int found = first_above(ends, next);
      const int index = next - (found == 0 ? 0 : ends[found - 1]);
      const int of = first + found;
      gather_entry(args, args.layer + of / lists_a_layer, of % lists_a_layer / heads, of % heads,
                   index);
    }
    next -= total;
    __syncthreads();  // `ends` is written again
  }
}

int ctas_for(int items, const CudaStream& stream) {
  const int wanted = (items + kWarps - 1) / kWarps;
  return stream.kind() == StreamKind::kCopy ? std::min(wanted, kCopyCtas) : wanted;
}

// Blocks of a head that are staged at a time: 8,192 tokens.
constexpr int kStagedBlocks = 512;

// The layer's run, as the host knows it.
std::byte* host_run(const PackBlocksArgs& args, const KvShape& shape, int head, int segment) {
  const int index = head * args.max_segments + segment;
  std::byte* found = args.host_runs != nullptr ? args.host_runs[index] : args.host_slabs[index];
  FT_CHECK(found != nullptr, args.layer, head, segment);
  return args.host_runs != nullptr ? found : found + slab_block_offset(shape, args.layer, 0);
}

// The staged blocks, run by run, as one batch of copies.
void send_staged(const PackBlocksArgs& args, std::byte* staging, CudaStream& stream) {
  const KvShape shape{.num_layers = args.layer + 1,
                      .num_kv_heads = args.num_kv_heads,
                      .head_dim = args.head_dim,
                      .kv_type = DataType::kBf16};  // or fp16: the same size
  const int end = std::min(args.first_block + args.num_blocks,
                           (args.num_tokens + kBlockTokens - 1) / kBlockTokens);
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<std::size_t> bytes;
  for (int head = 0; head < args.num_kv_heads; ++head) {
    for (int block = args.first_block; block < end;) {
      const int run_end = std::min(end, (block / kSegmentBlocks + 1) * kSegmentBlocks);
      to.push_back(host_run(args, shape, head, block / kSegmentBlocks) +
                   slab_block_offset(shape, 0, block));
      from.push_back(staging +
                     static_cast<std::size_t>(head * args.num_blocks + block - args.first_block) *
                         shape.block_bytes());
      bytes.push_back(static_cast<std::size_t>(run_end - block) * shape.block_bytes());
      block = run_end;
    }
  }
  if (to.empty()) return;
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  std::size_t first = 0;
  FT_CUDA(cudaMemcpyBatchAsync(to.data(), from.data(), bytes.data(), to.size(), &attributes, &first,
                               1, stream.handle()));
}

void pack_by_copy_engine(PackBlocksArgs args, CudaStream& stream) {
  const int end = args.first_block + args.num_blocks;
  const std::size_t block_bytes = std::size_t{4} * kBlockTokens * args.head_dim;
  for (; args.first_block < end; args.first_block += args.num_blocks) {
    args.num_blocks = std::min(kStagedBlocks, end - args.first_block);
    const int items = args.num_kv_heads * args.num_blocks;
    std::byte* staging =
        stream.scratch(static_cast<std::size_t>(args.num_kv_heads) * kStagedBlocks * block_bytes);
    pack_blocks_kernel<<<(items + kWarps - 1) / kWarps, kThreads, 0, stream.handle()>>>(
        args, reinterpret_cast<WordPair*>(staging));
    FT_CUDA(cudaGetLastError());
    send_staged(args, staging, stream);
  }
  stream.serialize_next();  // as in pack_blocks()
}

}  // namespace

void pack_blocks(const PackBlocksArgs& args, CudaStream& stream) {
  FT_CHECK(args.head_dim % 8 == 0, args.head_dim);
  const int items = args.num_kv_heads * args.num_blocks;
  if (items == 0) return;
  const bool host_knows = args.host_slabs != nullptr || args.host_runs != nullptr;
  if (args.to_arena && host_knows) return pack_by_copy_engine(args, stream);
  pack_blocks_kernel<<<ctas_for(items, stream), kThreads, 0, stream.handle()>>>(args, nullptr);
  FT_CUDA(cudaGetLastError());
  stream.serialize_next();  // decode attention reads slots early
}

void unpack_blocks(const UnpackBlocksArgs& args, CudaStream& stream) {
  FT_CHECK(args.head_dim % 8 == 0, args.head_dim);
  FT_CHECK((args.first_block + args.num_blocks) * kBlockTokens <= args.scratch_tokens);
  const int items = args.num_kv_heads * args.num_blocks;
  if (items == 0) return;
  unpack_blocks_kernel<<<ctas_for(items, stream), kThreads, 0, stream.handle()>>>(args);
  FT_CUDA(cudaGetLastError());
}

void write_through(const WriteThroughArgs& args, CudaStream& stream) {
  if (args.rows == 0) return;
  write_through_kernel<<<kCopyCtas, kThreads, 0, stream.handle()>>>(args);
  FT_CUDA(cudaGetLastError());
}

void gather(const GatherArgs& args, CudaStream& stream) {
  if (args.rows == 0) return;
  gather_kernel<<<kCopyCtas, kThreads, 0, stream.handle()>>>(args);
  FT_CUDA(cudaGetLastError());
  stream.serialize_next();  // decode attention reads slots early
}

}  // namespace foretoken::kernels::cuda
