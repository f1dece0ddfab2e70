// CudaStream: a CUDA stream with the scratch memory that ops on it share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/cuda/waiter.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

class CudaStream final : public Stream {
 public:
  CudaStream(StreamKind kind, const Waiter& waiter);
  ~CudaStream() override;
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void synchronize() override;
  void* native_handle() const override { return handle_; }
  cudaStream_t handle() const { return handle_; }
  StreamKind kind() const { return kind_; }

  // Device memory for one op's intermediate results, 256-byte aligned. The next op on this stream
  // gets the same bytes. Grows when asked for more than ever before, which waits for the stream:
  // a sequence of ops must have run once before it is recorded into a graph. A graph has the
  // address that was given while it was recorded, which stays valid as long as the stream.
  std::byte* scratch(std::size_t bytes) { return scratch_.take(bytes, *this); }

  // Words of kEmpty, by which the thread blocks of a kernel give each other results: who has read
  // one sets it back. Otherwise as scratch.
  static constexpr std::uint32_t kEmpty = ~0U;
  std::byte* mailbox(std::size_t bytes) { return mailbox_.take(bytes, *this); }

  // The next launch_overlapped() (launch.cuh) doesn't overlap: behind ops that write what others
  // read early, tables of a step (read_in) and slots (gather, pack_blocks).
  void serialize_next() { serial_ = true; }
  bool take_serial() { return std::exchange(serial_, false); }

  // kNumCounters zeros, for "the last block to arrive does the rest". Who counts one up sets it
  // back to zero.
  static constexpr int kNumCounters = 16384;
  std::uint32_t* counters() const { return counters_; }

 private:
  // Device memory that grows.
  class Memory {
   public:
    std::byte* take(std::size_t bytes, CudaStream& stream);
    void free();

   private:
    void grow(std::size_t bytes, CudaStream& stream);

    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
    bool recorded_ = false;             // a graph has the address
    std::vector<std::byte*> outgrown_;  // but a graph has their address
  };

  const StreamKind kind_;
  const Waiter& waiter_;
  cudaStream_t handle_ = nullptr;
  Memory scratch_, mailbox_;
  bool serial_ = false;
  std::uint32_t* counters_ = nullptr;
};

inline CudaStream& as_cuda(Stream& stream) { return static_cast<CudaStream&>(stream); }

}  // namespace foretoken::kernels::cuda
