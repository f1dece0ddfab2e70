// foretoken bench gather|predictor: what the worker's program measures on the device, without a
// service.
#pragma once

#include "launch/internal/cli.h"

namespace foretoken::launch {

// Adds them to `foretoken bench`.
void add_device_benches(CLI::App& bench, Action& action);

}  // namespace foretoken::launch
