#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <limits>
#include <string>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda_machine.h"

namespace foretoken::kernels {
namespace cuda {
namespace {

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(const Waiter& waiter) : waiter_(waiter) {
    FT_CUDA(cudaEventCreateWithFlags(&handle_, cudaEventDisableTiming));
  }
  ~CudaEvent() override { cudaEventDestroy(handle_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  void record(Stream& stream) override {
    FT_CUDA(cudaEventRecord(handle_, as_cuda(stream).handle()));
    recorded_ = true;
  }
  void wait(Stream& stream) override {
    if (recorded_) FT_CUDA(cudaStreamWaitEvent(as_cuda(stream).handle(), handle_, 0));
  }
  bool done() const override { return !recorded_ || is_done(cudaEventQuery(handle_)); }
  void synchronize() override {
    if (recorded_) waiter_.wait_for(handle_);
  }

 private:
  const Waiter& waiter_;
  cudaEvent_t handle_ = nullptr;
  bool recorded_ = false;
};

class CudaGraph final : public Graph {
 public:
  explicit CudaGraph(cudaGraph_t graph) {
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
  }
  ~CudaGraph() override { cudaGraphExecDestroy(exec_); }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  void launch(Stream& stream) override {
    FT_CUDA(cudaGraphLaunch(exec_, as_cuda(stream).handle()));
  }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

// For what is allocated beside, later, and by others: scratch of streams, recorded steps,
// workspaces of CUDA's libraries (guessed). Without it, sequences could take what these need.
constexpr std::size_t kReserve = std::size_t{1} << 30;

// The device's memory that may be allocated: what was asked for, or what is free if that is less
// (others use the device too).
std::size_t memory_limit(const CudaDeviceConfig& config) {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  FT_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  const auto share =
      static_cast<std::size_t>(config.memory_fraction * static_cast<double>(total_bytes));
  return std::min(free_bytes - std::min(free_bytes, kReserve),
                  config.memory_bytes > 0 ? config.memory_bytes : share);
}

DeviceInfo select_device(const CudaDeviceConfig& config) {
  FT_CUDA(cudaSetDevice(config.index));
  cudaDeviceProp properties{};
  FT_CUDA(cudaGetDeviceProperties(&properties, config.index));
  if (properties.major < 9) {
    throw Exception(ErrorCode::kDevice, std::string(properties.name) + " has compute capability " +
                                            std::to_string(properties.major) + "." +
                                            std::to_string(properties.minor) +
                                            "; Foretoken is built for 9.0 (H100, H200)");
  }
  return {properties.name, memory_limit(config), properties.multiProcessorCount, kCopyCtas, false};
}

}  // namespace

CudaDevice::CudaDevice(const CudaDeviceConfig& config)
    : config_(config), info_(select_device(config)), linear_(config.activation_type) {
  cudaMemPoolProps props{};
  props.allocType = cudaMemAllocationTypePinned;
  props.location = {cudaMemLocationTypeDevice, config.index};
  FT_CUDA(cudaMemPoolCreate(&pool_, &props));
  // What a sequence has freed stays mapped for the next one: to map a GB takes milliseconds.
  std::uint64_t kept = std::numeric_limits<std::uint64_t>::max();
  FT_CUDA(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &kept));
  FT_CUDA(cudaStreamCreateWithFlags(&memory_stream_, cudaStreamNonBlocking));
}

CudaDevice::~CudaDevice() {
  cudaStreamSynchronize(memory_stream_);
  cudaStreamDestroy(memory_stream_);
  cudaMemPoolDestroy(pool_);
}

DeviceInfo CudaDevice::info() const { return info_; }

void CudaDevice::set_wait_check(std::function<void()> check) {
  waiter_.set_check(std::move(check));
}

std::size_t CudaDevice::memory_free() const {
  std::size_t total = 0;
  for (const auto& in_use : in_use_) total += in_use;
  return info_.memory_bytes - std::min(total, info_.memory_bytes);
}

void* CudaDevice::count(void* data, std::size_t bytes, MemoryUse use) {
  if (data == nullptr && bytes > 0) {
    cudaGetLastError();
    throw Exception(ErrorCode::kExhausted, "device memory is full: " + std::to_string(bytes) +
                                               " bytes wanted for " + std::string(name_of(use)) +
                                               ", " + std::to_string(memory_free()) + " of " +
                                               std::to_string(info_.memory_bytes) + " free");
  }
  in_use_[static_cast<std::size_t>(use)] += bytes;
  return data;
}

void* CudaDevice::allocate(std::size_t bytes, MemoryUse use) {
  void* data = nullptr;
  if (bytes > 0 && bytes <= memory_free() &&
      cudaMallocFromPoolAsync(&data, bytes, pool_, memory_stream_) == cudaSuccess) {
    waiter_.wait_for(memory_stream_);  // usable on every stream from here on
  }
  return count(data, bytes, use);
}

void* CudaDevice::allocate_for_peers(std::size_t bytes, MemoryUse use) {
  void* data = nullptr;
  if (bytes <= memory_free() && cudaMalloc(&data, bytes) != cudaSuccess) data = nullptr;
  return count(data, bytes, use);
}

void CudaDevice::release_for_peers(void* data, std::size_t bytes, MemoryUse use) {
  cudaFree(data);
  in_use_[static_cast<std::size_t>(use)] -= bytes;
}

void CudaDevice::release(void* data, std::size_t bytes, MemoryUse use) {
  if (data == nullptr) return;
  try {
    finish_uploads();  // they may write there
  } catch (const Exception&) {
    // Whoever waits for them is told: it stays so.
  }
  cudaFreeAsync(data, memory_stream_);
  in_use_[static_cast<std::size_t>(use)] -= bytes;
}

std::size_t CudaDevice::memory_in_use(MemoryUse use) const {
  return in_use_[static_cast<std::size_t>(use)];
}

std::unique_ptr<Stream> CudaDevice::make_stream(StreamKind kind) {
  return std::make_unique<CudaStream>(kind, waiter_);
}
std::unique_ptr<Event> CudaDevice::make_event() { return std::make_unique<CudaEvent>(waiter_); }

std::unique_ptr<Graph> CudaDevice::record(Stream& stream, const std::function<void()>& ops) {
  const cudaStream_t handle = as_cuda(stream).handle();
  FT_CUDA(cudaStreamBeginCapture(handle, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    ops();
  } catch (...) {
    cudaStreamEndCapture(handle, &graph);
    cudaGraphDestroy(graph);
    throw;
  }
  FT_CUDA(cudaStreamEndCapture(handle, &graph));
  return std::make_unique<CudaGraph>(graph);
}

void CudaDevice::copy_in(void* device, const void* host, std::size_t bytes, Stream& stream) {
  FT_CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, as_cuda(stream).handle()));
}
void CudaDevice::read_in(void* device, const void* pinned, std::size_t bytes, Stream& stream) {
  cuda::read_in(device, pinned, bytes, as_cuda(stream));
}
void CudaDevice::copy_out(void* host, const void* device, std::size_t bytes, Stream& stream) {
  FT_CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, as_cuda(stream).handle()));
}
void CudaDevice::copy(void* to, const void* from, std::size_t bytes, Stream& stream) {
  FT_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, as_cuda(stream).handle()));
}
void CudaDevice::fill_zero(void* device, std::size_t bytes, Stream& stream) {
  FT_CUDA(cudaMemsetAsync(device, 0, bytes, as_cuda(stream).handle()));
}

