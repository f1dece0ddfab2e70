// Service: the coordinator's mind. It takes clients' and ranks' frames and the time, and gives
// frames to an Outbox; it opens no socket and reads no clock, so that a test can play the whole
// service in one thread, with any fault at any moment (tests/coordinator/simulation_test.cc).
//
//   client frame -> check -> tokens -> waiting_ -> Scheduler of a group -> StepPlan to its ranks
//   StepResults of all ranks -> Scheduler -> Request -> TokenMessages, DoneMessage to the client
//
// What holds at any time: a request gets one terminal message (done or error), unless its client is
// gone; its tokens are told once and in order, whatever happens to the groups; a request can fail
// nobody but itself.
//
// For one thread. Example: tests/coordinator/service_test.cc
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/service_config.h"
#include "common/socket.h"
#include "common/tokenizer.h"
#include "coordinator/client_sessions.h"
#include "coordinator/metrics.h"
#include "coordinator/outbox.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "coordinator/tokenize_later.h"
#include "coordinator/worker_group.h"

namespace foretoken::coordinator {

// What the coordinator knows of the model that it serves.
struct ServedModel {
  std::string name;
  std::optional<Tokenizer> tokenizer;  // none: prompts must be ids, and there is no text
  int num_layers = 1;
  double attention_tokens = 4096;  // see StepTimes
  std::int64_t vocab_size = 0;
  std::int64_t context = 0;  // tokens
  std::vector<TokenId> eos_ids;
  std::string kv_type;  // as prefix keys name it
};
// Error: kModelFile, kConfig.
Result<ServedModel> read_served_model(const ServiceConfig& config);

class Service {
 public:
  struct Parts {
    ServiceConfig config;
    ServedModel model;
    std::string store_socket;
    std::string tenant_secret;  // keeps tenants from probing each other's prefixes
    std::string operator_key;   // may drain, and has no limit of its own; empty: everybody may
    TokenizeLater* tokenize_later = nullptr;  // for long prompts; null: at once
  };
  Service(Parts parts, Outbox& outbox, Metrics& metrics, TimePoint now);

  void on_client_frame(const RouterFrame& frame, TimePoint now);
  void on_worker_frame(const RouterFrame& frame, TimePoint now);
  void on_tokenized(RequestId id, Result<std::vector<TokenId>> ids, TimePoint now);
  // To be called every kTick at least, and retry() at next_retry().
  void on_time(TimePoint now);
  static constexpr std::chrono::milliseconds kTick{20};
  void retry(TimePoint now) { pump(now); }
  TimePoint next_retry() const { return next_retry_; }

  // Takes nothing new, lets what runs finish, then sends Shutdown to all ranks.
  void drain(TimePoint now);
  // The drain is over, and the process may end.
  bool is_finished() const { return finished_; }

  std::size_t num_requests() const { return requests_.size(); }

 private:
  struct Group {
    Group(int number, int world_size) : ranks(number, world_size) {}
    WorkerGroup ranks;
    std::unique_ptr<Scheduler> scheduler;   // while the ranks are ready
    std::optional<TimePoint> full_until;    // it had no room; until then or a release
    std::chrono::microseconds last_step{};  // what it took on the slowest rank
    std::optional<TimePoint> kill_at;       // its parent should have started it anew by then
    std::string last_death;
    bool was_ready = false;
  };

  // Clients (service_clients.cc).
  void on_request(const RouterFrame& frame, GenerateRequest wish, TimePoint now);
  void on_request(const RouterFrame& frame, const CancelRequest& cancel, TimePoint now);
  void on_request(const RouterFrame& frame, const StatusRequest&, TimePoint now);
  void on_request(const RouterFrame& frame, const ModelsRequest&, TimePoint now);
  void on_request(const RouterFrame& frame, const DrainRequest&, TimePoint now);
  Status check_admission(const RouterFrame& frame, const GenerateRequest& wish) const;
  void reject(const std::string& peer, const std::string& request_id, const Error& error,
              TimePoint now);
  StatusReply status(const std::string& peer, TimePoint now) const;
  std::int64_t context() const;

