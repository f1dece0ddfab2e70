// LocalGroup: a worker group of one rank, with a real store process, run by a test instead of a
// coordinator. Plans are made the way the coordinator makes them.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/prefix_key.h"
#include "worker/engine.h"

namespace foretoken::worker {

// A store process in a folder of its own; both end with this.
class StoreProcess {
 public:
  // nvme_bytes: of its NVMe tier; 0: none.
  explicit StoreProcess(std::int64_t arena_bytes, std::int64_t nvme_bytes = 0);
  ~StoreProcess();
  StoreProcess(const StoreProcess&) = delete;
  StoreProcess& operator=(const StoreProcess&) = delete;
  std::string socket() const { return (folder_ / "store.sock").string(); }
  // A byte of the arena, behind everybody's back.
  void damage(std::size_t offset, std::byte flipped) const;

 private:
  std::filesystem::path folder_;
  int pid_ = 0;
};

struct Answer {
  std::vector<TokenId> tokens;
  std::vector<TokenInfo> infos;
  std::int64_t reused_tokens = 0;
  KvReport report;
};

class LocalGroup {
 public:
  // A model of the config's shape; weights: null for random ones.
  LocalGroup(const ServiceConfig& config, const ModelConfig& model, const StoreProcess& store,
             kernels::HistoryType history = kernels::HistoryType::kBf16,
             std::unique_ptr<Collective> collective = make_single_collective(),
             std::unique_ptr<WeightSource> weights = nullptr);
  ~LocalGroup();

  struct Options {
    int max_tokens = 16;
    int spare_tokens = 0;     // that it could grow by beyond these
    bool publish = false;     // make the prompt's segments reusable at the end
    int tokens_per_item = 0;  // prefill in pieces of a layer; 0: whole layers at once
    std::vector<TokenId> forced_ids = {};
    std::optional<int> spill_at = {};  // policy auto: the first sequence, before this decode step
  };
  Answer generate(const std::vector<TokenId>& prompt, const Options& options);
  // Several at once, decoding in one batch.
  std::vector<Answer> generate_batch(const std::vector<std::vector<TokenId>>& prompts,
                                     const Options& options);
  // Step by step.
  static AdmitSequence admission(SequenceId id, const std::vector<TokenId>& prompt,
                                 const Options& options);
  StepResult run(StepPlan plan);
  // The two halves of run(): a plan may be launched before the one ahead of it is collected.
  void launch(StepPlan plan);
  StepResult collect() { return engine_->collect(); }
  kvstore::StoreStat store_stat() { return store_->stat().value_or_throw(); }
  kernels::Device& device() { return *device_; }
  Engine& engine() { return *engine_; }
  void warm_up() { engine_->warm_up(); }

 private:
  std::int64_t admit(SequenceId id, const std::vector<TokenId>& prompt, const Options& options);
  TokenInfo prefill(SequenceId id, int length, std::int64_t reused, const Options& options);

  ModelConfig model_config_;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<Collective> collective_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<predictor::Policy> policy_;
  std::unique_ptr<kvstore::KvStore> store_;
  std::unique_ptr<Engine> engine_;
  std::uint64_t next_step_ = 1;
  std::uint64_t next_sequence_ = 1;
};

// Settings of a test's group. On a GPU: FORETOKEN_TEST_DEVICE=cuda worker_test
ServiceConfig service(const std::string& policy, int budget = 1024);
// Of ids below 512.
std::vector<TokenId> random_prompt(int length, unsigned seed);
// Equal up to the first place where the better answer was a close call.
void expect_same(const Answer& expected, const Answer& actual);

// Keys of the segments of a prompt that may be reused.
std::vector<PrefixKey> dense_keys(const std::vector<TokenId>& prompt);

}  // namespace foretoken::worker
