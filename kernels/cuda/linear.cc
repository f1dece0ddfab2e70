#include "kernels/cuda/linear.h"

#include <cublasLt.h>

#include <map>
#include <string>
#include <tuple>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/ops.h"
#include "kernels/row_tiles.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what cuBLASLt asks for on Hopper

void check_cublas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Exception(ErrorCode::kDevice,
                  std::string("cuBLASLt ") + what + ": " + cublasLtGetStatusName(status));
}

cudaDataType_t cuda_type(DataType type) {
  switch (type) {
    case DataType::kFp32:
      return CUDA_R_32F;
    case DataType::kFp16:
      return CUDA_R_16F;
    case DataType::kBf16:
      return CUDA_R_16BF;
  }
  FT_CHECK(false, static_cast<int>(type));
}

// What tells one product from another for the choice of an algorithm. rows: round_to_tiles().
struct Shape {
  int rows, features, columns;
  bool out_fp32, adds;
  auto operator<=>(const Shape&) const = default;
};

class Layout {
 public:
  Layout(cudaDataType_t type, std::uint64_t rows, std::uint64_t columns, std::int64_t stride) {
    check_cublas(cublasLtMatrixLayoutInit(&layout_, type, rows, columns, stride), "layout");
  }
  cublasLtMatrixLayout_t get() { return &layout_; }

 private:
  cublasLtMatrixLayoutOpaque_t layout_{};
};

// The matrices of a product. cuBLASLt thinks in columns, so our [rows, columns] are its [columns,
// rows]: out^T [features, rows] = W [features, columns] x^T [columns, rows].
struct Layouts {
  Layout weight, x, out;

  Layouts(const Shape& shape, int rows, DataType activation)
      : weight(cuda_type(activation), shape.columns, shape.features, shape.columns),
        x(cuda_type(activation), shape.columns, rows, shape.columns),
        out(shape.out_fp32 ? CUDA_R_32F : cuda_type(activation), shape.features, rows,
            shape.features) {}
};

// One product's algorithm.
class Plan {
 public:
  Plan(cublasLtHandle_t handle, const Shape& shape, DataType activation)
      : shape_(shape), activation_(activation), beta_(shape.adds ? 1.0F : 0.0F) {
    check_cublas(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describe");
    const cublasOperation_t transpose = CUBLAS_OP_T;
    check_cublas(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                                sizeof transpose),
                 "describe");
    choose(handle);
  }
  ~Plan() { cublasLtMatmulDescDestroy(operation_); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void run(cublasLtHandle_t handle, const LinearArgs& args, const void* x, void* out,
           CudaStream& stream) const {
    const float one = 1.0F;
    const void* added = beta_ == 0 ? out : args.residual;
    Layouts layouts(shape_, args.rows, activation_);
    check_cublas(cublasLtMatmul(handle, operation_, &one,
                                static_cast<const CudaWeight&>(*args.weight).memory.data(),
                                layouts.weight.get(), x, layouts.x.get(), &beta_, added,
                                layouts.out.get(), out, layouts.out.get(), &algorithm_,
                                stream.scratch(kWorkspaceBytes), kWorkspaceBytes, stream.handle()),
                 "multiply");
  }

 private:
  void choose(cublasLtHandle_t handle) {
    Layouts layouts(shape_, shape_.rows, activation_);
    cublasLtMatmulPreference_t preference = nullptr;
    check_cublas(cublasLtMatmulPreferenceCreate(&preference), "preference");
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                         &kWorkspaceBytes, sizeof kWorkspaceBytes);
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, operation_, layouts.weight.get(), layouts.x.get(), layouts.out.get(),
        layouts.out.get(), preference, 1, &best, &found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
      throw Exception(ErrorCode::kDevice,
                      "cuBLASLt has no product of " + std::to_string(shape_.rows) + " x " +
                          std::to_string(shape_.columns) + " by " + std::to_string(shape_.columns) +
                          " x " + std::to_string(shape_.features));
    }
    algorithm_ = best.algo;
  }

  const Shape shape_;
  const DataType activation_;
  const float beta_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_{};
};

}  // namespace

