#include "worker/internal/bench_sequence.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "common/result.h"
#include "worker/internal/upload.h"

namespace foretoken::worker {
namespace {

using kernels::DeviceBuffer;
using kernels::MemoryUse;

// Shared memory without a name, mapped. The mapping keeps it alive.
std::byte* map_shared(std::size_t bytes) {
  const int file = memfd_create("foretoken-bench", MFD_CLOEXEC);
  void* mapped = MAP_FAILED;
  if (file >= 0 && ftruncate(file, static_cast<off_t>(bytes)) == 0) {
    mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  const int reason = errno;
  if (file >= 0) close(file);
  if (mapped == MAP_FAILED) {
    throw Exception(ErrorCode::kExhausted, "no host memory of " + std::to_string(bytes) +
                                               " bytes: " + std::strerror(reason));
  }
  return static_cast<std::byte*>(mapped);
}

// First touches, by all cores: one alone takes seconds for a few GiB.
void touch(std::byte* base, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t parts = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::jthread> threads;
  for (std::size_t part = 0; part < parts; ++part) {
    threads.emplace_back([=] {
      for (std::size_t at = part * page; at < bytes; at += parts * page) base[at] = std::byte{0};
    });
  }
}

// Finite bf16 or fp16 values of random bits. They repeat after a prime number.
DeviceBuffer random_values(kernels::Device& device, kernels::Stream& stream, std::size_t count) {
  std::mt19937 random(1);
  std::vector<std::uint16_t> period(1'048'583);
  for (auto& value : period) value = static_cast<std::uint16_t>(0x3C00U | (random() & 0x80FFU));
  DeviceBuffer buffer(device, 2 * count, MemoryUse::kPrefill);
  for (std::size_t at = 0; at < count; at += period.size()) {
    device.copy_in(buffer.as<std::uint16_t>() + at, period.data(),
                   2 * std::min(period.size(), count - at), stream);
  }
  stream.synchronize();
  return buffer;
}

std::size_t num_heads(const kernels::KvShape& shape) {
  return static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads);
}

std::size_t num_slabs(const kernels::KvShape& shape, int num_blocks) {
  FT_CHECK(num_blocks % kSegmentBlocks == 0, num_blocks);
  return static_cast<std::size_t>(shape.num_kv_heads * (num_blocks / kSegmentBlocks));
}

std::vector<std::int32_t> absent(const kernels::KvShape& shape, int width) {
  return std::vector<std::int32_t>(num_heads(shape) * static_cast<std::size_t>(width),
                                   kernels::kAbsent);
}

// The entries of a head, at most one a slot.
std::vector<kernels::FetchEntry> draw_fetches(const kernels::SequenceKv& kv, double share,
                                              std::mt19937& random) {
  std::bernoulli_distribution is_new(share);
  std::uniform_int_distribution<std::int32_t> block(0, kv.max_blocks - 1);
  std::vector<kernels::FetchEntry> entries;
  for (std::int32_t slot = 0; slot < kv.num_slots; ++slot) {
    if (is_new(random)) entries.push_back({block(random), slot});
  }
  return entries;
}

}  // namespace

RegisteredMemory::RegisteredMemory(kernels::Device& device, std::size_t bytes)
    : device_(device), bytes_(bytes), host_(map_shared(bytes)) {
  touch(host_, bytes_);
  address_ = device_.register_host(host_, bytes_);
}

RegisteredMemory::~RegisteredMemory() {
  device_.unregister_host(host_);
  munmap(host_, bytes_);
}

BenchSequence::BenchSequence(kernels::Device& device, kernels::Stream& stream,
                             const kernels::KvShape& shape, int num_blocks, int num_slots)
    : device_(device),
      shape_(shape),
      arena_(device, num_slabs(shape, num_blocks) * shape.slab_bytes()),
      slots_(device, num_heads(shape) * static_cast<std::size_t>(num_slots) * shape.block_bytes(),
             MemoryUse::kKvSlots),
      block_to_slot_(upload(device, stream, absent(shape, num_blocks), MemoryUse::kTables)),
      slot_to_block_(upload(device, stream, absent(shape, num_slots), MemoryUse::kTables)),
      length_(upload(device, stream, std::vector<std::int32_t>{num_blocks * kBlockTokens},
                     MemoryUse::kTables)),
      mismatches_(upload(device, stream, std::vector<std::uint32_t>{0}, MemoryUse::kTables)) {
  std::vector<std::byte*> slabs(num_slabs(shape, num_blocks));
  for (std::size_t i = 0; i < slabs.size(); ++i) {
    slabs[i] = arena_.address() + i * shape.slab_bytes();
  }
  slabs_ = upload(device, stream, slabs, MemoryUse::kTables);
  kv_ = {.slots = slots_.as<std::byte>(),
         .block_to_slot = block_to_slot_.as<std::int32_t>(),
         .slot_to_block = slot_to_block_.as<std::int32_t>(),
         .slabs = slabs_.as<std::byte*>(),
         .length = length_.as<std::int32_t>(),
         .num_slots = num_slots,
         .max_blocks = num_blocks,
         .max_segments = num_blocks / kSegmentBlocks,
         .shape = shape,
         .mismatches = mismatches_.as<std::uint32_t>()};
  view_ = upload(device, stream, std::vector<kernels::SequenceKv>{kv_}, MemoryUse::kTables);
  fill_arena(stream);
}

// As prefill leaves a layer behind; all layers get the same random K, which is their V as well.
void BenchSequence::fill_arena(kernels::Stream& stream) {
  const int tokens = kv_.max_blocks * kBlockTokens;
  const DeviceBuffer scratch = random_values(device_, stream,
                                             static_cast<std::size_t>(shape_.num_kv_heads) *
                                                 static_cast<std::size_t>(tokens) *
                                                 static_cast<std::size_t>(shape_.head_dim));
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    device_.pack_blocks({.k = scratch.data(),
                         .v = scratch.data(),
                         .scratch_tokens = tokens,
                         .num_kv_heads = shape_.num_kv_heads,
                         .head_dim = shape_.head_dim,
                         .layer = layer,
                         .first_block = 0,
                         .num_blocks = kv_.max_blocks,
                         .num_tokens = tokens,
                         .to_arena = true,
                         .sequence = on_device()},
                        stream);
  }
  stream.synchronize();
}

StepFetches::StepFetches(kernels::Device& device, kernels::Stream& stream,
                         const kernels::SequenceKv& kv, double share, std::mt19937& random) {
  const auto slots = static_cast<std::size_t>(kv.num_slots);
  std::vector<std::int32_t> counts(num_heads(kv.shape));
  std::vector<kernels::FetchEntry> entries(counts.size() * slots);
  for (std::size_t head = 0; head < counts.size(); ++head) {
    const auto drawn = draw_fetches(kv, share, random);
    counts[head] = static_cast<std::int32_t>(drawn.size());
    num_blocks_ += counts[head];
    std::ranges::copy(drawn, entries.begin() + static_cast<std::ptrdiff_t>(head * slots));
  }
  entries_ = upload(device, stream, entries, MemoryUse::kTables);
  counts_ = upload(device, stream, counts, MemoryUse::kTables);
  const kernels::FetchList list{.entries = entries_.as<kernels::FetchEntry>(),
                                .counts = counts_.as<std::int32_t>(),
                                .max_entries = kv.num_slots};
  view_ = upload(device, stream, std::vector<kernels::FetchList>{list}, MemoryUse::kTables);
}

}  // namespace foretoken::worker
