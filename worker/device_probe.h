// What `foretoken-worker --probe-devices` says of this machine's GPUs, for `foretoken doctor`: the
// command itself links no CUDA.
#pragma once

#include <string>

namespace foretoken::worker {

// One JSON object in one line:
//   {"cuda": {"driver": "13.0", "program": "13.0", "too_old": ""},  driver: null without one;
//    "nccl": {"loaded": "2.28.3", "built": "2.28.9", "too_old": ""},  too_old: why it is
//    "why_none": "",                                     why there are no devices
//    "devices": [{"index": 0, "name": "NVIDIA H200", "pci_address": "0000:1b:00.0",
//                 "memory_bytes": ..., "compute_units": 132, "to_device_bytes_per_s": ...,
//                 "from_device_bytes_per_s": ...}],
//    "links": [{"from": 0, "to": 1, "reached": true, "rank": 0, "bytes_per_s": ...,
//               "seconds": ...}],                        kernels::PeerLink of each pair
//    "pinned": {"bytes": ..., "wanted_bytes": ..., "seconds": ..., "error": ""}}
// A device or link that can't be used has "error" instead of its figures. "cuda" and "nccl" are
// null in a program without CUDA; "pinned" is, where no device can be used. Takes about a second a
// device, and 2 s at most to pin: as the KV arena is, but no more than 4 GiB, and a quarter of what
// is free.
std::string probe_devices();

}  // namespace foretoken::worker
