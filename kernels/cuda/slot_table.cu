// advance, and resolve: which blocks get which slots (kernels/device.h, ResolveArgs). A CTA a
// (layer, head). The result is that of kernels/cpu/resolve.cc, entry for entry:
//   list     absent blocks that are needed, in the order in which they are wanted, into the fetch
//            list (the newborn block, which has no bytes to fetch, is remembered beside it)
//   assign   the i-th of them to the i-th slot: free ones from the lowest up, then those of
//            victims, the lowest block first
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/slot_table.cuh"
#include "kernels/kept_blocks.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1 << 17;  // of a sequence whose blocks are not all resident: 2M tokens
constexpr int kHeadCtas = 8;         // CTAs of a layer; more KV heads take turns

using Bitmap = std::uint32_t[kMaxBlocks / 32];

__device__ void set_bit(std::uint32_t* bitmap, int i) { atomicOr(bitmap + i / 32, 1U << i % 32); }
__device__ bool test_bit(const std::uint32_t* bitmap, int i) {
  return (bitmap[i / 32] >> i % 32 & 1U) != 0;
}

// Needed blocks that get a slot: the fetch list's first `num_listed`, and the newborn block, if it
// is absent, before entry `newborn_at`.
struct Absent {
  int num_listed;
  int newborn_at;  // kAbsent: there is none
  __device__ int count() const { return num_listed + (newborn_at == kAbsent ? 0 : 1); }
};

struct SharedMemory {
  Bitmap needed;
  Bitmap victims;
  std::int32_t blocks[kThreads];  // wanted ones, in order; kAbsent: none
  std::int32_t slots[kThreads];   // ... where they are
  int warp_totals[32];
  Absent absent;
};

// The tables of one (layer, head).
struct HeadTables {
  std::int32_t* block_to_slot;
  std::int32_t* slot_to_block;
  FetchEntry* entries;
  std::int32_t* count;
  int max_entries;
  int max_blocks;
  int num_slots;
  int num_written;  // blocks that have bytes
  int num_blocks;   // ... and the coming token's
  int usable_slots;

  __device__ HeadTables(const SequenceKv& kv, const FetchList& fetches, int layer, int head)
      : block_to_slot(cuda::block_to_slot(kv, layer, head)),
        slot_to_block(cuda::slot_to_block(kv, layer, head)),
        entries(fetches.entries + head_index(kv, layer, head) * fetches.max_entries),
        count(fetches.counts + head_index(kv, layer, head)),
        max_entries(fetches.max_entries),
        max_blocks(kv.max_blocks),
        num_slots(kv.num_slots),
        num_written(blocks_for(*kv.length)),
        num_blocks(blocks_for(std::int64_t{*kv.length} + 1)),
        usable_slots(min(num_slots, num_blocks)) {}

  __device__ int newest() const { return num_blocks - 1; }

  // Gives the rank-th absent block its slot.
  __device__ void place(const Absent& absent, int rank, int slot) const {
    int block = newest();
    if (rank != absent.newborn_at) {
      const bool behind = absent.newborn_at != kAbsent && rank > absent.newborn_at;
      FetchEntry& entry = entries[behind ? rank - 1 : rank];
      block = entry.block;
      entry.slot = slot;
    }
    block_to_slot[block] = slot;
    slot_to_block[slot] = block;
  }
};

// ---- every block is needed ---------------------------------------------------------------------

__device__ bool any_absent(const std::int32_t* slots, int count) {
  bool absent = false;
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += kThreads) absent |= slots[i] == kAbsent;
  return __syncthreads_or(absent) != 0;
}

__device__ Absent list_all(const HeadTables& tables, SharedMemory& shared) {
  int listed = 0;
  for (int first = 0; first < tables.num_written; first += kThreads) {
    const int block = first + static_cast<int>(threadIdx.x);
    const bool absent = block < tables.num_written && tables.block_to_slot[block] == kAbsent;
    int total = 0;
    const int end = listed + inclusive_sum<kThreads>(absent ? 1 : 0, shared.warp_totals, &total);
    if (absent && end <= tables.max_entries) tables.entries[end - 1].block = block;
    listed += total;
    __syncthreads();  // warp_totals is written again; at the end: the list is whole
  }
  listed = min(listed, tables.max_entries);
  const bool newborn =
      tables.num_written < tables.num_blocks && tables.block_to_slot[tables.newest()] == kAbsent;
  return {listed, newborn ? listed : kAbsent};
}

// ---- sink, local window and selection are needed -----------------------------------------------

// What a head wants, the most wanted first; may name a block twice, or one that isn't there.
struct Wanted {
  int num_sink;
  int num_local;
  int newest;
  const std::int32_t* selected;
  int num_selected;

