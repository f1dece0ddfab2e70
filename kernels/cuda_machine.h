// What a machine's GPUs are driven by, and how they reach each other: for `foretoken doctor`, and
// for the words of an error. In a program without CUDA there are none.
#pragma once

#include <string>

namespace foretoken::kernels {

// As CUDA numbers them: 13000 is 13.0.
struct CudaVersions {
  int driver = 0;   // the newest that the driver takes; 0: none is loaded
  int program = 0;  // what this program was built with; 0: without CUDA
};
CudaVersions cuda_versions();
std::string cuda_version_name(int version);

// Empty where the driver is new enough: it takes programs of its own major version and of older
// ones. REQUIRES: a driver is loaded.
std::string why_driver_is_too_old(const CudaVersions& versions);

// Where it is on the PCI bus, as /sys names it: 0000:1b:00.0. Throws Exception(kDevice).
std::string cuda_pci_address(int index);

struct PeerLink {
  bool is_reached = false;  // kernels of the one GPU may use memory of the other
  int rank = 0;             // the driver's order of such links, best first
  double bytes_per_s = 0;   // of copies; where it isn't reached, they go by way of the host
  double seconds = 0;       // of a copy of 16 bytes behind others
};
// Copies from one GPU to another. Takes some 10 ms, and the first time for a GPU a second. Throws
// Exception(kDevice).
PeerLink measure_peer_link(int from, int to);

}  // namespace foretoken::kernels
