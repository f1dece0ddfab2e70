#include "tests/coordinator/simulation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "common/wire.h"
#include "tests/coordinator/tiny_model.h"

namespace foretoken::coordinator {
namespace {

using std::chrono::milliseconds;

constexpr int kClients = 8;
constexpr std::size_t kMostAtOnce = 16;  // requests
constexpr std::chrono::seconds kSlowFor{10};
static_assert(2 * kSlowFor < ClientSessions::kSlowAfter);

FakeRankConfig fake_rank_config(const SimulationConfig& config) {
  FakeRankConfig fake;
  fake.world_size = config.world_size;
  fake.max_num_seqs = 4;
  fake.max_batched_tokens = 128;
  fake.device_tokens = config.device_tokens;
  return fake;
}

std::string text_of(const std::vector<TokenId>& ids) {
  std::string text;
  for (const auto id : ids) {
    if (id != kTinyEos) text += static_cast<char>(id);
  }
  return text;
}

// What a request gets that nothing disturbs. Every token but the end is one letter of its text.
struct Expected {
  std::vector<TokenId> ids;
  std::string text;
};
Expected expected_of(const GenerateRequest& request, const FakeRankConfig& config) {
  Expected expected;
  expected.ids =
      reference_tokens(*request.prompt_ids, request.sampling.seed, *request.max_tokens, config);
  expected.text = text_of(expected.ids);
  std::size_t first = std::string::npos;
  std::size_t end = std::string::npos;
  for (const auto& stop : request.stop) {
    const auto at = expected.text.find(stop);
    // The stop string that is complete first ends the output; of those, the one that begins first.
    if (at == std::string::npos || at + stop.size() > end) continue;
    first = at + stop.size() < end ? at : std::min(first, at);
    end = at + stop.size();
  }
  if (end != std::string::npos) {
    expected.ids.resize(end);
    expected.text.resize(first);
  }
  return expected;
}

}  // namespace

Simulation::Simulation(const SimulationConfig& config)
    : config_(config),
      rank_config_(fake_rank_config(config)),
      random_(config.seed),
      metrics_("simulated"),
      groups_(static_cast<std::size_t>(config.num_groups)) {
  now_ += std::chrono::hours(1);
  ServiceConfig service;
  service.model = "simulated";
  service.kv_policy = config.kv_policy;
  service.num_groups = config.num_groups;
  service.tensor_parallel_size = config.world_size;
  service.max_num_seqs = rank_config_.max_num_seqs;
  service.max_inter_token_ms = config.max_inter_token_ms;
  service.max_requests_per_client = 1000;
  service.request_timeout_s = 100000;
  ServedModel model;
  model.name = "simulated";
  model.tokenizer = tiny_tokenizer();
  model.num_layers = rank_config_.num_layers;
  model.vocab_size = kTinyVocab;
  model.context = rank_config_.max_model_len;
  model.eos_ids = {kTinyEos};
  model.kv_type = "bf16";
  service_ = std::make_unique<Service>(
      Service::Parts{service, model, "store", "secret", "", nullptr}, *this, metrics_, now_);
  for (int i = 0; i < kClients; ++i)
    clients_.push_back({"client" + std::to_string(i), {}, false, {}});
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    groups_[i].store = std::make_shared<FakeStore>();
    groups_[i].store->slabs = config.slabs;
    groups_[i].restart_at = now_;
  }
}

Simulation::~Simulation() = default;

// ---- the Outbox ------------------------------------------------------------------------------

Status Simulation::to_client(const std::string& peer, std::string_view frame) {
  const auto client = std::find_if(clients_.begin(), clients_.end(),
                                   [&](const Client& c) { return c.peer == peer; });
  if (client == clients_.end() || client->gone) return Error{ErrorCode::kNotFound, "gone"};
  if (client->slow_until) return Error{ErrorCode::kExhausted, "slow"};
  auto message = decode_server_message(frame);
  if (!message) {
    ADD_FAILURE() << message.error().message;
    return Ok{};
  }
  for (const char c : frame) fingerprint_ = fingerprint_ * 1099511628211ULL + std::uint8_t(c);
  std::visit(
      [&](const auto& m) {
        if constexpr (requires { on_told(*client, m); }) on_told(*client, m);
      },
      *message);
  return Ok{};
}

Status Simulation::to_worker(const std::string& peer, std::string_view frame) {
  for (auto& group : groups_) {
    for (auto& rank : group.ranks) {
      if (rank.peer != peer) continue;
      rank.inbox.emplace_back(frame);
      return Ok{};
    }
  }
  return Error{ErrorCode::kNotFound, "closed"};
}

