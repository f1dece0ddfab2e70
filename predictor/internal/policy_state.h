// Where a policy's state of one sequence lies in its one allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "kernels/device.h"
#include "predictor/policy.h"

namespace foretoken::predictor {

// How a policy looks at attention and how much it may choose.
struct Maps {
  int per_kv_head = 1;
  int top_k = 0;         // chosen a map
  int max_per_head = 0;  // chosen a KV head
};

class PolicyStateMaker {
 public:
  // history: nullopt where the policy keeps none.
  PolicyStateMaker(kernels::Device& device, const PolicyShape& shape, const Maps& maps,
                   std::optional<kernels::HistoryType> history)
      : device_(device), shape_(shape), maps_(maps), history_(history) {}

  std::size_t bytes(int max_tokens) const;
  // All zeros: no rows, no sums, nothing chosen.
  std::unique_ptr<PolicyState> make(int max_tokens, kernels::Stream& stream) const;

 private:
  PolicyState lay_out(int max_tokens, std::byte* base, std::size_t* bytes) const;

  kernels::Device& device_;
  PolicyShape shape_;
  Maps maps_;
  std::optional<kernels::HistoryType> history_;
};

}  // namespace foretoken::predictor
