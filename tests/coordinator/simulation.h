// Simulation: a whole service in one thread and in simulated time: a Service, the ranks of its
// groups (FakeRank), their parent, and clients. What happens next is drawn from a seed: messages
// are delivered late, ranks die, stop or fail, clients cancel, vanish or read slowly. The same seed
// plays the same game.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "coordinator/service.h"
#include "tests/coordinator/fake_worker.h"

namespace foretoken::coordinator {

struct SimulationConfig {
  std::uint64_t seed = 0;
  int num_requests = 100;
  int num_groups = 1;
  int world_size = 2;
  std::string kv_policy = "attention-predictor";
  std::int64_t slabs = 24;
  int max_inter_token_ms = 0;
  std::optional<std::int64_t> device_tokens = {};  // of rank 0; others have twice that
  // Events in a million moves.
  int rank_faults = 0;
  int client_faults = 0;
  int start_faults = 0;  // a rank finds no room for the slabs that it must swap
};

class Simulation : public Outbox {
 public:
  explicit Simulation(const SimulationConfig& config);
  ~Simulation() override;

  // Plays to the end. Records what broke as test failures.
  void run();

  int num_done() const { return num_done_; }
  int num_failed() const { return num_failed_; }
  int num_deaths() const { return num_deaths_; }
  std::uint64_t fingerprint() const { return fingerprint_; }  // of all that clients were told

 private:
  struct Rank {
    std::string peer;
    int group = 0;
    int number = 0;
    std::unique_ptr<FakeRank> fake;
    Epoch epoch{};
    std::deque<std::string> inbox;
    bool stopped = false;
  };
  struct Group {
    std::shared_ptr<FakeStore> store;
    std::vector<Rank> ranks;  // none: dead
    std::optional<TimePoint> restart_at;
    int lives = 0;
  };
  struct Wish {
    GenerateRequest request;
    std::vector<TokenId> told;
    std::string text;
    bool cancelled = false;
    bool ended = false;
  };
  struct Client {
    std::string peer;
    std::optional<TimePoint> slow_until;  // reads nothing, but is not given up for it
    bool gone = false;
    std::map<std::string, Wish> wishes;
  };

  Status to_client(const std::string& peer, std::string_view frame) override;
  Status to_worker(const std::string& peer, std::string_view frame) override;
  void to_parent(const std::string& line) override;

  bool chance(int in_a_million) { return random_() % 1'000'000 < std::uint64_t(in_a_million); }
  std::size_t pick(std::size_t count) { return random_() % count; }

  void move();
  void advance(std::chrono::milliseconds time);
  void submit();
  void disturb_clients();
  void disturb_ranks();
  void start_group(std::size_t number);
  void kill_group(std::size_t number, std::chrono::milliseconds down_time);
  void work(Rank& rank);
  void send(const Rank& rank, const WorkerMessage& message);
  void deliver_one();
  void heal();

  void on_told(Client& client, const TokenMessage& message);
  void on_told(Client& client, const DoneMessage& message);
  void on_told(Client& client, const ErrorMessage& message);
  void check_end() const;

  const SimulationConfig config_;
  const FakeRankConfig rank_config_;
  std::mt19937_64 random_;
  TimePoint now_{};
  Metrics metrics_;
  std::vector<Group> groups_;
  std::vector<Client> clients_;
  std::deque<RouterFrame> to_service_;  // from ranks, on its way
  std::unique_ptr<Service> service_;
  int submitted_ = 0;
  int num_done_ = 0;
  int num_failed_ = 0;
  int num_deaths_ = 0;
  int num_ranks_ = 0;
  TimePoint last_heartbeat_{};
  std::uint64_t fingerprint_ = 0;
};

}  // namespace foretoken::coordinator