void Simulation::to_parent(const std::string& line) {
  const auto event = nlohmann::json::parse(line);
  if (event.at("event") == "group_dead") return;  // its processes show that themselves
  EXPECT_EQ(event.at("event"), "restart_group");
  const auto number = event.at("group").get<std::size_t>();
  const int lives = groups_[number].lives;
  if (event.value("life", lives) == lives) kill_group(number, milliseconds(50));
}

// ---- clients ---------------------------------------------------------------------------------

void Simulation::submit() {
  auto& client = clients_[pick(clients_.size())];
  if (client.gone) return;
  GenerateRequest request;
  request.request_id = "q" + std::to_string(++submitted_);
  // Few prompts, cut at any length: prefixes are shared.
  const auto letter = static_cast<TokenId>('A' + pick(3));
  request.prompt_ids = std::vector<TokenId>(1 + pick(pick(4) == 0 ? 900 : 100), letter);
  request.max_tokens = static_cast<int>(1 + pick(pick(4) == 0 ? 300 : 40));
  request.sampling.seed = pick(3);
  request.stream = pick(4) != 0;
  if (pick(3) == 0) request.stop = {std::string(1, char('a' + pick(26))) + char('a' + pick(26))};
  client.wishes[request.request_id].request = request;
  service_->on_client_frame({client.peer, "", encode(ClientRequest(request))}, now_);
}

void Simulation::on_told(Client& client, const TokenMessage& message) {
  auto& wish = client.wishes.at(message.request_id);
  EXPECT_FALSE(wish.ended) << "tokens after the end of " << message.request_id;
  for (const auto& token : message.tokens) wish.told.push_back(token.id);
  wish.text += message.text;
}

void Simulation::on_told(Client& client, const DoneMessage& message) {
  auto& wish = client.wishes.at(message.request_id);
  EXPECT_FALSE(wish.ended) << "two ends of " << message.request_id;
  wish.ended = true;
  ++num_done_;
  std::vector<TokenId> ids;
  for (const auto& token : message.tokens) ids.push_back(token.id);
  if (wish.request.stream) {
    EXPECT_EQ(wish.told, ids) << message.request_id;
    EXPECT_EQ(wish.text, message.text) << message.request_id;
  }
  const auto expected = expected_of(wish.request, rank_config_);
  if (message.finish_reason == "cancelled") {
    EXPECT_TRUE(wish.cancelled);
    EXPECT_LE(ids.size(), expected.ids.size());
    EXPECT_TRUE(std::equal(ids.begin(), ids.end(), expected.ids.begin())) << message.request_id;
  } else {
    EXPECT_EQ(ids, expected.ids) << message.request_id;
    EXPECT_EQ(message.text, expected.text) << message.request_id;
  }
}

void Simulation::on_told(Client& client, const ErrorMessage& message) {
  ++num_failed_;
  if (message.request_id.empty()) {
    EXPECT_EQ(message.code, "corrupt") << message.message;
    return;
  }
  auto& wish = client.wishes.at(message.request_id);
  EXPECT_FALSE(wish.ended) << "two ends of " << message.request_id;
  EXPECT_NE(message.message.find("died 3 times"), std::string::npos) << message.message;
  wish.ended = true;
}

void Simulation::disturb_clients() {
  auto& client = clients_[pick(clients_.size())];
  switch (pick(4)) {
    case 0:
      client.slow_until =
          client.slow_until ? std::nullopt : std::optional<TimePoint>(now_ + kSlowFor);
      break;
    case 1:
      if (client.wishes.empty() || client.gone) break;
      for (auto& [name, wish] : client.wishes) {
        if (wish.ended || pick(3) != 0) continue;
        wish.cancelled = true;
        service_->on_client_frame({client.peer, "", encode(ClientRequest(CancelRequest{name}))},
                                  now_);
        break;
      }
      break;
    case 2:
      service_->on_client_frame({client.peer, "", std::string(pick(40), char(pick(256)))}, now_);
      break;
    default:
      if (pick(4) != 0) break;  // another one comes in its place
      client = Client{"client" + std::to_string(random_()), {}, false, {}};
  }
}

// ---- ranks -----------------------------------------------------------------------------------

void Simulation::start_group(std::size_t number) {
  auto& group = groups_[number];
  group.restart_at.reset();
  ++group.lives;
  for (int i = 0; i < config_.world_size; ++i) {
    auto config = rank_config_;
    config.group = static_cast<int>(number);
    config.rank = i;
    if (i > 0 && config.device_tokens) *config.device_tokens *= 2;
    Rank rank;
    rank.peer = "rank" + std::to_string(++num_ranks_);
    rank.group = config.group;
    rank.number = i;
    rank.fake = std::make_unique<FakeRank>(config, group.store);
    send(rank, Hello{config.group, i, config_.world_size, num_ranks_, "here", group.lives});
    group.ranks.push_back(std::move(rank));
  }
}

