#include "worker/internal/make_device.h"

#include <algorithm>
#include <string>

#include "kernels/model_limits.h"
#include "kernels/predict_limits.h"

namespace foretoken::worker {
namespace {

// Of the rank that has most query heads of a KV head, which ranks beyond the KV heads share.
std::int64_t most_in_group(const ServiceConfig& config, const ModelConfig& model) {
  const std::int64_t group = model.num_heads / model.num_kv_heads;
  const std::int64_t sharers =
      std::max<std::int64_t>(1, config.tensor_parallel_size / model.num_kv_heads);
  return (group + sharers - 1) / sharers;
}

Status check_model_limits(const ServiceConfig& config, const ModelConfig& model) {
  if (model.head_dim != 64 && model.head_dim != 128) {
    return Error{ErrorCode::kDevice, "head_dim " + std::to_string(model.head_dim) +
                                         ": the CUDA device takes 64 and 128; serve with "
                                         "--device cpu"};
  }
  if (model.vocab_size > kernels::kMaxVocab) {
    return Error{ErrorCode::kDevice, "vocab_size " + std::to_string(model.vocab_size) +
                                         ": a GPU samples from at most " +
                                         std::to_string(kernels::kMaxVocab) +
                                         " tokens; serve with --device cpu"};
  }
  if (const std::int64_t group = most_in_group(config, model); group > kernels::kMaxGroup) {
    return Error{ErrorCode::kDevice,
                 std::to_string(group) + " query heads a KV head on a rank: a GPU takes at most " +
                     std::to_string(kernels::kMaxGroup) +
                     "; raise --tensor-parallel-size, so that ranks share KV heads, or serve with "
                     "--device cpu"};
  }
  return Ok{};
}

// Of the policies that predict.
Status check_predictor_limits(const ServiceConfig& config, const ModelConfig& model) {
  const std::string policy = "under --kv-policy " + config.kv_policy + " a GPU ";
  if (config.max_num_seqs > kernels::kMaxPredictSequences) {
    return Error{ErrorCode::kConfig, policy + "decodes at most " +
                                         std::to_string(kernels::kMaxPredictSequences) +
                                         " sequences in a step: lower --max-num-seqs, now " +
                                         std::to_string(config.max_num_seqs)};
  }
  constexpr std::int64_t kMostTokens = std::int64_t{kernels::kMaxPredictColumns} * kBlockTokens;
  const std::int64_t tokens = config.max_model_len > 0 ? config.max_model_len : model.max_position;
  if (tokens > kMostTokens) {
    return Error{ErrorCode::kConfig,
                 policy + "takes contexts of at most " + std::to_string(kMostTokens) +
                     " tokens: lower --max-model-len, now " + std::to_string(tokens)};
  }
  const std::int64_t most_held = kernels::kMaxHeldRows / model.num_layers;
  if (config.history_fill == "hold" && config.max_num_seqs > most_held) {
    return Error{ErrorCode::kConfig,
                 "with --history-fill hold a GPU decodes at most " + std::to_string(most_held) +
                     " sequences of this model in a step: lower --max-num-seqs, now " +
                     std::to_string(config.max_num_seqs) + ", or fill with zero"};
  }
  return Ok{};
}

std::unique_ptr<kernels::Device> make_gpu(const ServiceConfig& config, const ModelConfig& model,
                                          int gpu) {
  if (const Status status = check_gpu_limits(config, model); !status) {
    throw Exception(status.error());
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

Status check_gpu_limits(const ServiceConfig& config, const ModelConfig& model) {
  if (Status status = check_model_limits(config, model); !status) return status;
  const bool predicts = config.kv_policy == "attention-predictor" || config.kv_policy == "auto";
  return predicts ? check_predictor_limits(config, model) : Status(Ok{});
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
