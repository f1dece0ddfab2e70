// PrefillAttention over cuDNN. The cudnn-frontend headers take most of a minute to compile, so they
// are included here alone. libcudnn is loaded when a GPU is there to use it, not linked.
#include "kernels/cuda/prefill_attention.h"

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <list>
#include <mutex>
#include <string>
#include <unordered_map>

#include "common/check.h"
#include "kernels/cuda/cuda_check.h"

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
  std::int64_t rows;
  std::int64_t max_rows;
  std::int64_t tokens;  // begin + rows
  std::int64_t scratch_tokens;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  DataType type;
  float scale;
  bool with_lse;
  bool operator==(const Shape&) const = default;
};

enum TensorId : std::int64_t { kQ = 1, kK, kV, kOut, kLse };

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
  // A plan takes 76 ms to make (docs/measurements.md). The layers of a chunk share one, as do
  // prompts that are cut alike. More than a layer has chunks, or none would be found again: enough
  // for four million tokens at 8,192 a step. What a plan takes of memory is not measured.
  static constexpr std::size_t kMaxPlans = 512;

  std::mutex mutex;  // guards all below: streams share the handle
  cudnnHandle_t handle = nullptr;
  std::list<Plan> plans;  // the last used first

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

  // Its kernel may be queued, on the stream that all of prefill is on.
  void forget_oldest(CudaStream& stream) {
    stream.synchronize();
    plans.pop_back();
  }

  Plan& plan_for(const Shape& shape, CudaStream& stream) {
    for (auto plan = plans.begin(); plan != plans.end(); ++plan) {
      if (plan->shape != shape) continue;
      plans.splice(plans.begin(), plans, plan);
      return *plan;
    }
    std::list<Plan> made;
    Plan& plan = made.emplace_back();
    plan.shape = shape;
    describe(shape, plan.graph);
    check_cudnn(plan.graph.build(handle, {fe::HeurMode_t::A}), "no plan for prefill attention");
    check_cudnn(plan.graph.get_workspace_size(plan.workspace_bytes), "workspace");
    if (plans.size() == kMaxPlans) forget_oldest(stream);
    plans.splice(plans.begin(), made);
    return plan;
  }

  void run(const PrefillAttentionArgs& args, const Shape& shape, CudaStream& stream) {
    const std::scoped_lock lock(mutex);
    check_cudnn(fe::detail::set_stream(handle, stream.handle()), "cudnnSetStream");
    const Plan& plan = plan_for(shape, stream);
    std::unordered_map<std::int64_t, void*> tensors = {{kQ, const_cast<void*>(args.q)},
                                                       {kK, const_cast<void*>(args.k)},
                                                       {kV, const_cast<void*>(args.v)},
                                                       {kOut, args.out}};
    if (shape.with_lse) tensors.emplace(kLse, args.lse);
    void* workspace = stream.scratch(static_cast<std::size_t>(plan.workspace_bytes));
    check_cudnn(plan.graph.execute(handle, tensors, workspace), "prefill attention");
  }
};

PrefillAttention::PrefillAttention() : impl_(std::make_unique<Impl>()) {}
PrefillAttention::~PrefillAttention() = default;

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
  const Shape shape = {.rows = args.rows,
                       .max_rows = args.max_rows,
                       .tokens = args.begin + args.rows,
                       .scratch_tokens = args.scratch_tokens,
                       .num_heads = args.num_heads,
                       .num_kv_heads = args.num_kv_heads,
                       .head_dim = args.head_dim,
                       .type = activation,
                       .scale = args.scale,
                       .with_lse = args.lse != nullptr};
  try {
    impl_->run(args, shape, stream);
  } catch (const Exception&) {
    throw;
  } catch (const std::exception& error) {  // the headers throw what libcudnn lacks
    throw Exception(ErrorCode::kDevice, std::string("cuDNN: ") + error.what());
  }
}

}  // namespace foretoken::kernels::cuda
