// How long ops take on a device, for benchmarks, by the host's clock.
//
// REQUIRES of all functions: nothing else is enqueued on the stream meanwhile.
// Example: tests/kernels/device_test.cc
#pragma once

#include <chrono>
#include <functional>

#include "kernels/device.h"

namespace foretoken::kernels {

using Milliseconds = std::chrono::duration<double, std::milli>;

// What `ops` enqueues on `stream`, from an idle stream to an idle stream.
Milliseconds time_once(Stream& stream, const std::function<void()>& ops);

// The quickest of a few launches, since what else the machine does can only lengthen one.
Milliseconds time_launch(Graph& graph, Stream& stream);

// One of ops(0) ... ops(repeats - 1), recorded as one graph: so the host's calls are not in it.
// Runs ops(0) first, by itself. REQUIRES: as Device::record.
Milliseconds time_recorded(Device& device, Stream& stream, int repeats,
                           const std::function<void(int)>& ops);

}  // namespace foretoken::kernels
