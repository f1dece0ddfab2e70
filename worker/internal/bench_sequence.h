// BenchSequence: one sequence whose KV lies in registered host memory, as in the store's arena,
// with valid checksums and random bytes, and of which no block is resident; and what a decode step
// of it fetches. For benchmarks. Called by one thread.
#pragma once

#include <random>
#include <vector>

#include "kernels/device.h"

namespace foretoken::worker {

// A memfd that the device has registered: mapped, touched, all zeros.
class RegisteredMemory {
 public:
  // Throws Exception(kExhausted) where the machine has no such memory.
  RegisteredMemory(kernels::Device& device, std::size_t bytes);
  ~RegisteredMemory();
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

  const std::byte* host() const { return host_; }
  std::byte* address() const { return address_; }  // as ops see it
  std::size_t bytes() const { return bytes_; }

 private:
  kernels::Device& device_;
  std::size_t bytes_;
  std::byte* host_;
  std::byte* address_;
};

class BenchSequence {
 public:
  // REQUIRES: num_blocks is a multiple of kSegmentBlocks.
  BenchSequence(kernels::Device& device, kernels::Stream& stream, const kernels::KvShape& shape,
                int num_blocks, int num_slots);

  const kernels::SequenceKv& kv() const { return kv_; }
  const kernels::SequenceKv* on_device() const { return view_.as<kernels::SequenceKv>(); }
  const RegisteredMemory& arena() const { return arena_; }

 private:
  void fill_arena(kernels::Stream& stream);

  kernels::Device& device_;
  kernels::KvShape shape_;
  RegisteredMemory arena_;
  kernels::DeviceBuffer slots_, block_to_slot_, slot_to_block_, slabs_, length_, mismatches_, view_;
  kernels::SequenceKv kv_{};
};

// Each slot of a head gets a random block with probability `share`.
class StepFetches {
 public:
  StepFetches(kernels::Device& device, kernels::Stream& stream, const kernels::SequenceKv& kv,
              double share, std::mt19937& random);

  const kernels::FetchList* on_device() const { return view_.as<kernels::FetchList>(); }
  std::int64_t num_blocks() const { return num_blocks_; }

 private:
  std::int64_t num_blocks_ = 0;
  kernels::DeviceBuffer entries_, counts_, view_;
};

}  // namespace foretoken::worker
