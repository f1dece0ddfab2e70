// Scheduler: decides what one worker group does in each step. A pure function of what it was told:
// no clock, no I/O, so the same calls give the same plans.
//
// A sequence is added, admitted by all ranks, started with the prefix that all of them have (a rank
// that must swap shared slabs for its own may fail to), prefilled layer by layer, decoded until it
// is released. At most kMaxInFlight plans are out at a
// time: the second is made before the first one's tokens are back, so a rank never waits for us.
// Tokens of a sequence that was released meanwhile are dropped.
//
// Prefill is layer-major (docs/architecture.md): a step has a budget of max_batched_tokens *
// num_layers token-layers. Where a layer of the whole prompt fits the budget, an item takes as many
// whole layers as fit; else a layer is cut into token ranges. One sequence is in prefill at a time,
// from its first item to its last, first come first served; all others decode in the same steps.
// Beside them the budget is also what max_inter_token leaves, by the times of the steps before
// (StepTimes), but never less than a block of one layer.
//
// Policy auto: sequences are admitted dense (all their blocks on the device). Where a rank's device
// has no room for one, the longest dense sequence spills, the new one perhaps, and it is tried
// again: the plan says so, so that it is the same sequence on all ranks. What has spilled stays so.
//
// For one thread. Example: tests/coordinator/scheduler_test.cc
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <variant>
#include <vector>

#include "common/messages.h"
#include "coordinator/step_times.h"

namespace foretoken::coordinator {

struct SchedulerConfig {
  Epoch epoch{};
  int num_layers = 1;
  int max_num_seqs = 8;
  int max_batched_tokens = 1;
  std::optional<std::chrono::milliseconds> max_inter_token = {};  // of a step that decodes
  double attention_tokens = 4096;                                 // see StepTimes
  bool spills = false;                                            // policy auto
};

struct NewSequence {
  AdmitSequence admit;  // prefix_keys are left empty: they are the first of segment_keys
  std::int64_t max_new_tokens = 0;
  std::vector<PrefixKey> segment_keys;  // of each whole segment of the prompt
};

// What came of a step, in order.
struct Admitted {
  SequenceId sequence{};
  std::int64_t reused_tokens = 0;
};
// A rank had no room, or refused, at the admission or at the start. The sequence is gone.
struct NotAdmitted {
  SequenceId sequence{};
  Error error;
  bool device_is_full = false;
};
// A rank has lost its KV. The sequence is gone; tokens of the step that told it aren't counted, and
// what it computed is not published.
struct Lost {
  SequenceId sequence{};
  Error error;
  std::int64_t checksum_failures = 0;  // of all ranks
};
struct Sampled {
  SequenceId sequence{};
  std::int64_t position = 0;
  TokenInfo token;
};
// All ranks have let go of it. Only for sequences that release() was called for.
struct Released {
  SequenceId sequence{};
  KvReport kv;
};
// A step with sequences that decode took longer than max_inter_token on the slowest rank.
struct LateStep {
  StepNumber step{};
  std::chrono::microseconds time{};
  int rank = 0;
  std::chrono::microseconds launching{};  // StepResult::launch_us
  int num_decodes = 0;
  double prefill_units = 0;  // StepTimes
  std::size_t num_admitted = 0, num_started = 0, num_released = 0;
};
using StepEvent = std::variant<LateStep, Admitted, NotAdmitted, Lost, Sampled, Released>;

class Scheduler {
 public:
  static constexpr std::size_t kMaxInFlight = 2;

  explicit Scheduler(const SchedulerConfig& config)
      : config_(config), times_(config.attention_tokens) {}

  // Whether a sequence may be added now. A prompt whose first segment another one is about to
  // publish waits for that, so that it can be reused.
  bool has_room(const std::vector<PrefixKey>& segment_keys) const;
  // REQUIRES: has_room(); ids rise.
  void add(NewSequence sequence);
  // A segment of generated tokens is complete, and its last token has been fed back.
  void publish(const PublishSegment& segment);
  // Whether all its KV comes from dense attention, and so will that of the steps in flight.
  // REQUIRES: it was added, and no Released is out.
  bool is_dense(SequenceId sequence) const;
  // Ends a sequence, wherever it stands. False: no rank ever heard of it, so no Released follows.
  bool release(SequenceId sequence);