  // Requests (service_requests.cc).
  void deliver(Request& request, TimePoint now);
  void cancel(Request& request, TimePoint now);
  void fail(Request& request, const Error& error, TimePoint now);
  void forget_client(const std::string& peer);
  // Its tokens are final: waits for the KV report if a group knows its sequence.
  void settle(Request& request, TimePoint now);
  void complete(Request& request, KvReport kv, TimePoint now);
  bool release_sequence(Request& request);
  void erase(RequestId id);
  Request* find(RequestId id);

  // Groups (service_groups.cc).
  void on_message(const std::string& peer, const Hello& message, TimePoint now);
  void turn_away(const std::string& peer);
  void on_message(const std::string& peer, const Ready& message, TimePoint now);
  void on_message(const std::string& peer, const StepResult& message, TimePoint now);
  void on_message(const std::string& peer, const Heartbeat& message, TimePoint now);
  void on_message(const std::string& peer, const WorkerFailed& message, TimePoint now);
  Group* find_group(int number);
  void on_events(Group& group, const std::vector<GroupEvent>& events, TimePoint now);
  void on_event(Group& group, const SendWelcome& event, TimePoint now);
  void on_event(Group& group, const GroupReady& event, TimePoint now);
  void on_event(Group& group, const StepDone& event, TimePoint now);
  void on_event(Group& group, const GroupDead& event, TimePoint now);
  void take_slabs(const KvSlabs& slabs);
  void on_step_event(Group& group, const LateStep& late, TimePoint now);
  void on_step_event(Group& group, const Admitted& event, TimePoint now);
  void on_step_event(Group& group, const NotAdmitted& event, TimePoint now);
  void on_step_event(Group& group, const Lost& event, TimePoint now);
  void on_step_event(Group& group, const Sampled& event, TimePoint now);
  void on_step_event(Group& group, const Released& event, TimePoint now);
  void note_continued(const Request& request, std::int64_t reused_tokens);
  void wait_for_prefix(Request& request, TimePoint since, TimePoint now);
  void requeue(Group& group, TimePoint now);
  void wait_again(Request& request);
  // life: the one that is meant; nullopt: whatever there is.
  void ask_for_restart(Group& group, std::optional<int> life, TimePoint now);
  void tell_parent(const char* event, const Group& group, std::optional<int> life);
  void publish_generated(Group& group, Request& request);
  void extend_keys(const Group& group, Request& request, std::size_t num_segments) const;
  bool tries_again(const Group& group) const;
  Request* next_waiting(TimePoint now);
  void start_waiting(TimePoint now);
  void start(Request& request, Group& group, std::size_t segments, TimePoint now);
  Group* pick_group(const Request& request, TimePoint now);
  void pump(TimePoint now);
  bool send_plan(Group& group, const StepPlan& plan, TimePoint now);
  void finish_drain(TimePoint now);

  const Parts parts_;
  Outbox& outbox_;
  Metrics& metrics_;
  const TimePoint started_at_;
  ClientSessions sessions_;
  std::vector<std::unique_ptr<Group>> groups_;
  std::map<RequestId, std::unique_ptr<Request>> requests_;
  std::map<SequenceId, RequestId> by_sequence_;  // sequences that somebody waits for
  std::set<RequestId> waiting_;                  // ids rise: of a tenant, first come first served
  TimePoint next_retry_ = TimePoint::max();      // of those that wait for a while before they try
  std::uint64_t last_request_ = 0;
  std::uint64_t last_sequence_ = 0;
  std::int64_t restarts_ = 0;
  KvSlabs slabs_;  // the node's store's, as the group told that knows last
  std::optional<TimePoint> drain_until_;
  bool finished_ = false;
};

}  // namespace foretoken::coordinator