  __device__ Wanted(const SequenceKv& kv, const Selection& selection, int layer, int head) {
    const int num_blocks = blocks_for(std::int64_t{*kv.length} + 1);
    num_sink = min(kSinkBlocks, num_blocks);
    num_local = num_blocks - first_local_block(*kv.length);
    newest = num_blocks - 1;
    const std::size_t index = head_index(kv, layer, head);
    selected = selection.blocks + index * selection.max_selected;
    num_selected = min(max(selection.counts[index], 0), selection.max_selected);
  }
  __device__ int count() const { return num_sink + num_local + num_selected; }
  __device__ int block(int i) const {
    if (i < num_sink) return i;
    if (i < num_sink + num_local) return newest - (i - num_sink);
    return selected[i - num_sink - num_local];
  }
};

// The needed blocks so far, kept by one warp.
struct NeededBlocks {
  int count = 0;
  int num_absent = 0;  // of those that have bytes
  int newborn_at = kAbsent;

  // Adds shared.blocks[first, first + 32): each once, and no more than there are slots.
  __device__ void add(const HeadTables& tables, SharedMemory& shared, int first) {
    const int lane = threadIdx.x;
    const unsigned lower_lanes = (1U << lane) - 1;
    const int block = shared.blocks[first + lane];
    const unsigned same = __match_any_sync(~0U, block);
    bool added = block != kAbsent && (same & lower_lanes) == 0 && !test_bit(shared.needed, block);
    const unsigned candidates = __ballot_sync(~0U, added);
    added = added && count + __popc(candidates & lower_lanes) < tables.usable_slots;
    if (added) set_bit(shared.needed, block);
    count = min(count + __popc(candidates), tables.usable_slots);
    __syncwarp();  // the next 32 see these bits

    const bool absent = added && shared.slots[first + lane] == kAbsent;
    const bool has_bytes = block < tables.num_written;
    const unsigned listed = __ballot_sync(~0U, absent && has_bytes);
    const int index = num_absent + __popc(listed & lower_lanes);
    if (absent && has_bytes && index < tables.max_entries) tables.entries[index].block = block;
    num_absent += __popc(listed);
    const unsigned newborn = __ballot_sync(~0U, absent && !has_bytes);  // one block at most
    if (newborn != 0)
      newborn_at = min(__shfl_sync(~0U, index, __ffs(newborn) - 1), tables.max_entries);
  }
};

__device__ Absent list_wanted(const HeadTables& tables, const Wanted& wanted,
                              SharedMemory& shared) {
  NeededBlocks needed;
  for (int first = 0; first < wanted.count(); first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    int block = i < wanted.count() ? wanted.block(i) : kAbsent;
    if (block < 0 || block >= tables.num_blocks) block = kAbsent;
    shared.blocks[threadIdx.x] = block;
    shared.slots[threadIdx.x] = block == kAbsent ? kAbsent : tables.block_to_slot[block];
    __syncthreads();
    const int count = min(kThreads, wanted.count() - first);
    for (int part = 0; threadIdx.x < 32 && part < count; part += 32) {
      needed.add(tables, shared, part);
    }
    __syncthreads();  // shared.blocks is written again
  }
  if (threadIdx.x == 0) {
    shared.absent = {min(needed.num_absent, tables.max_entries), needed.newborn_at};
  }
  __syncthreads();  // shared.absent, shared.needed and the list are there for all
  return shared.absent;
}

// ---- slots -------------------------------------------------------------------------------------

// Hands out free slots, and marks the victims where these may not be enough. Returns how many
// absent blocks have a slot now.
template <bool kMarkVictims>
__device__ int assign_free_slots(const HeadTables& tables, const Absent& absent,
                                 SharedMemory& shared) {
  int assigned = 0;
  for (int first = 0; first < tables.num_slots && assigned < absent.count(); first += kThreads) {
    const int slot = first + static_cast<int>(threadIdx.x);
    const bool exists = slot < tables.num_slots;
    const int block = exists ? tables.slot_to_block[slot] : kAbsent;
    const bool is_free = slot < tables.usable_slots && block == kAbsent;
    if (kMarkVictims && block != kAbsent && !test_bit(shared.needed, block)) {
      set_bit(shared.victims, block);
    }
    int total = 0;
    const int end = assigned + inclusive_sum<kThreads>(is_free ? 1 : 0, shared.warp_totals, &total);
    if (is_free && end <= absent.count()) tables.place(absent, end - 1, slot);
    assigned += total;
    __syncthreads();  // warp_totals is written again; at the end: the victims are marked
  }
  return min(assigned, absent.count());
}

