// WeightKeeper: a rank's weights under --keep-weights. It loads from the copy in the store's memory
// where there is one, else from where they come without it; then rank 0 of a group, which is asked
// for every tensor, has the store keep what it loaded (docs/decisions/008-weights-in-the-store.md).
//
// The copy is a safetensors file: a header, then the tensors that were asked for. Whatever keeps it
// from being read or made is logged, and costs the next start its speed.
//
// Example: tests/worker/weight_keeper_test.cc
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "kvstore/kept_weights.h"
#include "worker/model.h"

namespace foretoken::worker {

class WeightKeeper {
 public:
  // `open` makes the source for where there is no copy.
  WeightKeeper(const std::string& store_socket, const std::string& model_hash,
               const std::function<std::unique_ptr<WeightSource>()>& open);
  ~WeightKeeper();
  WeightKeeper(const WeightKeeper&) = delete;
  WeightKeeper& operator=(const WeightKeeper&) = delete;

  // For one thread, until keep().
  const WeightSource& source() const;

  // Has the store keep the tensors that source() was asked for, unless they came from there; at its
  // end lets go of the source. The thread is stopped before this is destroyed. Call it once.
  std::jthread keep();

 private:
  class NotedSource;
  void keep_now(const std::stop_token& stop);
  void hand_over(const std::stop_token& stop);
  void let_go();

  std::unique_ptr<kvstore::KeptWeights> kept_;  // null: the store doesn't answer, or it is done
  std::unique_ptr<WeightSource> copy_;          // the store's; or null, and:
  std::unique_ptr<NotedSource> noted_;
};

}  // namespace foretoken::worker
