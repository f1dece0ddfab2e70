// RecordedSteps: steps that are the same work each time, recorded once and launched from then on.
// Those of a kind are alike. A recorded step takes device memory that nobody accounts for, so only
// the last used kinds are kept.
//
//   steps.run(kind, device, stream, [&] { ... enqueue the step ... });
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "kernels/device.h"

namespace foretoken::worker {

template <typename Kind>
class RecordedSteps {
 public:
  // most: kinds that are kept; more than come in turn, or none is launched a second time.
  explicit RecordedSteps(std::size_t most) : most_(most) {}

  // The first of its kind only runs, as Device::record() wants it. REQUIRES: what `ops` refers to
  // outlives this.
  void run(const Kind& kind, kernels::Device& device, kernels::Stream& stream,
           const std::function<void()>& ops) {
    const auto [found, is_first] = steps_.try_emplace(kind);
    Step& step = found->second;
    step.last_used = ++num_runs_;
    if (is_first) {
      forget_oldest();
      return ops();
    }
    if (step.graph == nullptr) step.graph = device.record(stream, ops);
    step.graph->launch(stream);
  }

 private:
  struct Step {
    std::unique_ptr<kernels::Graph> graph;  // null after the first of its kind
    std::uint64_t last_used = 0;
  };

  // A graph that still runs is freed when it has ended: CUDA sees to that (cuGraphExecDestroy).
  void forget_oldest() {
    if (steps_.size() <= most_) return;
    steps_.erase(std::ranges::min_element(
        steps_, {}, [](const auto& entry) { return entry.second.last_used; }));
  }

  const std::size_t most_;
  std::uint64_t num_runs_ = 0;
  std::map<Kind, Step> steps_;
};

}  // namespace foretoken::worker