void Simulation::kill_group(std::size_t number, milliseconds down_time) {
  groups_[number].ranks.clear();
  groups_[number].restart_at = now_ + down_time;
  ++num_deaths_;
}

void Simulation::send(const Rank& rank, const WorkerMessage& message) {
  to_service_.push_back({rank.peer, "", encode(message)});
}

void Simulation::work(Rank& rank) {
  if (rank.stopped || rank.inbox.empty()) return;
  const auto message = decode_coordinator_message(rank.inbox.front()).value_or_throw();
  rank.inbox.pop_front();
  if (const auto* welcome = std::get_if<Welcome>(&message)) {
    if (welcome->epoch == rank.epoch) return;  // a probe
    rank.epoch = welcome->epoch;
    send(rank, rank.fake->ready(rank.epoch));
  } else if (const auto* plan = std::get_if<StepPlan>(&message)) {
    if (plan->epoch != rank.epoch) return;
    send(rank, rank.fake->run(*plan));
  }
}

void Simulation::disturb_ranks() {
  const auto number = pick(groups_.size());
  auto& group = groups_[number];
  if (group.ranks.empty()) return;
  auto& rank = group.ranks[pick(group.ranks.size())];
  switch (pick(4)) {
    case 0:  // killed; the parent notices and starts anew
      kill_group(number, milliseconds(20 + pick(2000)));
      break;
    case 1:  // killed, and the parent notices nothing
      group.ranks.erase(group.ranks.begin() + (&rank - group.ranks.data()));
      break;
    case 2:  // stopped for ever
      rank.stopped = true;
      break;
    default:
      send(rank, WorkerFailed{rank.epoch, rank.group, rank.number,
                              Error{ErrorCode::kDevice, "simulated"}});
      rank.stopped = true;
  }
}

void Simulation::heal() {
  for (auto& client : clients_) client.slow_until.reset();
  for (auto& group : groups_) {
    for (auto& rank : group.ranks) rank.stopped = false;
  }
}

// ---- the game --------------------------------------------------------------------------------

void Simulation::deliver_one() {
  if (to_service_.empty()) return;
  const auto frame = std::move(to_service_.front());
  to_service_.pop_front();
  service_->on_worker_frame(frame, now_);
}

void Simulation::advance(milliseconds time) {
  now_ += time;
  for (auto& client : clients_) {
    if (client.slow_until && now_ >= *client.slow_until) client.slow_until.reset();
  }
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].restart_at && now_ >= *groups_[i].restart_at) start_group(i);
  }
  if (now_ - last_heartbeat_ >= milliseconds(250)) {
    last_heartbeat_ = now_;
    for (const auto& group : groups_) {
      for (const auto& rank : group.ranks) {
        if (rank.stopped || rank.epoch == Epoch{}) continue;
        send(rank, Heartbeat{rank.epoch, rank.group, rank.number});
      }
    }
  }
  service_->on_time(now_);
}

void Simulation::move() {
  switch (pick(8)) {
    case 0:
      return advance(milliseconds(pick(10)));
    case 1:
    case 2:
    case 3:
      return deliver_one();
    default: {
      auto& group = groups_[pick(groups_.size())];
      if (!group.ranks.empty()) work(group.ranks[pick(group.ranks.size())]);
    }
  }
}

void Simulation::run() {
  constexpr int kMostMoves = 3'000'000;
  int moves = 0;
  while (submitted_ < config_.num_requests && ++moves < kMostMoves) {
    move();
    if (pick(100) == 0 && service_->num_requests() < kMostAtOnce) submit();
    if (chance(config_.client_faults)) disturb_clients();
    if (chance(config_.rank_faults)) disturb_ranks();
    if (chance(config_.start_faults)) ++groups_[pick(groups_.size())].store->refuse_starts;
    if (::testing::Test::HasFailure()) return;
  }
  heal();
  while (service_->num_requests() > 0 && ++moves < kMostMoves) {
    move();
    if (::testing::Test::HasFailure()) return;
  }
  // The last releases, and the restart of a group that half died with nobody noticing.
  for (const auto end = now_ + std::chrono::seconds(30); now_ < end;) move();
  check_end();
}

void Simulation::check_end() const {
  EXPECT_EQ(service_->num_requests(), 0U);
  for (const auto& client : clients_) {
    for (const auto& [name, wish] : client.wishes) EXPECT_TRUE(wish.ended) << name << " has no end";
  }
  for (const auto& group : groups_) {
    EXPECT_EQ(group.store->used, 0) << "slabs leak";
    for (const auto& rank : group.ranks) EXPECT_EQ(rank.fake->num_sequences(), 0U);
  }
}

}  // namespace foretoken::coordinator
