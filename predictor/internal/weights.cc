#include "predictor/weights.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "common/safetensors.h"

namespace foretoken::predictor {
namespace {

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

// Copies the tensor `name`, which must be F32 of `shape` and finite.
Status read_tensor(const SafetensorsFile& file, std::string_view name,
                   const std::vector<std::int64_t>& shape, std::span<float> out) {
  const std::string where = file.path().string() + ": tensor " + std::string(name);
  FT_ASSIGN_OR_RETURN(const TensorView tensor, file.tensor(name));
  if (tensor.dtype != TensorDtype::kF32 || tensor.shape != shape) {
    return Error{ErrorCode::kModelFile,
                 where + " is " + std::string(tensor_dtype_name(tensor.dtype)) + " " +
                     shape_text(tensor.shape) + ", the predictor needs F32 " + shape_text(shape)};
  }
  std::memcpy(out.data(), tensor.bytes.data(), out.size_bytes());
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (std::isfinite(out[i])) continue;
    return Error{ErrorCode::kModelFile,
                 where + " has a value that is not finite, at index " + std::to_string(i)};
  }
  return Ok{};
}

}  // namespace

Result<kernels::PredictorWeights> read_weights(const std::filesystem::path& path) {
  FT_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::open(path));
  kernels::PredictorWeights w{};
  FT_RETURN_IF_ERROR(read_tensor(file, "conv1.weight", {16, 1, 3, 3}, w.conv1_weight));
  FT_RETURN_IF_ERROR(read_tensor(file, "conv1.bias", {16}, w.conv1_bias));
  FT_RETURN_IF_ERROR(read_tensor(file, "conv2.weight", {32, 16, 3, 3}, w.conv2_weight));
  FT_RETURN_IF_ERROR(read_tensor(file, "conv2.bias", {32}, w.conv2_bias));
  FT_RETURN_IF_ERROR(read_tensor(file, "conv3.weight", {1, 32, 1}, w.conv3_weight));
  FT_RETURN_IF_ERROR(read_tensor(file, "conv3.bias", {1}, std::span(&w.conv3_bias, 1)));
  return w;
}

std::filesystem::path published_weights() {
  std::error_code unreadable;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", unreadable);
  return program.parent_path().parent_path() / "share" / "foretoken" /
         "attention_predictor_llama3.1.safetensors";
}

}  // namespace foretoken::predictor
