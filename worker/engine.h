// Engine: runs a group's numbered plans on this rank, one after the other, and says what came of
// each. Every rank of a group runs the same plans and so draws the same tokens.
//
// Called by the step thread alone. Throws Exception where the rank can't go on (device, MPI, a plan
// that contradicts the ones before it).
#pragma once

#include <array>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <string>

#include "common/messages.h"
#include "common/service_config.h"
#include "kvstore/kv_store.h"
#include "predictor/policy.h"
#include "worker/collective.h"
#include "worker/decode.h"
#include "worker/model.h"
#include "worker/prefill.h"
#include "worker/sampler.h"

namespace foretoken::worker {

// Where the blocks of `full` lie. Ranks of a group must launch the same ops (Decode::recordable),
// and each knows its own device alone: so where there are several, none streams because that is
// full.
predictor::Residency residency_of(const ServiceConfig& config, const kernels::Device& device);

class Engine {
 public:
  struct Parts {
    kernels::Device& device;
    kvstore::KvStore& store;
    predictor::Policy& policy;
    Model& model;
  };
  // max_model_len: tokens; resolved, not 0, as is config.max_batched_tokens.
  Engine(const ServiceConfig& config, int max_model_len, const Parts& parts);
  ~Engine();

  // Before the first plan, so that no sequence waits for what others' prompts run first.
  void warm_up();

  // Whether launch() waits for nothing, or for little: neither for the step before nor for a disk.
  // REQUIRES: the plan's sequences are here, but for those that it admits.
  bool only_computes(const StepPlan& plan);
  // Enqueues the plan's work, and does what needs no device. At most two plans may be launched and
  // not collected.
  void launch(const StepPlan& plan);
  // Waits for the oldest plan that was launched. REQUIRES: there is one.
  StepResult collect();
  bool has_launched() const { return !pending_.empty(); }
  // Whether the oldest plan's work is done: collect() will not wait.
  bool has_ended() const;
  // Whether launch() returns before the work is done.
  bool runs_ahead() const { return !device_.runs_at_once(); }

  // What this rank can hold, for Ready; epoch, group, rank and hash are the caller's to fill in.
  Ready capacity() const;
  // What the device's memory is planned for, as a table for people.
  std::string memory_plan() const;

 private:
  // A plan that was launched: what is known of its result, and what is still being drawn.
  struct Pending {
    StepResult result;
    std::vector<Sampler::Draw*> draws;
    kernels::Event* ended = nullptr;
    std::chrono::steady_clock::time_point launched;
    kvstore::PrefillTimes prefilled;
    bool times_step = false;  // `prefilled` is yet without the step's time
  };

  void drain();
  bool is_outsized(SequenceId id) { return find(id).outsized() != nullptr; }
  void wait_for(kernels::Event& ended);
  void release(SequenceId id, StepResult& result);
  void publish(const PublishSegment& segment);
  void publish_written(Sequence& sequence);
  void spill(SequenceId id);
  KvSlabs count_slabs() const;
  AdmitResult admit(const AdmitSequence& admit);
  AdmitResult start(const StartSequence& start);
  void note_lost(const StepPlan& plan, StepResult& result);
  void prefill(const PrefillItem& item, Pending& pending);
  void time_prefill(const Sequence& sequence, const PrefillItem& item,
                    std::chrono::nanoseconds time, Pending& pending);
  void tell_times(Pending& pending);
  void decode(const std::vector<SequenceId>& ids, Pending& pending);
  Sequence& find(SequenceId id);
  std::int64_t device_bytes_free() const;

  const int max_model_len_;
  const int max_batched_tokens_;
  const std::string how_to_admit_;
  const int rank_;
  kernels::Device& device_;
  kvstore::KvStore& store_;
  predictor::Policy& policy_;
  Model& model_;
  std::unique_ptr<kernels::Stream> compute_;
  Prefill prefill_;
  Sampler sampler_;
  Decode decode_;
  kernels::DeviceBuffer first_logits_;  // [1, vocab] after a prompt
  std::map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::array<std::unique_ptr<kernels::Event>, 2> ended_;  // plans take turns
  std::deque<Pending> pending_;
  std::chrono::steady_clock::time_point collected_;  // the last plan
  std::chrono::steady_clock::duration launching_{};  // time in launch() since then
};

}  // namespace foretoken::worker
