// WorkerGroup: the ranks of one model replica as the coordinator sees them: who has said hello, who
// is ready, when each was last heard of, and which results of a step are still missing.
//
// A group lives in epochs. It is assembled from Hellos (each answered by a Welcome), loads, is
// ready once every rank is, and dies as a whole; then the next epoch begins. Messages of another
// epoch are dropped. Death is noticed
//   at once       when a rank says WorkerFailed, or its socket is closed while something is sent
//   after 1 s     without a heartbeat: it is suspected, and probed (a closed socket shows then)
//   after 3 s     without a heartbeat (10 s after its Hello), or 120 s without the result of the
//                 plan that it works on: it is fenced
// These times are counted by on_time(), at most kLongestLook a call: where this process slept or
// starved, what ranks sent lies unread, and their silence is ours.
//
// No I/O: what must be sent comes back as events. For one thread.
// Example: tests/coordinator/worker_group_test.cc
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "common/messages.h"

namespace foretoken::coordinator {

using TimePoint = std::chrono::steady_clock::time_point;

// To answer a Hello, or to probe a rank that is silent.
struct SendWelcome {
  std::string peer;
};
struct GroupReady {};
struct StepDone {
  std::vector<StepResult> ranks;  // in rank order
};
struct GroupDead {
  Error error;
  // The processes may still be there: silent, or at odds with each other.
  bool must_be_killed = false;
};
using GroupEvent = std::variant<SendWelcome, GroupReady, StepDone, GroupDead>;

class WorkerGroup {
 public:
  static constexpr std::chrono::milliseconds kLongestLook{250};  // on_time() comes more often
  static constexpr std::chrono::milliseconds kSuspectAfter{1000};
  static constexpr std::chrono::milliseconds kFenceAfter{3000};
  static constexpr std::chrono::milliseconds kFirstHeartbeat{7000};  // before kFenceAfter begins
  static constexpr std::chrono::seconds kStepTimeout{120};

  WorkerGroup(int group, int world_size) : group_(group), ranks_(size_t(world_size)) {}

  // REQUIRES: hello.group is this group. Of an older life or a dead one, it is refused: no event.
  // Of a newer one, or to a ready group, it is the group's death: the caller begins the next epoch
  // and hands it in again.
  std::vector<GroupEvent> on_hello(const std::string& peer, const Hello& hello);
  std::vector<GroupEvent> on_ready(const std::string& peer, const Ready& ready);
  std::vector<GroupEvent> on_result(const std::string& peer, StepResult result);
  // False: it is of no rank of this epoch.
  bool on_heartbeat(const Heartbeat& heartbeat);
  std::vector<GroupEvent> on_failed(const std::string& peer, const WorkerFailed& failed);
  std::vector<GroupEvent> on_time(TimePoint now);
  // A rank could not be sent to: its connection is closed (kNotFound), else it takes no messages.
  GroupDead on_unsent(const std::string& peer, const Error& error) const;

  // A plan was sent to all ranks: its results are due.
  void on_plan_sent(StepNumber step) { due_.emplace(step, Due{watched_, {}}); }
  // The next life begins: nobody has said hello yet.
  void begin_epoch(Epoch epoch);

  bool is_ready() const { return ready_; }
  bool is_assembled() const { return peers().size() == ranks_.size(); }
  Epoch epoch() const { return epoch_; }
  int group() const { return group_; }
  std::optional<int> life() const;         // Hello::life of those that said hello in this epoch
  std::vector<std::string> peers() const;  // of the ranks that said hello, in rank order
  const Ready& capacity() const { return *ranks_.front().ready; }  // REQUIRES: is_ready()
  std::int64_t context() const;            // the least over ranks. REQUIRES: is_ready()
  std::int64_t device_bytes_free() const;  // the same, when they became ready
  std::string describe() const;            // "1 of 2 ranks ready"
  const KvSlabs& kv_slabs() const { return kv_slabs_; }  // as last told
  // A rank's store is still making slabs ready: room may come at any moment.
  bool store_fills() const { return is_ready() && kv_slabs_.ready < kv_slabs_.total; }

 private:
  using Duration = TimePoint::duration;
  struct Rank {
    std::string peer;
    std::optional<Hello> hello;
    std::optional<Ready> ready;
    Duration heard{};  // when watched_ was this
    bool suspected = false;
  };
  struct Due {
    // watched_ when it was sent, or when the plan before it was done: two are out at a time.
    Duration since{};
    std::map<int, StepResult> results;  // by rank
  };
  Rank* find(const std::string& peer, Epoch epoch, int rank);
  void take_slabs(const std::vector<StepResult>& ranks);
  GroupDead dead(ErrorCode code, int rank, const std::string& why, bool must_be_killed) const;

  const int group_;
  std::optional<int> dead_life_;  // the last one that had a number
  std::vector<Rank> ranks_;
  Epoch epoch_{1};
  bool ready_ = false;
  std::map<StepNumber, Due> due_;
  std::optional<TimePoint> last_look_;
  Duration watched_{};  // time in which we looked
  KvSlabs kv_slabs_;
};

}  // namespace foretoken::coordinator
