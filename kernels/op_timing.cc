#include "kernels/op_timing.h"

#include <algorithm>

namespace foretoken::kernels {

Milliseconds time_once(Stream& stream, const std::function<void()>& ops) {
  stream.synchronize();
  const auto begin = std::chrono::steady_clock::now();
  ops();
  stream.synchronize();
  return std::chrono::steady_clock::now() - begin;
}

Milliseconds time_launch(Graph& graph, Stream& stream) {
  constexpr int kLaunches = 4;
  Milliseconds best = Milliseconds::max();
  for (int i = 0; i < kLaunches; ++i) {
    best = std::min(best, time_once(stream, [&] { graph.launch(stream); }));
  }
  return best;
}

Milliseconds time_recorded(Device& device, Stream& stream, int repeats,
                           const std::function<void(int)>& ops) {
  ops(0);
  stream.synchronize();
  const auto graph = device.record(stream, [&] {
    for (int i = 0; i < repeats; ++i) ops(i);
  });
  return time_launch(*graph, stream) / repeats;
}

}  // namespace foretoken::kernels
