#include "worker/internal/make_device.h"

#include <string>

namespace foretoken::worker {
namespace {

std::unique_ptr<kernels::Device> make_gpu(const ServiceConfig& config, const ModelConfig& model,
                                          int gpu) {
  if (model.head_dim != 64 && model.head_dim != 128) {
    throw Exception(ErrorCode::kDevice, "head_dim " + std::to_string(model.head_dim) +
                                            ": the CUDA device takes 64 and 128; serve with "
                                            "--device cpu");
  }
  return kernels::make_cuda_device({.index = gpu,
                                    .activation_type = model.dtype == ModelDtype::kF16
                                                           ? kernels::DataType::kFp16
                                                           : kernels::DataType::kBf16,
                                    .memory_fraction = config.gpu_memory_utilization});
}

}  // namespace

bool wants_cuda(const ServiceConfig& config) {
  return config.device == "cuda" || (config.device == "auto" && kernels::num_cuda_devices() > 0);
}

std::string how_to_make_room(const ServiceConfig& config) {
  const std::string raise = wants_cuda(config)
                                ? "--gpu-memory-utilization or --tensor-parallel-size"
                                : "--device-memory-gib";
  return "raise " + raise + ", or lower --max-model-len or --max-batched-tokens (now " +
         std::to_string(config.max_batched_tokens) + ")";
}

std::unique_ptr<kernels::Device> make_device(const ServiceConfig& config, const ModelConfig& model,
                                             int gpu) {
  if (wants_cuda(config)) return make_gpu(config, model, gpu);
  constexpr double kGib = 1024.0 * 1024.0 * 1024.0;
  return kernels::make_cpu_device(
      {.num_threads = config.threads_per_rank,
       .memory_bytes = static_cast<std::size_t>(config.device_memory_gib * kGib)});
}

}  // namespace foretoken::worker
