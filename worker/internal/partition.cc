#include "worker/partition.h"

#include <algorithm>
#include <string>

#include "common/check.h"

namespace foretoken::worker {
namespace {

// Boundaries that the GPU kernels' loads of a weight's row meet, where the size allows it.
constexpr int kUnit = 32;

// Where ranks outnumber KV heads: `rank` shares head `head` with `sharers` ranks as number `index`.
struct Share {
  int head = 0;
  int sharers = 1;
  int index = 0;
};

Share share_of(int rank, int world_size, int num_kv_heads) {
  for (int head = 0; head < num_kv_heads; ++head) {
    const Range ranks = split_evenly(world_size, num_kv_heads, head);
    if (rank < ranks.end()) return {head, ranks.count, rank - ranks.begin};
  }
  FT_CHECK(false, rank, world_size, num_kv_heads);
}

}  // namespace

Range split_evenly(int total, int parts, int index, int unit) {
  FT_CHECK(parts > 0 && index >= 0 && index < parts, parts, index);
  if (unit > 1 && total % unit == 0 && total / unit >= parts) {
    const Range units = split_evenly(total / unit, parts, index);
    return {units.begin * unit, units.count * unit};
  }
  const int base = total / parts;
  const int rest = total % parts;
  return {index * base + std::min(index, rest), base + (index < rest ? 1 : 0)};
}

Result<Partition> make_partition(const ModelConfig& model, int rank, int world_size) {
  const int num_kv_heads = static_cast<int>(model.num_kv_heads);
  const int group = static_cast<int>(model.num_heads / model.num_kv_heads);
  Partition part;
  part.rank = rank;
  part.world_size = world_size;
  part.intermediate =
      split_evenly(static_cast<int>(model.intermediate_size), world_size, rank, kUnit);
  part.vocab = split_evenly(static_cast<int>(model.vocab_size), world_size, rank, kUnit);
  if (world_size <= num_kv_heads) {
    part.kv_heads = split_evenly(num_kv_heads, world_size, rank);
    part.heads = {part.kv_heads.begin * group, part.kv_heads.count * group};
    return part;
  }
  const Share share = share_of(rank, world_size, num_kv_heads);
  const int most_sharers = split_evenly(world_size, num_kv_heads, 0).count;
  if (most_sharers > group) {
    return Error{ErrorCode::kConfig, "--tensor-parallel-size " + std::to_string(world_size) +
                                         " is too large: " + std::to_string(num_kv_heads) +
                                         " KV heads of " + std::to_string(group) +
                                         " query heads each can be split over at most " +
                                         std::to_string(num_kv_heads * group) + " ranks"};
  }
  const Range queries = split_evenly(group, share.sharers, share.index);
  part.kv_heads = {share.head, 1};
  part.heads = {share.head * group + queries.begin, queries.count};
  part.writes_kv = share.index == 0;
  return part;
}

}  // namespace foretoken::worker
