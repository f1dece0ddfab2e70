#include "worker/weight_keeper.h"

#include <chrono>
#include <exception>
#include <map>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "common/log.h"
#include "worker/load_progress.h"

namespace foretoken::worker {

// Hands out another source's tensors, and notes them.
class WeightKeeper::NotedSource final : public WeightSource {
 public:
  explicit NotedSource(std::unique_ptr<WeightSource> source) : source_(std::move(source)) {}
  std::string_view name() const override { return source_->name(); }
  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    FT_ASSIGN_OR_RETURN(TensorView view, source_->tensor(name, shape));
    tensors_.emplace(name, view);
    return view;
  }
  std::vector<NamedTensor> tensors() const {
    std::vector<NamedTensor> all;
    for (const auto& [name, view] : tensors_) all.push_back({name, view});
    return all;
  }

 private:
  std::unique_ptr<WeightSource> source_;
  mutable std::map<std::string, TensorView> tensors_;
};

namespace {

// With the store: a rank that ends waits for the thread that copies, which may wait for that.
constexpr std::chrono::seconds kPatience{10};

// Null where the store has no copy, or none that can be read.
std::unique_ptr<WeightSource> open_copy(kvstore::KeptWeights& kept) {
  const auto file = kept.find();
  if (!file) {
    if (file.error().code != ErrorCode::kNotFound) log().warn("{}", file.error().message);
    return nullptr;
  }
  auto weights = ModelWeights::open_file(*file);
  if (!weights) {
    log().warn("the store's copy of the weights can't be read: {}", weights.error().message);
    return nullptr;
  }
  return make_file_source(*std::move(weights), "the store");
}

}  // namespace

WeightKeeper::WeightKeeper(const std::string& store_socket, const std::string& model_hash,
                           const std::function<std::unique_ptr<WeightSource>()>& open) {
  auto kept = kvstore::KeptWeights::connect(store_socket, model_hash, kPatience);
  if (kept) {
    kept_ = *std::move(kept);
    copy_ = open_copy(*kept_);
  } else {
    log().warn("the weights are not kept: {}", kept.error().message);
  }
  if (copy_ == nullptr) noted_ = std::make_unique<NotedSource>(open());
}

WeightKeeper::~WeightKeeper() = default;

const WeightSource& WeightKeeper::source() const {
  if (copy_ != nullptr) return *copy_;
  return *noted_;
}

std::jthread WeightKeeper::keep() {
  try {
    return std::jthread([this](const std::stop_token& stop) { keep_now(stop); });
  } catch (const std::system_error& failure) {
    log().warn("the weights are not kept: {}", failure.what());
    let_go();
    return {};
  }
}

void WeightKeeper::keep_now(const std::stop_token& stop) {
  try {
    if (kept_ != nullptr && noted_ != nullptr) hand_over(stop);
  } catch (const std::exception& failure) {  // of memory or threads
    log().warn("the weights are not kept: {}", failure.what());
  }
  let_go();
}

void WeightKeeper::let_go() {
  kept_.reset();
  copy_.reset();
  noted_.reset();
}

void WeightKeeper::hand_over(const std::stop_token& stop) {
  const auto begun = std::chrono::steady_clock::now();
  const std::vector<NamedTensor> tensors = noted_->tensors();
  const std::string header = safetensors_header(tensors);
  std::vector<std::span<const std::byte>> pieces = {std::as_bytes(std::span(header))};
  std::int64_t bytes = 0;
  for (const NamedTensor& tensor : tensors) {
    pieces.push_back(tensor.view.bytes);
    bytes += static_cast<std::int64_t>(tensor.view.bytes.size());
  }
  const Status done = kept_->keep(pieces, stop);
  if (done) {
    log().info("weights: the store keeps a copy: {}",
               describe_load(bytes, std::chrono::steady_clock::now() - begun, noted_->name()));
  } else if (done.error().code == ErrorCode::kUnavailable) {  // another group's rank was first
    log().info("weights: no copy of this rank's: {}", done.error().message);
  } else if (done.error().code != ErrorCode::kCancelled) {
    log().warn("the weights are not kept: {}", done.error().message);
  }
}

}  // namespace foretoken::worker