  // The next plan; nullopt while kMaxInFlight are out or when there is nothing to do.
  std::optional<StepPlan> next_plan();

  // Takes the results of all ranks, in rank order, of the oldest plan that is out.
  // Error: kInternal when the ranks contradict each other or the plan: the group is broken.
  Result<std::vector<StepEvent>> on_results(const std::vector<StepResult>& ranks);

  std::size_t num_sequences() const { return sequences_.size(); }

 private:
  enum class Phase { kNew, kAdmitting, kAdmitted, kStarting, kPrefilling, kDecoding };
  struct Sequence {
    NewSequence given;
    Phase phase = Phase::kNew;
    std::int64_t reused = 0;
    int layer = 0;                 // prefill stands here ...
    std::int64_t token = 0;        // ... and here
    std::int64_t planned = 0;      // tokens sampled or planned to be
    bool prompt_done = false;      // the results of its prefill are back
    bool spill_due = false;        // for the next plan; given.admit.dense is false already
    bool refused = false;          // ranks may hold an admission that others refused
    bool releasing = false;        // nothing more is planned but its release
    bool release_planned = false;  // and that is out
    bool wanted = true;            // somebody waits for Released
    bool lost = false;             // its KV may be wrong
    std::vector<PublishSegment> publishes;
  };
  struct InFlight {
    StepNumber step{};
    std::vector<SequenceId> admits;
    std::vector<SequenceId> starts;
    std::vector<SequenceId> prefilled;  // whose last item it holds
    std::vector<SequenceId> sampling;   // that draw a token
    std::vector<SequenceId> releases;
    bool spills = false;
    bool has_changes = false;  // StepTimes
    int num_decodes = 0;
    double prefill_units = 0;  // as StepTimes counts
  };
  // Prefill that a step may hold.
  struct Budget {
    std::int64_t token_layers = 0;
    std::optional<double> units = {};  // as StepTimes counts; none: as many as there are
  };

  void plan_publishes_and_releases(StepPlan& plan, InFlight& step);
  void plan_spills(StepPlan& plan, InFlight& step);
  void plan_admissions(StepPlan& plan, InFlight& step);
  void plan_decodes(StepPlan& plan, InFlight& step);
  void plan_prefills(StepPlan& plan, InFlight& step);
  bool plan_prefill(Sequence& sequence, Budget& whole, Budget& left, StepPlan& plan,
                    InFlight& step);
  Budget whole_budget(const InFlight& step) const;
  // Tokens of one layer, from `begin` on, that the budget allows.
  std::int64_t tokens_within(const Budget& budget, std::int64_t begin) const;
  std::optional<PrefillItem> cut_prefill(Sequence& sequence, const Budget& whole,
                                         const Budget& left) const;
  void spend(const PrefillItem& item, Budget& left, InFlight& step) const;
  void learn(const InFlight& step, const std::vector<StepResult>& ranks,
             std::vector<StepEvent>& events);

  Status on_admits(const InFlight& step, const std::vector<StepResult>& ranks,
                   std::vector<StepEvent>& events);
  bool is_refused(const AdmitResult& answer, std::vector<StepEvent>& events);
  bool make_room(Sequence& refused);
  void on_lost(const std::vector<StepResult>& ranks, std::vector<StepEvent>& events);
  Status on_tokens(const InFlight& step, const StepResult& rank0, std::vector<StepEvent>& events);
  void on_prefilled(const InFlight& step);
  void on_releases(const InFlight& step, const std::vector<StepResult>& ranks,
                   std::vector<StepEvent>& events);

  const SchedulerConfig config_;
  std::uint64_t last_step_ = 0;
  std::map<SequenceId, Sequence> sequences_;  // in the order they were added
  std::deque<InFlight> in_flight_;
  StepTimes times_;
};

}  // namespace foretoken::coordinator