void CudaDevice::upload(void* device, const HostRows& rows) {
  if (!uploader_) uploader_ = std::make_unique<Uploader>(config_.index);
  uploader_->upload(device, rows);
  uploads_ = true;
}
void CudaDevice::finish_uploads() {
  if (uploads_) uploader_->finish();
  uploads_ = false;
}

void* CudaDevice::allocate_pinned(std::size_t bytes) {
  void* host = nullptr;
  FT_CUDA(cudaHostAlloc(&host, bytes, cudaHostAllocPortable));
  return host;
}
void CudaDevice::release_pinned(void* host) { cudaFreeHost(host); }

std::byte* CudaDevice::register_host(std::byte* host, std::size_t bytes) {
  FT_CUDA(cudaHostRegister(host, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable));
  void* device = nullptr;
  FT_CUDA(cudaHostGetDevicePointer(&device, host, 0));
  return static_cast<std::byte*>(device);
}
void CudaDevice::unregister_host(std::byte* host) { cudaHostUnregister(host); }

std::unique_ptr<Weight> CudaDevice::make_weight(std::span<const WeightPart> parts) {
  return make_cuda_weight(*this, config_.activation_type, parts);
}
std::unique_ptr<Predictor> CudaDevice::make_predictor(const PredictorWeights& weights) {
  return cuda::make_predictor(weights);
}
std::size_t CudaDevice::predictor_state_bytes(int max_columns) const {
  return cuda::predictor_state_bytes(max_columns);
}

