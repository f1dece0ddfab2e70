// PrefillAttention over cuDNN. The cudnn-frontend headers take most of a minute to compile, so they
// are included here alone. libcudnn is loaded when a GPU is there to use it, not linked.
//
// A plan takes up to 76 ms to make (docs/measurements.md), nearly all of it the compilation of a
// kernel, and nobody gets a token meanwhile. cuDNN 9.14 has no dynamic shapes for attention, so
// there are plans of two kinds:
//   exact   3 to 10 % faster, for chunks that come again and again: whole ones that begin at a
//           multiple of their size, as a prompt has them that nothing cuts
//   padded  for the others, which are cut anywhere: keys are the whole scratch, and the lengths
//           that count are read on the device (cuDNN's padding mask), where the causal mask's
//           diagonal ends too. All rows of the plan are computed, so there are several sizes.
// Both kinds are few enough that none needs to be forgotten, and that all can be made at the start.
#include "kernels/cuda/prefill_attention.h"

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <list>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/ops.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // declared by the headers, which look up libcudnn's symbols in it
}  // namespace cudnn_frontend

namespace foretoken::kernels::cuda {
namespace {

namespace fe = cudnn_frontend;

constexpr std::size_t kOldestVersion = 91400;  // 9.14: the oldest that was tried

std::string version_text(std::size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

void* load_cudnn() {
  constexpr const char* kLibrary = "libcudnn.so.9";
  void* library = dlopen(kLibrary, RTLD_NOW);
  if (library == nullptr) {
    throw Exception(ErrorCode::kDevice, std::string(kLibrary) + " can't be loaded (" + dlerror() +
                                            "): install cuDNN " + version_text(kOldestVersion) +
                                            " or later");
  }
  const auto get_version = reinterpret_cast<std::size_t (*)()>(dlsym(library, "cudnnGetVersion"));
  const std::size_t version = get_version == nullptr ? 0 : get_version();
  if (version < kOldestVersion) {
    dlclose(library);
    throw Exception(ErrorCode::kDevice, std::string(kLibrary) + " is version " +
                                            version_text(version) + "; Foretoken needs " +
                                            version_text(kOldestVersion) + " or later");
  }
  return library;
}

void check_cudnn(fe::error_t error, const char* what) {
  if (error.is_good()) return;
  throw Exception(ErrorCode::kDevice, std::string("cuDNN: ") + what + ": " + error.get_message());
}
void check_cudnn(cudnnStatus_t status, const char* what) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  throw Exception(ErrorCode::kDevice,
                  std::string("cuDNN: ") + what + ": " + fe::detail::get_error_string(status));
}

// What a plan is made for.
struct Shape {
  bool padded;
  std::int64_t rows;
  std::int64_t tokens;
  std::int64_t max_rows;
  std::int64_t scratch_tokens;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  DataType type;
  float scale;
  bool with_lse;
  bool operator==(const Shape&) const = default;
};

enum TensorId : std::int64_t { kQ = 1, kK, kV, kOut, kLse, kRows, kTokens };

PrefillShape common_shape(const PrefillAttentionArgs& args) {
  return {.kv_type = args.kv_type,
          .scratch_tokens = args.scratch_tokens,
          .max_rows = args.max_rows,
          .num_heads = args.num_heads,
          .num_kv_heads = args.num_kv_heads,
          .head_dim = args.head_dim,
          .scale = args.scale,
          .with_lse = args.lse != nullptr};
}

Shape shape_with(const PrefillShape& common, bool padded, int rows, int tokens) {
  return {.padded = padded,
          .rows = rows,
          .tokens = tokens,
          .max_rows = common.max_rows,
          .scratch_tokens = common.scratch_tokens,
          .num_heads = common.num_heads,
          .num_kv_heads = common.num_kv_heads,
          .head_dim = common.head_dim,
          .type = common.kv_type,
          .scale = common.scale,
          .with_lse = common.with_lse};
}

// Eleven sizes where 8,192 rows have room.
Shape padded_shape(const PrefillShape& common, int rows) {
  constexpr int kLeast = 128;
  constexpr int kStep = 1024;
  const int rounded = rows <= kStep ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(rows)))
                                    : (rows + kStep - 1) / kStep * kStep;
  return shape_with(common, true, std::min(common.max_rows, std::max(kLeast, rounded)),
                    common.scratch_tokens);
}

