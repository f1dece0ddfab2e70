#include "kernels/cuda/uploader.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/waiter.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr std::size_t kChunkBytes = std::size_t{4} << 20;
constexpr std::size_t kMostWaiting = 32;  // chunks: so that no thread runs out of them
// A core copies 5 GB/s out of pages that this mapping has not seen, the link takes 52 to 55.
constexpr unsigned kMaxThreads = 12;

int num_threads() {
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, kMaxThreads));
}

}  // namespace

class Uploader::Lane {
 public:
  Lane() {
    FT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (Buffer& buffer : buffers_) {
      FT_CUDA(cudaHostAlloc(&buffer.host, kChunkBytes, cudaHostAllocDefault));
      FT_CUDA(cudaEventCreateWithFlags(&buffer.emptied, cudaEventDisableTiming));
    }
  }
  ~Lane() {
    cudaStreamSynchronize(stream_);
    for (const Buffer& buffer : buffers_) {
      cudaFreeHost(buffer.host);
      cudaEventDestroy(buffer.emptied);
    }
    cudaStreamDestroy(stream_);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // REQUIRES: the rows fit a chunk.
  void send(std::byte* device, const HostRows& rows) {
    Buffer& buffer = buffers_[next_];
    next_ = (next_ + 1) % buffers_.size();
    Waiter().wait_for(buffer.emptied);
    const std::size_t bytes = rows.count * rows.row_bytes;
    if (rows.stride_bytes == rows.row_bytes) {
      std::memcpy(buffer.host, rows.data, bytes);
    } else {
      for (std::size_t row = 0; row < rows.count; ++row) {
        std::memcpy(static_cast<std::byte*>(buffer.host) + row * rows.row_bytes,
                    rows.data + row * rows.stride_bytes, rows.row_bytes);
      }
    }
    FT_CUDA(cudaMemcpyAsync(device, buffer.host, bytes, cudaMemcpyHostToDevice, stream_));
    FT_CUDA(cudaEventRecord(buffer.emptied, stream_));
  }
  void finish() { Waiter().wait_for(stream_); }

 private:
  struct Buffer {
    void* host = nullptr;
    cudaEvent_t emptied = nullptr;
  };
  cudaStream_t stream_ = nullptr;
  std::array<Buffer, 2> buffers_;
  std::size_t next_ = 0;
};

Uploader::Uploader(int device_index) : device_index_(device_index) {
  lanes_.resize(static_cast<std::size_t>(num_threads()));
  for (auto& lane : lanes_) {
    threads_.emplace_back([this, &lane](const std::stop_token& stop) { run(lane, stop); });
  }
}

Uploader::~Uploader() = default;  // threads_ first: they stop, and are joined

// A thread makes its lane for its first chunk: to pin a buffer takes milliseconds, in which others
// copy.
void Uploader::run(std::unique_ptr<Lane>& lane, const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (work_.wait(lock, stop, [this] { return !waiting_.empty(); })) {
    const Chunk chunk = waiting_.front();
    waiting_.pop_front();
    ++num_begun_;
    const bool failed = failure_ != nullptr;
    lock.unlock();
    progress_.notify_one();
    std::exception_ptr failure;
    try {
      FT_CUDA(cudaSetDevice(device_index_));
      if (!failed && !lane) lane = std::make_unique<Lane>();
      if (!failed) lane->send(chunk.device, chunk.rows);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    --num_begun_;
    if (failure && !failure_) failure_ = failure;
    if (waiting_.empty()) progress_.notify_one();
  }
}

void Uploader::push(const Chunk& chunk) {
  {
    std::unique_lock lock(mutex_);
    progress_.wait(lock, [this] { return waiting_.size() < kMostWaiting; });
    waiting_.push_back(chunk);
  }
  work_.notify_one();
}

void Uploader::finish() {
  {
    std::unique_lock lock(mutex_);
    progress_.wait(lock, [this] { return waiting_.empty() && num_begun_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
  }
  for (const auto& lane : lanes_) {
    if (lane) lane->finish();
  }
}

// Each in pieces that are rows again.
void Uploader::upload_long_rows(std::byte* device, const HostRows& rows) {
  const std::size_t pieces = rows.row_bytes / kChunkBytes;
  const std::size_t rest = rows.row_bytes % kChunkBytes;
  for (std::size_t row = 0; row < rows.count; ++row) {
    const std::byte* from = rows.data + row * rows.stride_bytes;
    std::byte* to = device + row * rows.row_bytes;
    upload(to, {from, pieces, kChunkBytes, kChunkBytes});
    if (rest == 0) continue;
    upload(to + pieces * kChunkBytes, {from + pieces * kChunkBytes, 1, rest, rest});
  }
}

void Uploader::upload(void* device, const HostRows& rows) {
  if (rows.count == 0 || rows.row_bytes == 0) return;
  if (rows.row_bytes > kChunkBytes) {
    return upload_long_rows(static_cast<std::byte*>(device), rows);
  }
  const std::size_t chunk_rows = kChunkBytes / rows.row_bytes;
  for (std::size_t first = 0; first < rows.count; first += chunk_rows) {
    HostRows part = rows;
    part.data += first * rows.stride_bytes;
    part.count = std::min(chunk_rows, rows.count - first);
    push({static_cast<std::byte*>(device) + first * rows.row_bytes, part});
  }
}

}  // namespace foretoken::kernels::cuda
