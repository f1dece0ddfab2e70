#include "predictor/internal/policy_state.h"

namespace foretoken::predictor {
namespace {

// Hands out aligned parts of one allocation; with a null base it only counts.
class Parts {
 public:
  explicit Parts(std::byte* base) : base_(base) {}

  template <typename T>
  T* take(std::size_t count) {
    constexpr std::size_t kAlignment = 64;
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace

PolicyState PolicyStateMaker::lay_out(int max_tokens, std::byte* base, std::size_t* bytes) const {
  const auto layers = static_cast<std::size_t>(shape_.kv.num_layers);
  const std::size_t heads = layers * static_cast<std::size_t>(shape_.kv.num_kv_heads);
  Parts parts(base);
  PolicyState state;
  state.selection.max_selected = maps_.max_per_head;
  state.selection.counts = parts.take<std::int32_t>(heads);
  state.selection.blocks =
      parts.take<std::int32_t>(heads * static_cast<std::size_t>(maps_.max_per_head));
  if (history_) {
    kernels::HistoryState& history = state.history;
    history.num_layers = shape_.kv.num_layers;
    history.num_kv_heads = shape_.kv.num_kv_heads;
    history.maps_per_kv_head = maps_.per_kv_head;
    history.max_columns = blocks_for(max_tokens);
    history.pitch = (history.max_columns + 7) / 8 * 8;
    history.top_k = maps_.top_k;
    history.max_per_head = maps_.max_per_head;
    history.type = static_cast<std::int32_t>(*history_);
    const std::size_t maps = heads * static_cast<std::size_t>(maps_.per_kv_head);
    history.num_rows = parts.take<std::int64_t>(layers);
    history.num_columns = parts.take<std::int32_t>(layers);
    history.fallbacks = parts.take<std::uint32_t>(1);
    history.stream =
        parts.take<std::byte>(maps * device_.predictor_state_bytes(history.max_columns));
    history.rows =
        parts.take<std::byte>(maps * kernels::kRingRows * static_cast<std::size_t>(history.pitch) *
                              kernels::bytes_of(*history_));
  }
  *bytes = parts.used();
  return state;
}

std::size_t PolicyStateMaker::bytes(int max_tokens) const {
  std::size_t bytes = 0;
  lay_out(max_tokens, nullptr, &bytes);
  return bytes;
}

std::unique_ptr<PolicyState> PolicyStateMaker::make(int max_tokens, kernels::Stream& stream) const {
  kernels::DeviceBuffer memory(device_, bytes(max_tokens), kernels::MemoryUse::kHistory);
  device_.fill_zero(memory.data(), memory.bytes(), stream);
  std::size_t unused = 0;
  auto state = std::make_unique<PolicyState>(lay_out(max_tokens, memory.as<std::byte>(), &unused));
  state->memory = std::move(memory);
  return state;
}

}  // namespace foretoken::predictor
