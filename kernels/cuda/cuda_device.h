// CudaDevice: the Device on an NVIDIA GPU. Its ops lie in files by subject (ops.h); here are
// memory, streams, events and graphs.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/prefill_attention.h"
#include "kernels/cuda/uploader.h"
#include "kernels/cuda/waiter.h"
#include "kernels/device.h"

namespace foretoken::kernels::cuda {

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const CudaDeviceConfig& config);
  ~CudaDevice() override;

  DeviceInfo info() const override;
  DataType activation_type() const override { return config_.activation_type; }
  bool runs_at_once() const override { return false; }

  void set_wait_check(std::function<void()> check) override;
  void* allocate(std::size_t bytes, MemoryUse use) override;
  void release(void* data, std::size_t bytes, MemoryUse use) override;
  std::size_t memory_in_use(MemoryUse use) const override;
  // Memory that other processes can open, which they can't a pool's; counted as allocate() does.
  void* allocate_for_peers(std::size_t bytes, MemoryUse use);
  void release_for_peers(void* data, std::size_t bytes, MemoryUse use);
  std::unique_ptr<Stream> make_stream(StreamKind kind) override;
  std::unique_ptr<Event> make_event() override;
  std::unique_ptr<Graph> record(Stream& stream, const std::function<void()>& ops) override;
  void copy_in(void* device, const void* host, std::size_t bytes, Stream& stream) override;
  void read_in(void* device, const void* pinned, std::size_t bytes, Stream& stream) override;
  void copy_out(void* host, const void* device, std::size_t bytes, Stream& stream) override;
  void copy(void* to, const void* from, std::size_t bytes, Stream& stream) override;
  void fill_zero(void* device, std::size_t bytes, Stream& stream) override;
  void upload(void* device, const HostRows& rows) override;
  void finish_uploads() override;
  void* allocate_pinned(std::size_t bytes) override;
  void release_pinned(void* host) override;
  std::byte* register_host(std::byte* host, std::size_t bytes) override;
  void unregister_host(std::byte* host) override;

  std::unique_ptr<Weight> make_weight(std::span<const WeightPart> parts) override;
  std::unique_ptr<Predictor> make_predictor(const PredictorWeights& weights) override;
  std::size_t predictor_state_bytes(int max_columns) const override;

  void embed(const EmbedArgs& args, Stream& stream) override;
  void rms_norm(const RmsNormArgs& args, Stream& stream) override;
  void linear(const LinearArgs& args, Stream& stream) override;
  bool chains(const LinearChainArgs& args) const override;
  void linear_chain(const LinearChainArgs& args, Stream& stream) override;
  void swiglu(const SwiGluArgs& args, Stream& stream) override;
  void rope_prefill(const RopePrefillArgs& args, Stream& stream) override;
  void rope_decode(const RopeDecodeArgs& args, Stream& stream) override;
  void prefill_attention(const PrefillAttentionArgs& args, Stream& stream) override;
  std::jthread prepare_prefill(const PrefillShape& shape) {
    return prefill_attention_.prepare(shape);
  }
  void prefill_block_max(const PrefillBlockMaxArgs& args, Stream& stream) override;
  void decode_attention(const DecodeAttentionArgs& args, Stream& stream) override;
  void streamed_attention(const DecodeAttentionArgs& args, Stream& stream) override;
  void sketched_attention(const DecodeAttentionArgs& args, Stream& stream) override;
  void pack_blocks(const PackBlocksArgs& args, Stream& stream) override;
  void unpack_blocks(const UnpackBlocksArgs& args, Stream& stream) override;
  void write_through(const WriteThroughArgs& args, Stream& stream) override;
  void sketch_blocks(const SketchBlocksArgs& args, Stream& stream) override;
  void sketch_filled(const SketchFilledArgs& args, Stream& stream) override;
  void advance(const AdvanceArgs& args, Stream& stream) override;
  void resolve(const ResolveArgs& args, Stream& stream) override;
  void gather(const GatherArgs& args, Stream& stream) override;
  void history_append(const HistoryAppendArgs& args, Stream& stream) override;
  void predict(const PredictArgs& args, Stream& stream) override;
  void select_top(const SelectTopArgs& args, Stream& stream) override;
  void select_recent(const SelectRecentArgs& args, Stream& stream) override;
  void select_trace(const SelectTraceArgs& args, Stream& stream) override;
  void sample(const SampleArgs& args, Stream& stream) override;

 private:
  std::size_t memory_free() const;
  // Counts an allocation; throws where it came to nothing.
  void* count(void* data, std::size_t bytes, MemoryUse use);

  CudaDeviceConfig config_;
  Waiter waiter_;
  DeviceInfo info_;
  cudaMemPool_t pool_ = nullptr;
  cudaStream_t memory_stream_ = nullptr;  // what the pool's allocations are ordered on
  Linear linear_;
  PrefillAttention prefill_attention_;
  std::unique_ptr<Uploader> uploader_;  // once something was uploaded
  bool uploads_ = false;                // it may not have finished
  std::array<std::atomic<std::size_t>, static_cast<std::size_t>(MemoryUse::kCount)> in_use_{};
};

}  // namespace foretoken::kernels::cuda
