// Which of a node's GPUs a rank takes: each rank of a group its own.
#pragma once

#include <string>
#include <vector>

#include "common/result.h"

namespace foretoken::worker {

struct GpuPlace {
  int group = 0;
  int rank_on_node = 0;
  int ranks_on_node = 1;  // of this group
  int num_devices = 0;    // that this rank sees
};

// The device's number. Groups of one node take different GPUs where there are enough. One alone is
// taken by every rank that sees it: a launcher may show each another one (check_own_gpu tells).
// Error: kDevice, naming both counts.
Result<int> choose_gpu(const GpuPlace& place);

// ids: of the GPUs that the group's ranks of this node chose, in order. Error: kDevice when this
// rank's is another's, too.
Status check_own_gpu(const std::vector<std::string>& ids, int rank_on_node);

}  // namespace foretoken::worker