void CudaDevice::embed(const EmbedArgs& args, Stream& stream) {
  cuda::embed(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::rms_norm(const RmsNormArgs& args, Stream& stream) {
  cuda::rms_norm(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::linear(const LinearArgs& args, Stream& stream) {
  linear_.run(args, as_cuda(stream));
}
bool CudaDevice::chains(const LinearChainArgs& args) const { return can_chain(args); }
void CudaDevice::linear_chain(const LinearChainArgs& args, Stream& stream) {
  run_chain(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::swiglu(const SwiGluArgs& args, Stream& stream) {
  cuda::swiglu(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::rope_prefill(const RopePrefillArgs& args, Stream& stream) {
  cuda::rope_prefill(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::rope_decode(const RopeDecodeArgs& args, Stream& stream) {
  cuda::rope_decode(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::prefill_attention(const PrefillAttentionArgs& args, Stream& stream) {
  prefill_attention_.run(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::prefill_block_max(const PrefillBlockMaxArgs& args, Stream& stream) {
  cuda::prefill_block_max(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::decode_attention(const DecodeAttentionArgs& args, Stream& stream) {
  cuda::decode_attention(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::streamed_attention(const DecodeAttentionArgs& args, Stream& stream) {
  cuda::streamed_attention(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::sketched_attention(const DecodeAttentionArgs& args, Stream& stream) {
  cuda::sketched_attention(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::pack_blocks(const PackBlocksArgs& args, Stream& stream) {
  cuda::pack_blocks(args, as_cuda(stream));
}
void CudaDevice::unpack_blocks(const UnpackBlocksArgs& args, Stream& stream) {
  cuda::unpack_blocks(args, as_cuda(stream));
}
void CudaDevice::write_through(const WriteThroughArgs& args, Stream& stream) {
  cuda::write_through(args, as_cuda(stream));
}
void CudaDevice::sketch_blocks(const SketchBlocksArgs& args, Stream& stream) {
  cuda::sketch_blocks(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::sketch_filled(const SketchFilledArgs& args, Stream& stream) {
  cuda::sketch_filled(args, config_.activation_type, as_cuda(stream));
}
void CudaDevice::advance(const AdvanceArgs& args, Stream& stream) {
  cuda::advance(args, as_cuda(stream));
}
void CudaDevice::resolve(const ResolveArgs& args, Stream& stream) {
  cuda::resolve(args, as_cuda(stream));
}
void CudaDevice::gather(const GatherArgs& args, Stream& stream) {
  cuda::gather(args, as_cuda(stream));
}
void CudaDevice::history_append(const HistoryAppendArgs& args, Stream& stream) {
  cuda::history_append(args, as_cuda(stream));
}
void CudaDevice::predict(const PredictArgs& args, Stream& stream) {
  cuda::predict(args, as_cuda(stream));
  if (args.scores_segments) cuda::score_segments(args, as_cuda(stream));
}
void CudaDevice::select_top(const SelectTopArgs& args, Stream& stream) {
  cuda::select_top(args, as_cuda(stream));
}
void CudaDevice::select_recent(const SelectRecentArgs& args, Stream& stream) {
  cuda::select_recent(args, as_cuda(stream));
}
void CudaDevice::select_trace(const SelectTraceArgs& args, Stream& stream) {
  cuda::select_trace(args, as_cuda(stream));
}
void CudaDevice::sample(const SampleArgs& args, Stream& stream) {
  cuda::sample(args, as_cuda(stream));
}

}  // namespace cuda

std::unique_ptr<Device> make_cuda_device(const CudaDeviceConfig& config) {
  return std::make_unique<cuda::CudaDevice>(config);
}

std::jthread prepare_prefill(Device& device, const PrefillShape& shape) {
  auto* on_gpu = dynamic_cast<cuda::CudaDevice*>(&device);
  return on_gpu == nullptr ? std::jthread() : on_gpu->prepare_prefill(shape);
}

int num_cuda_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess ? count : 0;  // no driver and no device alike
}

std::string why_no_cuda_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  constexpr const char* kElse = ", or use --device cpu; `foretoken doctor` shows more";
  if (status == cudaSuccess || status == cudaErrorNoDevice) {
    return std::string("the driver shows no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES") + kElse;
  }
  const CudaVersions versions = cuda_versions();
  if (versions.driver == 0) return std::string("no NVIDIA driver is loaded: install one") + kElse;
  const std::string too_old = why_driver_is_too_old(versions);
  return (too_old.empty() ? cudaGetErrorString(status) : too_old) + std::string(kElse);
}

std::string cuda_device_id(int index) {
  cudaDeviceProp properties{};
  FT_CUDA(cudaGetDeviceProperties(&properties, index));
  return {properties.uuid.bytes, sizeof properties.uuid.bytes};
}

}  // namespace foretoken::kernels