__device__ void assign_slots_of_victims(const HeadTables& tables, const Absent& absent,
                                        int assigned, SharedMemory& shared) {
  const int words = (tables.max_blocks + 31) / 32;
  for (int first = 0; first < words && assigned < absent.count(); first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    std::uint32_t word = i < words ? shared.victims[i] : 0;
    int total = 0;
    int rank =
        assigned - __popc(word) + inclusive_sum<kThreads>(__popc(word), shared.warp_totals, &total);
    for (; word != 0 && rank < absent.count(); word &= word - 1, ++rank) {
      const int victim = 32 * i + __ffs(word) - 1;
      const int slot = tables.block_to_slot[victim];
      tables.block_to_slot[victim] = kAbsent;
      tables.place(absent, rank, slot);
    }
    assigned += total;
    __syncthreads();  // warp_totals is written again
  }
  require(assigned >= absent.count());
}

// In the common case nothing but the newest block is absent, and the slot behind all others is
// free. Then there is no need to look at the other slots.
__device__ void resolve_all(const HeadTables& tables, SharedMemory& shared) {
  const int newest = tables.newest();
  const bool holes = any_absent(tables.block_to_slot, newest);
  const bool newest_absent = tables.block_to_slot[newest] == kAbsent;
  if (!holes && !newest_absent) {
    if (threadIdx.x == 0) *tables.count = 0;
    return;
  }
  const bool newborn_behind_all =
      !holes && tables.num_written < tables.num_blocks && tables.slot_to_block[newest] == kAbsent;
  __syncthreads();  // all have read what is written now
  if (newborn_behind_all) {
    if (threadIdx.x != 0) return;
    *tables.count = 0;
    tables.place({0, 0}, 0, newest);
    return;
  }
  const Absent absent = list_all(tables, shared);
  if (threadIdx.x == 0) *tables.count = absent.num_listed;
  const int assigned = assign_free_slots<false>(tables, absent, shared);
  require(assigned == absent.count());
}

__device__ void resolve_wanted(const HeadTables& tables, const Wanted& wanted,
                               SharedMemory& shared) {
  const int words = (tables.max_blocks + 31) / 32;
  require(tables.max_blocks <= kMaxBlocks);
  for (int i = threadIdx.x; i < words; i += kThreads) shared.needed[i] = shared.victims[i] = 0;
  __syncthreads();
  const Absent absent = list_wanted(tables, wanted, shared);
  if (threadIdx.x == 0) *tables.count = absent.num_listed;
  if (absent.count() == 0) return;
  const int assigned = assign_free_slots<true>(tables, absent, shared);
  assign_slots_of_victims(tables, absent, assigned, shared);
}

__device__ void count_up(const Selection& selection, const FetchList& fetches,
                         std::size_t head_index) {
  const auto add = [&](int i, int count) {
    atomicAdd(reinterpret_cast<unsigned long long*>(fetches.totals + i), count);
  };
  add(0, min(max(selection.counts[head_index], 0), selection.max_selected));
  add(1, fetches.counts[head_index]);
}

__global__ void __launch_bounds__(kThreads) resolve_kernel(ResolveArgs args) {
  __shared__ SharedMemory shared;
  const SequenceKv kv = args.sequences[blockIdx.y];
  const FetchList fetches = args.fetches[blockIdx.y];
  const int layer = args.first_layer + static_cast<int>(blockIdx.x) / kHeadCtas;
  for (int head = blockIdx.x % kHeadCtas; head < kv.shape.num_kv_heads; head += kHeadCtas) {
    const HeadTables tables(kv, fetches, layer, head);
    require(tables.num_blocks <= kv.max_blocks);
    if (kv.num_slots >= kv.max_blocks) {
      resolve_all(tables, shared);
    } else {
      resolve_wanted(tables, Wanted(kv, args.selections[blockIdx.y], layer, head), shared);
    }
    __syncthreads();  // `shared` is the next head's, and the count is there
    if (threadIdx.x == 0 && fetches.totals != nullptr) {
      count_up(args.selections[blockIdx.y], fetches, head_index(kv, layer, head));
    }
  }
}

__global__ void advance_kernel(AdvanceArgs args) {
  allow_next_kernel();
  wait_for_earlier_kernels();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < args.rows) ++*args.sequences[row].length;
}

}  // namespace

void advance(const AdvanceArgs& args, CudaStream& stream) {
  if (args.rows == 0) return;
  launch_overlapped(advance_kernel, (args.rows + kThreads - 1) / kThreads, kThreads, 0, stream,
                    args);
}

void resolve(const ResolveArgs& args, CudaStream& stream) {
  if (args.rows == 0 || args.num_layers == 0) return;
  const dim3 ctas(static_cast<unsigned>(args.num_layers * kHeadCtas),
                  static_cast<unsigned>(args.rows));
  resolve_kernel<<<ctas, kThreads, 0, stream.handle()>>>(args);
  FT_CUDA(cudaGetLastError());
}

}  // namespace foretoken::kernels::cuda