struct Linear::Impl {
  explicit Impl(DataType type) : activation(type) {
    check_cublas(cublasLtCreate(&handle), "create");
  }
  ~Impl() {
    plans.clear();
    cublasLtDestroy(handle);
  }

  void multiply(const LinearArgs& args, const void* x, void* out, CudaStream& stream) {
    const Shape shape{round_to_tiles(args.rows), args.weight->rows, args.weight->columns,
                      args.out_fp32, args.residual != nullptr};
    const auto [plan, is_new] = plans.try_emplace(shape, nullptr);
    if (is_new) plan->second = std::make_unique<Plan>(handle, shape, activation);
    plan->second->run(handle, args, x, out, stream);
  }

  // The op as its parts, one after the other.
  void run(const LinearArgs& args, CudaStream& stream) {
    const void* x = args.x;
    if (args.norm.weight != nullptr) {
      rms_norm({.x = args.x,
                .weight = args.norm.weight,
                .eps = args.norm.eps,
                .rows = args.rows,
                .columns = args.weight->columns,
                .out = args.norm.scratch},
               activation, stream);
      x = args.norm.scratch;
    }
    if (can_multiply_few_rows(args)) return multiply_few_rows(args, x, activation, stream);
    void* product = args.swiglu.scratch != nullptr ? args.swiglu.scratch : args.out;
    multiply(args, x, product, stream);
    if (args.bias != nullptr) {
      add_bias(args.bias, args.rows, args.weight->rows, product,
               args.out_fp32 ? DataType::kFp32 : activation, stream);
    }
    if (product == args.out) return;
    swiglu(
        {.gate_up = product, .rows = args.rows, .columns = args.weight->rows / 2, .out = args.out},
        activation, stream);
  }

  DataType activation;
  cublasLtHandle_t handle = nullptr;
  std::map<Shape, std::unique_ptr<Plan>> plans;  // guarded by: one thread at a time
};

Linear::Linear(DataType activation) : impl_(std::make_unique<Impl>(activation)) {}
Linear::~Linear() = default;

void Linear::run(const LinearArgs& args, CudaStream& stream) {
  if (args.rows == 0) return;
  if (can_gemv(args)) return gemv(args, impl_->activation, stream);
  impl_->run(args, stream);
}

std::unique_ptr<Weight> make_cuda_weight(Device& device, DataType activation,
                                         std::span<const WeightPart> parts) {
  auto weight = std::make_unique<CudaWeight>();
  weight->columns = parts[0].columns;
  if (weight->columns % 8 != 0) {
    throw Exception(ErrorCode::kDevice, "a weight of " + std::to_string(weight->columns) +
                                            " columns: the CUDA device takes multiples of 8; "
                                            "serve with --device cpu, or on fewer ranks");
  }
  for (const WeightPart& part : parts) {
    FT_CHECK(part.columns == weight->columns, part.columns, weight->columns);
    weight->rows += part.rows;
  }
  const auto columns = static_cast<std::size_t>(weight->columns);
  const std::size_t row_bytes = columns * bytes_of(activation);
  weight->memory = {device, row_bytes * static_cast<std::size_t>(weight->rows),
                    MemoryUse::kWeights};
  auto* to = weight->memory.as<std::byte>();
  for (const WeightPart& part : parts) {
    const auto rows = static_cast<std::size_t>(part.rows);
    const std::size_t part_row_bytes = columns * bytes_of(part.type);
    DeviceBuffer staged;
    void* landing = to;
    if (part.type != activation) {
      staged = {device, part_row_bytes * rows, MemoryUse::kWeights};
      landing = staged.data();
    }
    device.upload(landing, {part.data, rows, part_row_bytes, part.row_stride_bytes});
    if (part.type != activation) {
      device.finish_uploads();
      convert(landing, part.type, rows * columns, to, activation);
    }
    to += row_bytes * rows;
  }
  return weight;
}

}  // namespace foretoken::kernels::cuda