constexpr int kMostExact = 64;  // what a plan takes of memory is not measured

// Of the whole chunk that begins at this multiple of its size.
Shape exact_shape(const PrefillShape& common, int multiple) {
  return shape_with(common, false, common.max_rows, (multiple + 1) * common.max_rows);
}

Shape shape_for(const PrefillAttentionArgs& args) {
  const int multiple = args.begin / args.max_rows;
  const bool is_exact =
      args.rows == args.max_rows && args.begin % args.max_rows == 0 && multiple < kMostExact;
  return is_exact ? exact_shape(common_shape(args), multiple)
                  : padded_shape(common_shape(args), args.rows);
}

// Of every chunk that there can be.
std::vector<Shape> all_shapes(const PrefillShape& common) {
  std::vector<Shape> shapes;
  for (int rows = 1; rows <= common.max_rows; rows = static_cast<int>(shapes.back().rows) + 1) {
    shapes.push_back(padded_shape(common, rows));
  }
  const int whole = std::min(kMostExact, common.scratch_tokens / common.max_rows);
  for (int multiple = 0; multiple < whole; ++multiple) {
    shapes.push_back(exact_shape(common, multiple));
  }
  return shapes;
}

struct Plan {
  Shape shape;
  fe::graph::Graph graph;
  std::int64_t workspace_bytes = 0;
};

using Strides = std::vector<std::int64_t>;
fe::graph::Tensor_attributes input(TensorId id, const char* name, const Strides& dims,
                                   const Strides& strides) {
  return fe::graph::Tensor_attributes().set_uid(id).set_name(name).set_dim(dims).set_stride(
      strides);
}

fe::graph::Tensor_attributes length(TensorId id, const char* name) {
  return input(id, name, {1, 1, 1, 1}, {1, 1, 1, 1}).set_data_type(fe::DataType_t::INT32);
}

// [batch = 1, heads, tokens, head_dim] of what PrefillAttentionArgs describes.
void describe(const Shape& s, fe::graph::Graph& graph) {
  const Strides q_dims = {1, s.num_heads, s.rows, s.head_dim};
  const Strides q_strides = {s.rows * s.num_heads * s.head_dim, s.head_dim,
                             s.num_heads * s.head_dim, 1};
  const Strides k_dims = {1, s.num_kv_heads, s.tokens, s.head_dim};
  const Strides k_strides = {s.num_kv_heads * s.scratch_tokens * s.head_dim,
                             s.scratch_tokens * s.head_dim, s.head_dim, 1};
  graph.set_io_data_type(s.type == DataType::kBf16 ? fe::DataType_t::BFLOAT16
                                                   : fe::DataType_t::HALF);
  graph.set_intermediate_data_type(fe::DataType_t::FLOAT);
  graph.set_compute_data_type(fe::DataType_t::FLOAT);
  auto attention = fe::graph::SDPA_attributes();
  attention.set_name("prefill_attention").set_generate_stats(s.with_lse).set_attn_scale(s.scale);
  if (s.padded) {
    attention.set_padding_mask(true)
        .set_seq_len_q(graph.tensor(length(kRows, "rows")))
        .set_seq_len_kv(graph.tensor(length(kTokens, "tokens")));
  }
  if (s.rows > 1) {  // one row sees all tokens
    attention.set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT)
        .set_diagonal_band_right_bound(0);
  }
  const auto [out, lse] = graph.sdpa(graph.tensor(input(kQ, "q", q_dims, q_strides)),
                                     graph.tensor(input(kK, "k", k_dims, k_strides)),
                                     graph.tensor(input(kV, "v", k_dims, k_strides)), attention);
  out->set_uid(kOut).set_output(true).set_dim(q_dims).set_stride(q_strides);
  if (!s.with_lse) return;
  lse->set_uid(kLse).set_output(true).set_data_type(fe::DataType_t::FLOAT);
  lse->set_dim({1, s.num_heads, s.rows, 1})
      .set_stride({s.num_heads * s.max_rows, s.max_rows, 1, 1});
}

}  // namespace

struct PrefillAttention::Impl {
  std::mutex mutex;  // guards all below: streams share the handle
  cudnnHandle_t handle = nullptr;
  std::list<Plan> plans;

