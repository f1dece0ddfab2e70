// What `foretoken-worker --probe-devices` says of this machine's GPUs, for `foretoken doctor`: the
// command itself links no CUDA.
#pragma once

#include <string>

namespace foretoken::worker {

// One JSON object in one line:
//   {"nccl": "2.28.3", "devices": [{"index": 0, "name": "NVIDIA H200", "memory_bytes": ...,
//    "compute_units": 132, "to_device_bytes_per_s": ..., "from_device_bytes_per_s": ...}]}
// A device that can't be used has "index" and "error" instead. Takes about a second a device.
std::string probe_devices();

}  // namespace foretoken::worker