  Impl() {
    static void* const library = load_cudnn();
    fe::cudnn_dlhandle = library;
    check_cudnn(fe::detail::create_handle(&handle), "cudnnCreate");
  }
  ~Impl() {
    plans.clear();
    try {
      fe::detail::destroy_handle(handle);
    } catch (const std::exception&) {
      // libcudnn lacks the call, so there is no way to give the handle back.
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const Plan& plan_for(const Shape& shape) {
    for (const Plan& plan : plans) {
      if (plan.shape == shape) return plan;
    }
    std::list<Plan> made;
    Plan& plan = made.emplace_back();
    plan.shape = shape;
    describe(shape, plan.graph);
    check_cudnn(plan.graph.build(handle, {fe::HeurMode_t::A}), "no plan for prefill attention");
    check_cudnn(plan.graph.get_workspace_size(plan.workspace_bytes), "workspace");
    plans.splice(plans.begin(), made);
    return plan;
  }

  // What can't be made here is left to whoever needs it, and to whom plan_for() says why.
  void prepare(const std::vector<Shape>& shapes, int device, const std::stop_token& stop) {
    if (cudaSetDevice(device) != cudaSuccess) return;
    for (const Shape& shape : shapes) {
      if (stop.stop_requested()) return;
      try {
        const std::scoped_lock lock(mutex);
        plan_for(shape);
      } catch (const std::exception&) {
        return;
      }
    }
  }

  void run(const PrefillAttentionArgs& args, CudaStream& stream) {
    const std::scoped_lock lock(mutex);
    check_cudnn(fe::detail::set_stream(handle, stream.handle()), "cudnnSetStream");
    const Shape shape = shape_for(args);
    const Plan& plan = plan_for(shape);
    constexpr std::size_t kLengthsBytes = 256;  // of scratch, so that the workspace is aligned
    std::byte* const scratch =
        stream.scratch(kLengthsBytes + static_cast<std::size_t>(plan.workspace_bytes));
    std::unordered_map<std::int64_t, void*> tensors = {{kQ, const_cast<void*>(args.q)},
                                                       {kK, const_cast<void*>(args.k)},
                                                       {kV, args.v},
                                                       {kOut, args.out}};
    if (shape.with_lse) tensors.emplace(kLse, args.lse);
    if (shape.padded) {
      auto* const lengths = reinterpret_cast<std::int32_t*>(scratch);
      begin_prefill_attention(args, lengths, stream);
      tensors.emplace(kRows, lengths);
      tensors.emplace(kTokens, lengths + 1);
    }
    void* const workspace = scratch + kLengthsBytes;
    check_cudnn(plan.graph.execute(handle, tensors, workspace), "prefill attention");
  }
};

PrefillAttention::PrefillAttention() : impl_(std::make_unique<Impl>()) {}
PrefillAttention::~PrefillAttention() = default;

std::size_t PrefillAttention::num_plans() const {
  const std::scoped_lock lock(impl_->mutex);
  return impl_->plans.size();
}

std::jthread PrefillAttention::prepare(const PrefillShape& shape) {
  FT_CHECK(shape.max_rows > 0, shape.max_rows);
  int device = 0;
  FT_CUDA(cudaGetDevice(&device));
  return std::jthread([this, device, shapes = all_shapes(shape)](const std::stop_token& stop) {
    impl_->prepare(shapes, device, stop);
  });
}

void PrefillAttention::run(const PrefillAttentionArgs& args, DataType activation,
                           CudaStream& stream) {
  FT_CHECK(args.kv_type != DataType::kFp32);
  FT_CHECK(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0, args.num_heads,
           args.num_kv_heads);
  FT_CHECK(args.rows <= args.max_rows, args.rows, args.max_rows);
  FT_CHECK(args.begin + args.rows <= args.scratch_tokens, args.begin, args.rows,
           args.scratch_tokens);
  if (args.kv_type != activation) {
    throw Exception(ErrorCode::kDevice,
                    "the KV type is " + std::string(name_of(args.kv_type)) + ", the activations' " +
                        std::string(name_of(activation)) + ": cuDNN's attention wants one type");
  }
  if (args.rows == 0) return;
  try {
    impl_->run(args, stream);
  } catch (const Exception&) {
    throw;
  } catch (const std::exception& error) {  // the headers throw what libcudnn lacks
    throw Exception(ErrorCode::kDevice, std::string("cuDNN: ") + error.what());
  }
}

}  // namespace foretoken::kernels::cuda
