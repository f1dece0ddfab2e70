// The service's words to clients: who is told what, and when. What it does under faults is played
// by simulation_test.cc.
#include "coordinator/service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "common/log.h"
#include "common/wire.h"
#include "tests/coordinator/fake_worker.h"
#include "tests/coordinator/tiny_model.h"

namespace foretoken::coordinator {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kEos = 256;

std::string numbered(std::string name, int number) {
  name += std::to_string(number);
  return name;
}

class ServiceTest : public ::testing::Test, public Outbox {
 protected:
  ServiceTest() {
    log().set_level(spdlog::level::off);
    config_.model = "model";
    config_.max_waiting = 4;
    config_.max_requests_per_client = 3;
    config_.max_num_seqs = 2;
    model_.name = "m";
    model_.num_layers = 2;
    model_.vocab_size = 257;
    model_.context = 1000;
    model_.eos_ids = {kEos};
    model_.kv_type = "bf16";
  }
  ~ServiceTest() override { log().set_level(spdlog::level::info); }

  Status to_client(const std::string& peer, std::string_view frame) override {
    if (gone_ == peer) return Error{ErrorCode::kNotFound, "gone"};
    if (slow_ == peer) return Error{ErrorCode::kExhausted, "slow"};
    auto message = decode_server_message(frame).value_or_throw();
    const auto* token = std::get_if<TokenMessage>(&message);
    if (token == nullptr || !token->tokens.empty()) told_[peer].push_back(std::move(message));
    return Ok{};
  }
  Status to_worker(const std::string&, std::string_view frame) override {
    plans_.emplace_back(frame);
    return Ok{};
  }
  void to_parent(const std::string& line) override { parent_.push_back(line); }

  Service& service() {
    if (!service_) {
      service_ = std::make_unique<Service>(
          Service::Parts{config_, model_, "store", "secret", operator_key_, tokenizing_}, *this,
          metrics_, now_);
    }
    return *service_;
  }
  void ask(const ClientRequest& request, const std::string& peer = "p",
           const std::string& key = "") {
    service().on_client_frame({peer, key, encode(request)}, now_);
  }
  static GenerateRequest wish(const std::string& id, int max_tokens = 3) {
    GenerateRequest request;
    request.request_id = id;
    request.prompt_ids = {{1, 2, 3}};
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    return request;
  }
  template <typename T>
  std::vector<T> told(const std::string& peer = "p") {
    std::vector<T> found;
    for (const auto& message : told_[peer]) {
      if (const auto* one = std::get_if<T>(&message)) found.push_back(*one);
    }
    return found;
  }
  void say(const WorkerMessage& message) {
    service().on_worker_frame({"rank", "", encode(message)}, now_);
  }
  void start_rank(std::int64_t slabs = 1024) {
    store_ = std::make_shared<FakeStore>();
    store_->slabs = slabs;
    rank_ = std::make_unique<FakeRank>(FakeRankConfig{}, store_);
    say(Hello{0, 0, 1, 1, "here", ++lives_});
    work();
  }
  // The first group has its rank, the second is ready when it has said what is returned.
  Ready start_two_groups(std::int64_t slabs) {
    config_.num_groups = 2;
    start_rank(slabs);
    say(Hello{1, 0, 1, 2, "here"});
    Ready ready = rank_->ready(Epoch{1});
    ready.group = 1;
    return ready;
  }
  // The rank does all that it was told, and hears of no more.
  void work(int steps = 1000) {
    while (!plans_.empty() && steps-- > 0) {
      const auto message = decode_coordinator_message(plans_.front()).value_or_throw();
      plans_.pop_front();
      if (const auto* welcome = std::get_if<Welcome>(&message)) {
        say(rank_->ready(welcome->epoch));
      } else if (const auto* plan = std::get_if<StepPlan>(&message)) {
        say(rank_->run(*plan));
      } else if (std::holds_alternative<HeartbeatEcho>(message)) {
        ++echoes_;
      } else {
        ++shutdowns_;
      }
    }
  }
  void pass(milliseconds time) { service().on_time(now_ += time); }

  ServiceConfig config_;
  ServedModel model_;
  std::string operator_key_;
  TokenizeLater* tokenizing_ = nullptr;
  Metrics metrics_{"m"};
  TimePoint now_ = TimePoint{} + seconds(1000);
  std::unique_ptr<Service> service_;
  std::shared_ptr<FakeStore> store_;
  std::unique_ptr<FakeRank> rank_;
  std::map<std::string, std::vector<ServerMessage>> told_;
  std::deque<std::string> plans_;
  std::vector<std::string> parent_;
  std::string slow_;
  std::string gone_;
  int lives_ = 0;
  int shutdowns_ = 0;
  int echoes_ = 0;
};

TEST_F(ServiceTest, StreamsTokensAndThenDone) {
  start_rank();
  ask(wish("r1"));
  work();
  EXPECT_EQ(told<TokenMessage>().size(), 3U);
  const auto done = told<DoneMessage>();
  ASSERT_EQ(done.size(), 1U);
  EXPECT_EQ(done[0].request_id, "r1");
  EXPECT_EQ(done[0].finish_reason, "length");
  EXPECT_EQ(done[0].usage.prompt_tokens, 3);
  EXPECT_EQ(done[0].kv.budget_tokens, config_.kv_budget);
  EXPECT_EQ(service().num_requests(), 0U);
  EXPECT_EQ(done[0].kv.predictor_fallbacks, 2);
  EXPECT_EQ(done[0].timing.step_ms, 1.0);
  const std::string metrics = metrics_.text();
  EXPECT_THAT(metrics, HasSubstr("foretoken_generation_tokens_total{model_name=\"m\"} 3"));
  EXPECT_THAT(metrics, HasSubstr("foretoken_predictor_fallbacks_total{model_name=\"m\"} 2"));
}

TEST_F(ServiceTest, MetricsSayWhatTheDeviceHasLeft) {
  const auto left = [](std::int64_t bytes) {
    return HasSubstr("foretoken_device_free_bytes{model_name=\"m\",group=\"0\"} " +
                     std::to_string(bytes) + "\n");
  };
  start_rank();
  EXPECT_THAT(metrics_.text(), left(kFakeDeviceBytes));
  ask(wish("r1", 30));
  work(10);
  EXPECT_THAT(metrics_.text(), left(kFakeDeviceBytes - 1));
  work();
  EXPECT_THAT(metrics_.text(), left(kFakeDeviceBytes));
}

TEST_F(ServiceTest, MetricsTellOfTheFullestDeviceOfALivingGroup) {
  const auto gauge = [](const std::string& end) {
    return HasSubstr("foretoken_device_free_bytes{model_name=\"m\",group=\"0\"}" + end);
  };
  config_.tensor_parallel_size = 3;
  const std::vector<std::int64_t> free{30, 10, 20};
  store_ = std::make_shared<FakeStore>();
  for (int rank = 0; rank < 3; ++rank) say(Hello{0, rank, 3, 1, "here", 1});
  for (int rank = 0; rank < 3; ++rank) {
    FakeRankConfig fake;
    fake.rank = rank;
    auto ready = FakeRank(fake, store_).ready(Epoch{1});
    ready.device_bytes_free = free[static_cast<std::size_t>(rank)];
    say(ready);
  }
  EXPECT_THAT(metrics_.text(), gauge(" 10\n"));
  ask(wish("r1"));
  for (int rank = 0; rank < 3; ++rank) {
    StepResult result;
    result.epoch = Epoch{1};
    result.step = StepNumber{1};
    result.rank = rank;
    result.device_bytes_free = free[static_cast<std::size_t>(rank)] - 5;
    result.admits = {{SequenceId{1}, 0, std::nullopt}};
    say(result);
  }
  EXPECT_THAT(metrics_.text(), gauge(" 5\n"));
  say(WorkerFailed{Epoch{1}, 0, 0, {ErrorCode::kDevice, "a GPU fell off"}});
  EXPECT_THAT(metrics_.text(), Not(gauge("")));
}

TEST_F(ServiceTest, WithoutStreamOnlyDoneComes) {
  start_rank();
  auto request = wish("r1");
  request.stream = false;
  ask(request);
  work();
  EXPECT_TRUE(told<TokenMessage>().empty());
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
}

TEST_F(ServiceTest, StopsAtStopTokensAndTheModelsEnd) {
  start_rank();
  auto request = wish("r1", 10);
  request.forced_ids = {5, 6, 7, 8};
  request.stop_token_ids = {7};
  ask(request);
  work();
  EXPECT_EQ(told<DoneMessage>().at(0).tokens.size(), 3U);
  EXPECT_EQ(told<DoneMessage>().at(0).finish_reason, "stop");
  request = wish("r2", 10);
  request.forced_ids = {5, kEos, 7};
  request.ignore_eos = false;
  ask(request);
  work();
  EXPECT_EQ(told<DoneMessage>().at(1).tokens.size(), 2U);
  EXPECT_EQ(told<DoneMessage>().at(1).tokens.back().id, kEos);
}

TEST_F(ServiceTest, WaitsForAGroupAndThenRuns) {
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).state, "loading");
  EXPECT_EQ(told<StatusReply>().at(0).detail, "group 0: 0 of 1 ranks have joined");
  ask(wish("r1"));
  EXPECT_TRUE(told<ErrorMessage>().empty());
  start_rank();
  work();
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
}

TEST_F(ServiceTest, TurnsAwayWhatIsTooMuch) {
  for (int i = 0; i < 3; ++i) ask(wish(numbered("r", i)));
  ask(wish("r3"));
  EXPECT_THAT(told<ErrorMessage>().at(0).message, HasSubstr("--max-requests-per-client"));
  EXPECT_EQ(told<ErrorMessage>().at(0).code, "exhausted");
  ask(wish("x"), "q");
  ask(wish("y"), "q");
  EXPECT_THAT(told<ErrorMessage>("q").at(0).message, HasSubstr("--max-waiting"));
  EXPECT_THAT(metrics_.text(), HasSubstr("foretoken_requests_rejected_total{model_name=\"m\","
                                         "reason=\"exhausted\"} 2"));
}

TEST_F(ServiceTest, ATenantDoesNotWaitForAllThatAnotherAskedForBefore) {
  config_.max_requests_per_client = 8;
  config_.max_waiting = 100;
  start_rank();
  for (int i = 0; i < 6; ++i) ask(wish(numbered("r", i), 20), "many");
  ask(wish("one", 3), "few");
  work(45);  // the first two end on the way
  EXPECT_EQ(told<DoneMessage>("few").size(), 1U);
  EXPECT_LE(told<DoneMessage>("many").size(), 3U);
  work();
  EXPECT_EQ(told<DoneMessage>("many").size(), 6U);
}

TEST_F(ServiceTest, ATenantsLimitHoldsOverItsConnectionsButNotForTheOperator) {
  operator_key_ = "operator";
  for (int i = 0; i < 3; ++i) ask(wish("r"), numbered("p", i), "tenant");
  ask(wish("r"), "p3", "tenant");
  EXPECT_EQ(told<ErrorMessage>("p3").size(), 1U);
  config_.max_waiting = 100;
  service_.reset();
  for (int i = 0; i < 10; ++i) ask(wish(numbered("r", i)), "o", "operator");
  EXPECT_TRUE(told<ErrorMessage>("o").empty());
}

TEST_F(ServiceTest, NamesWhatIsWrongWithARequest) {
  auto request = wish("r1");
  request.prompt_ids = {{1, 999}};
  ask(request);
  EXPECT_THAT(told<ErrorMessage>().at(0).message, HasSubstr("the id 999"));
  EXPECT_EQ(told<ErrorMessage>().at(0).request_id, "r1");
  request = wish("r2");
  request.prompt_ids.reset();
  request.prompt = "text";
  ask(request);
  EXPECT_THAT(told<ErrorMessage>().at(1).message, HasSubstr("no tokenizer.json"));
  ask(wish("r3", 2000));
  EXPECT_THAT(told<ErrorMessage>().at(2).message, HasSubstr("--max-model-len"));
  ask(wish("same"));
  ask(wish("same"));
  EXPECT_THAT(told<ErrorMessage>().at(3).message, HasSubstr("a request of that name"));
  EXPECT_EQ(told<ErrorMessage>().at(3).request_id, "");  // the first one goes on
  service().on_client_frame({"p", "", "nonsense"}, now_);
  EXPECT_EQ(told<ErrorMessage>().at(4).code, "corrupt");
  EXPECT_EQ(service().num_requests(), 1U);
}

// Its sender has others running, and else couldn't tell which one it is.
TEST_F(ServiceTest, NamesARequestThatCanNotBeRead) {
  ask(wish("runs"));
  const auto sent = [&](const std::string& id) {
    auto request = wish(id);
    request.sampling.top_k = 123'456;  // 5 bytes, of which the first is that of a number
    auto frame = encode(ClientRequest(request));
    frame.replace(frame.find("\xce\x00\x01\xe2\x40"), 5, "\xa4text", 5);
    service().on_client_frame({"p", "", frame}, now_);
    return told<ErrorMessage>().back();
  };
  EXPECT_EQ(sent("odd").request_id, "odd");
  EXPECT_EQ(sent("odd").code, "corrupt");
  EXPECT_EQ(sent("runs").request_id, "");  // the first one goes on
  EXPECT_EQ(service().num_requests(), 1U);
}

TEST_F(ServiceTest, DoesNotSendBackWhatIsTooLong) {
  ask(wish(std::string(1'000'000, 'x')));
  EXPECT_THAT(told<ErrorMessage>().at(0).message, HasSubstr("request_id"));
  EXPECT_EQ(told<ErrorMessage>().at(0).request_id, "");
}

TEST_F(ServiceTest, DoesNotReadIdsFarBeyondTheContext) {
  auto request = wish("long");
  request.prompt_ids->resize(60'000);
  ask(request);
  EXPECT_THAT(told<ErrorMessage>().at(0).message, HasSubstr("the prompt has 60000 tokens"));
  request.request_id = "longer";
  request.prompt_ids->resize(70'000);
  ask(request);
  EXPECT_THAT(told<ErrorMessage>().at(1).message, HasSubstr("prompt_ids: 70000 elements"));
  EXPECT_EQ(told<ErrorMessage>().at(1).code, "invalid_argument");
  EXPECT_EQ(told<ErrorMessage>().at(1).request_id, "longer");
}

TEST_F(ServiceTest, CancelEndsARequestWhereverItStands) {
  ask(wish("waits"));
  ask(CancelRequest{"waits"});
  EXPECT_EQ(told<DoneMessage>().at(0).finish_reason, "cancelled");
  start_rank();
  ask(wish("runs", 500));
  work(10);
  ask(CancelRequest{"runs"});
  ask(CancelRequest{"runs"});
  ask(CancelRequest{"unknown"});
  work();
  ASSERT_EQ(told<DoneMessage>().size(), 2U);
  EXPECT_EQ(told<DoneMessage>().at(1).finish_reason, "cancelled");
  EXPECT_GT(told<DoneMessage>().at(1).tokens.size(), 0U);
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

struct TextsToTokenize : TokenizeLater {
  void submit(RequestId id, const std::string&, std::string, EncodeOptions) override {
    waiting.insert(id);
  }
  void cancel(RequestId id) override { waiting.erase(id); }
  WaitingBytes waiting_bytes(const std::string&) override { return bytes; }
  std::set<RequestId> waiting;
  WaitingBytes bytes;
};

class LongTextTest : public ServiceTest {
 protected:
  static constexpr std::size_t kBytes = 100'000;
  LongTextTest() {
    model_.tokenizer = tiny_tokenizer();
    tokenizing_ = &texts;
    request.prompt_ids.reset();
    request.prompt = std::string(kBytes, 'x');
  }
  TextsToTokenize texts;
  GenerateRequest request = wish("r1");
};

TEST_F(LongTextTest, IsNotTokenizedWhenNobodyWaitsForIt) {
  ask(request);
  EXPECT_EQ(texts.waiting.size(), 1U);
  ask(CancelRequest{"r1"});
  EXPECT_TRUE(texts.waiting.empty());
  ask(request);
  gone_ = "p";
  pass(ClientSessions::kKeepAlive);
  EXPECT_EQ(service().num_requests(), 0U);
  EXPECT_TRUE(texts.waiting.empty());
}

TEST_F(LongTextTest, IsRefusedWhereTooMuchTextWaits) {
  const TokenizeLater::WaitingBytes most{(64U << 20) - kBytes, (16U << 20) - kBytes};
  texts.bytes = most;
  ask(request);
  EXPECT_EQ(texts.waiting.size(), 1U);
  for (const auto& [all, own] : {std::pair{1U, 0U}, {0U, 1U}}) {
    texts.bytes = {most.all + all, most.of_tenant + own};
    request.request_id = "r2";
    ask(request);
    EXPECT_EQ(texts.waiting.size(), 1U);
    ASSERT_FALSE(told<ErrorMessage>().empty());
    EXPECT_EQ(told<ErrorMessage>().back().code, "exhausted");
    EXPECT_EQ(told<ErrorMessage>().back().request_id, "r2");
    told_.clear();
  }
}

TEST_F(ServiceTest, RanksThatAreNotWelcomeAreTold) {
  start_rank();
  say(Hello{0, 0, 2, 1, "here", ++lives_});  // two ranks, where a group has one
  work();
  EXPECT_EQ(shutdowns_, 1);
  say(Hello{1, 0, 1, 1, "here", ++lives_});  // of a group that there is not
  work();
  EXPECT_EQ(shutdowns_, 2);
  ask(wish("r1"));
  work();
  EXPECT_EQ(told<DoneMessage>().size(), 1U);  // the group that there is goes on
}

TEST_F(ServiceTest, OthersRequestsCanNotBeCancelled) {
  start_rank();
  ask(wish("r1", 500));
  work(5);
  for (int guess = 0; guess < 100; ++guess) ask(CancelRequest{numbered("r", guess)}, "q");
  EXPECT_EQ(service().num_requests(), 1U);
  EXPECT_TRUE(told_["q"].empty());
}

TEST_F(ServiceTest, AVanishedClientsSequencesAreReleased) {
  start_rank();
  ask(wish("r1", 500));
  work(10);
  gone_ = "p";
  work(2);
  pass(milliseconds(20));
  EXPECT_EQ(service().num_requests(), 0U);
  work();
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

TEST_F(ServiceTest, MetricsCountTheKvOfRequestsThatEndBadlyToo) {
  config_.request_timeout_s = 10;
  start_rank();
  ask(wish("late", 900));
  ask(wish("vanishes", 900), "q");
  work(10);
  gone_ = "q";
  work(2);
  pass(seconds(2));
  say(Heartbeat{Epoch{1}, 0, 0});
  pass(seconds(9));
  work();
  EXPECT_EQ(told<ErrorMessage>().at(0).code, "timeout");
  EXPECT_EQ(rank_->num_sequences(), 0U);
  EXPECT_THAT(metrics_.text(),
              HasSubstr("foretoken_predictor_fallbacks_total{model_name=\"m\"} 4"));
}

TEST_F(ServiceTest, ASlowClientHoldsUpNobodyAndIsCancelled) {
  start_rank();
  ask(wish("r1", 900), "slow");
  slow_ = "slow";
  ask(wish("r2", 20));
  work(50);
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
  for (int i = 0; i < 31 && service().num_requests() > 0; ++i) {
    pass(seconds(1));
    say(Heartbeat{Epoch{1}, 0, 0});
  }
  EXPECT_EQ(service().num_requests(), 0U);
  work();
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

TEST_F(ServiceTest, AClientThatWasSlowGetsWhatItMissedInOnePiece) {
  start_rank();
  ask(wish("r1", 20));
  slow_ = "p";
  work();
  EXPECT_TRUE(told_["p"].empty());
  slow_.clear();
  pass(milliseconds(20));
  ASSERT_EQ(told<DoneMessage>().size(), 1U);
  std::size_t tokens = 0;
  for (const auto& message : told<TokenMessage>()) tokens += message.tokens.size();
  EXPECT_EQ(tokens, 20U);
}

TEST_F(ServiceTest, ARequestHasADeadline) {
  config_.request_timeout_s = 10;
  ask(wish("r1"));
  pass(seconds(10));
  EXPECT_TRUE(told<ErrorMessage>().empty());
  pass(seconds(1));
  ASSERT_EQ(told<ErrorMessage>().size(), 1U);
  EXPECT_EQ(told<ErrorMessage>()[0].code, "timeout");
}

TEST_F(ServiceTest, WhatNeverFitsIsRefusedWithTheRanksReason) {
  start_rank(/*slabs=*/1);
  ask(wish("r1", 500));
  work();
  ASSERT_EQ(told<ErrorMessage>().size(), 1U);
  EXPECT_EQ(told<ErrorMessage>()[0].code, "exhausted");
  EXPECT_THAT(told<ErrorMessage>()[0].message, HasSubstr("--kv-host-gib"));
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

TEST_F(ServiceTest, WhatDoesNotFitYetIsTriedAgainButNotForEver) {
  start_rank();
  store_->used = 1023;  // by a dead rank, say
  ask(wish("r1", 500));
  const auto wait = [this] {
    work();
    say(Heartbeat{Epoch{1}, 0, 0});
    pass(seconds(1));
  };
  for (int i = 0; i < 3; ++i) wait();
  store_->used -= 1023;
  wait();
  work();
  EXPECT_EQ(told<DoneMessage>().size(), 1U);

  store_->used += 1023;
  ask(wish("r2", 500));
  for (int i = 0; i < 200 && told<ErrorMessage>().empty(); ++i) wait();
  EXPECT_EQ(told<ErrorMessage>().size(), 1U);
}

TEST_F(ServiceTest, WhatDoesNotFitYetKeepsItsPlaceInTheQueue) {
  config_.max_num_seqs = 8;
  config_.max_requests_per_client = 4;
  start_rank();
  store_->used = 1023;
  for (int i = 0; i < 4; ++i) ask(wish(numbered("r", i), 500));  // two slabs each
  work();
  for (int tries = 0; tries < 2; ++tries) {
    pass(seconds(1));
    say(Heartbeat{Epoch{1}, 0, 0});
    work();
  }
  store_->used = 1022;
  pass(seconds(1));
  work(5000);
  const auto done = told<DoneMessage>();
  ASSERT_EQ(done.size(), 4U);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(done[std::size_t(i)].request_id, numbered("r", i));
}

// Where nothing runs that could make room for it, others pass.
TEST_F(ServiceTest, WhatNothingMakesRoomForHoldsNobodyBack) {
  config_.max_num_seqs = 8;
  start_rank();
  store_->used = 1023;
  ask(wish("large", 500));  // two slabs
  work();
  ask(wish("small", 20));
  for (int tries = 0; tries < 3; ++tries) {
    pass(seconds(1));
    say(Heartbeat{Epoch{1}, 0, 0});
    work(200);
  }
  const auto done = told<DoneMessage>();
  ASSERT_EQ(done.size(), 1U);
  EXPECT_EQ(done[0].request_id, "small");
  EXPECT_TRUE(told<ErrorMessage>().empty());
}

// Its turn comes when those that run have ended, however many come after it.
TEST_F(ServiceTest, ManySmallRequestsDoNotStarveALargeOne) {
  config_.max_num_seqs = 8;
  config_.max_requests_per_client = 8;
  config_.max_waiting = 8;
  start_rank();
  store_->slabs = 4;
  int small = 0;
  const auto ask_small = [&] {
    ask(wish(numbered("small", small), 20 + 7 * (small % 5)));  // one slab
    ++small;
  };
  ask_small();
  work(4);
  ask(wish("large", 900));
  for (int i = 0; i < 3; ++i) ask_small();
  std::size_t done = 0;
  while (done < 50 && (done == 0 || told<DoneMessage>().back().request_id != "large")) {
    work(2);  // a plan and an echo: echoes that are left there would keep each plan waiting
    pass(milliseconds(1));
    say(Heartbeat{Epoch{1}, 0, 0});
    for (; done < told<DoneMessage>().size(); ++done) ask_small();
  }
  EXPECT_LT(done, 10U);
}

// Though its tenant has more running than the one of the small ones, whenever one of these ends.
TEST_F(ServiceTest, AnotherTenantsSmallRequestsDoNotStarveALargeOne) {
  config_.max_num_seqs = 8;
  start_rank();
  store_->slabs = 7;
  int small = 0;
  const auto ask_small = [&] { ask(wish(numbered("small", ++small), 20), "q"); };  // one slab
  ask(wish("beside", 700));                                                        // three
  ask_small();
  work(4);
  ask(wish("large", 900));  // four
  ask_small();
  const auto has_begun = [&] {
    return std::ranges::any_of(told<TokenMessage>(),
                               [](const auto& token) { return token.request_id == "large"; });
  };
  std::size_t done = 0;
  while (told<DoneMessage>().empty() && !has_begun()) {
    work(1);
    pass(milliseconds(1));
    say(Heartbeat{Epoch{1}, 0, 0});
    for (; done < told<DoneMessage>("q").size(); ++done) ask_small();
  }
  EXPECT_TRUE(has_begun());
  EXPECT_LT(done, 4U);
}

TEST_F(ServiceTest, KvThatIsLostIsComputedAnewAndNoTokenIsToldTwice) {
  start_rank();
  ask(wish("undisturbed", 20));
  work();
  store_->losses = 2;
  ask(wish("r1", 20));
  work();
  EXPECT_EQ(store_->losses, 0);
  const auto done = told<DoneMessage>();
  ASSERT_EQ(done.size(), 2U);
  EXPECT_EQ(done[1].tokens, done[0].tokens);
  EXPECT_EQ(done[0].kv.losses, 0);
  EXPECT_EQ(done[1].kv.losses, 1) << "two steps in flight said so";
  EXPECT_EQ(rank_->num_sequences(), 0U);
  const std::string metrics = metrics_.text();
  EXPECT_THAT(metrics, HasSubstr("foretoken_kv_losses_total{model_name=\"m\"} 1"));
  EXPECT_THAT(metrics, HasSubstr("foretoken_recomputed_tokens_total{model_name=\"m\"} "));
  EXPECT_THAT(metrics, HasSubstr("foretoken_kv_checksum_failures_total{model_name=\"m\","
                                 "tier=\"host\"} 3"));
}

TEST_F(ServiceTest, CachedTokensAreThoseThatNoLifeOfARequestComputed) {
  start_rank();
  auto request = wish("r1", 20);
  request.prompt_ids = std::vector<TokenId>(700, 5);
  // Loses its KV once; before that, the prefixes that the store then has are changed.
  const auto cached = [&](const std::function<void(std::set<PrefixKey>&)>& change) {
    told_.clear();
    ask(request);
    while (told<TokenMessage>().empty()) work(1);
    change(store_->published);
    store_->losses = 1;
    work();
    EXPECT_EQ(told<DoneMessage>().at(0).kv.losses, 1);
    return told<DoneMessage>().at(0).usage.cached_tokens;
  };
  const auto nothing = [](std::set<PrefixKey>&) {};
  EXPECT_EQ(cached(nothing), 0) << "its second life reuses what its first one computed";
  EXPECT_EQ(cached(nothing), 512);
  EXPECT_EQ(cached([](auto& published) { published.clear(); }), 0);
}

TEST_F(ServiceTest, ADiskThatFailsCostsTheRequestThatNeedsIt) {
  start_rank();
  store_->losses = 1;
  store_->loss = ErrorCode::kIo;
  ask(wish("r1", 20));
  ask(wish("r2", 20));
  work();
  ASSERT_EQ(told<ErrorMessage>().size(), 1U);
  EXPECT_EQ(told<ErrorMessage>()[0].request_id, "r1");
  EXPECT_EQ(told<ErrorMessage>()[0].code, "io");
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

TEST_F(ServiceTest, KvThatIsLostOverAndOverEndsTheRequest) {
  start_rank();
  store_->losses = 100;
  ask(wish("r1", 20));
  work();
  ASSERT_EQ(told<ErrorMessage>().size(), 1U);
  EXPECT_EQ(told<ErrorMessage>()[0].code, "corrupt");
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

TEST_F(ServiceTest, ARequestStartsAsSoonAsTheStoreHasMadeRoomReady) {
  start_rank();
  store_->ready = 0;
  ask(wish("r1", 500));
  const auto wait = [this](milliseconds time) {
    work();
    say(Heartbeat{Epoch{1}, 0, 0});
    pass(time);
  };
  for (int i = 0; i < 150; ++i) wait(milliseconds(50));  // more often than others are refused
  ASSERT_TRUE(told<ErrorMessage>().empty());
  store_->ready = 1024;
  wait(milliseconds(50));
  work();
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
}

// Its tries are the service's own: tokens of others come, and others start, in between.
TEST_F(ServiceTest, APrefixFromNvmeIsAskedForAgainSoonAndHoldsUpNobody) {
  start_rank();
  ask(wish("running", 900));
  work(5);
  store_->pending_admits = 3;
  auto slow = wish("slow", 1);
  slow.prompt_ids = std::vector<TokenId>(400, 5);
  ask(slow);
  ask(wish("behind"));
  for (int i = 0; i < 40 && told<DoneMessage>().empty(); ++i) work(1);
  EXPECT_EQ(store_->pending_admits, 2) << "not again before its time";
  ASSERT_EQ(told<DoneMessage>().size(), 1U);
  EXPECT_EQ(told<DoneMessage>()[0].request_id, "behind");
  EXPECT_GT(told<TokenMessage>().size(), 10U) << "the running one goes on";

  pass(milliseconds(1));
  work(4);
  EXPECT_EQ(store_->pending_admits, 2);
  EXPECT_EQ(service_->next_retry() - now_, milliseconds(1));
  pass(milliseconds(159));  // its step was late
  work(6);
  EXPECT_EQ(store_->pending_admits, 1);
  EXPECT_EQ(service_->next_retry() - now_, milliseconds(10)) << "a sixteenth of 160 ms";
  pass(milliseconds(9));
  work(4);
  EXPECT_EQ(store_->pending_admits, 1);
  pass(milliseconds(1));
  work(6);
  EXPECT_EQ(store_->pending_admits, 0);
  pass(milliseconds(20));
  work();
  ASSERT_EQ(told<DoneMessage>().size(), 3U);
  EXPECT_EQ(told<DoneMessage>()[1].request_id, "slow");
  EXPECT_TRUE(told<ErrorMessage>().empty());
  EXPECT_EQ(rank_->num_sequences(), 0U);
}

// Else tries would leave no time to others.
TEST_F(ServiceTest, APauseBetweenTriesIsLongerThanSeveralTries) {
  start_rank();
  store_->pending_admits = 2;
  auto slow = wish("slow", 1);
  slow.prompt_ids = std::vector<TokenId>(400, 5);
  ask(slow);
  now_ += milliseconds(10);
  work(4);
  EXPECT_EQ(store_->pending_admits, 1);
  EXPECT_EQ(service_->next_retry() - now_, milliseconds(40));
  service_->retry(now_ + milliseconds(39));
  work(4);
  EXPECT_EQ(store_->pending_admits, 1);
  service_->retry(now_ + milliseconds(40));
  work(4);
  EXPECT_EQ(store_->pending_admits, 0);
}

TEST_F(ServiceTest, AStartThatFindsNoRoomFailsThatSequenceAloneAndIsTriedAgain) {
  start_rank();
  auto shared = wish("first", 1);
  shared.prompt_ids = std::vector<TokenId>(700, 5);
  ask(shared);
  work();
  store_->refuse_starts = 1;
  shared.request_id = "again";
  ask(shared);
  ask(wish("other"));
  work();
  EXPECT_EQ(store_->refuse_starts, 0);
  ASSERT_EQ(told<DoneMessage>().size(), 3U);
  EXPECT_EQ(told<DoneMessage>()[1].request_id, "other");  // its end made room
  EXPECT_EQ(told<DoneMessage>()[2].request_id, "again");
  EXPECT_EQ(rank_->num_sequences(), 0U);
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).worker_restarts, 0);
}

TEST_F(ServiceTest, AnswersTheHeartbeatsOfItsRanksOnly) {
  start_rank();
  say(Heartbeat{Epoch{1}, 0, 0});
  say(Heartbeat{Epoch{7}, 0, 0});  // of a life before: that rank must end
  work();
  EXPECT_EQ(echoes_, 1);
}

TEST_F(ServiceTest, ASilentGroupIsReportedToTheParentAndItsRequestsGoOn) {
  start_rank();
  ask(wish("r1", 30));
  work(10);
  const auto before = told<TokenMessage>().size();
  EXPECT_GT(before, 0U);
  EXPECT_TRUE(parent_.empty());
  for (int i = 0; i < 40; ++i) pass(milliseconds(100));
  ASSERT_EQ(parent_.size(), 1U);
  EXPECT_THAT(parent_[0], HasSubstr("\"event\":\"restart_group\""));
  EXPECT_THAT(parent_[0], HasSubstr("\"epoch\":2"));
  EXPECT_THAT(parent_[0], HasSubstr("\"life\":1"));
  plans_.clear();
  start_rank();
  work();
  const auto done = told<DoneMessage>();
  ASSERT_EQ(done.size(), 1U);
  EXPECT_EQ(done[0].tokens.size(), 30U);
  EXPECT_EQ(told<TokenMessage>().size(), 30U);
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).worker_restarts, 1);
}

// A parent pauses for up to 8 s before it starts a group that dies often.
TEST_F(ServiceTest, AParentThatSawADeathIsLeftTimeToStartTheGroup) {
  start_rank();
  say(WorkerFailed{Epoch{1}, 0, 0, {ErrorCode::kDevice, "a GPU fell off"}});
  const auto last = [this] { return parent_.back(); };
  EXPECT_THAT(last(), HasSubstr("\"event\":\"group_dead\""));
  EXPECT_THAT(last(), HasSubstr("\"life\":1"));
  EXPECT_THAT(last(), HasSubstr("a GPU fell off"));
  pass(seconds(15));
  EXPECT_THAT(last(), HasSubstr("\"event\":\"group_dead\""));
  pass(seconds(15));
  EXPECT_THAT(last(), HasSubstr("\"event\":\"restart_group\""));
  EXPECT_THAT(last(), Not(HasSubstr("\"life\"")));  // whichever it has begun since
}

TEST_F(ServiceTest, ALifeOfWhichNobodyComesIsEndedToo) {
  start_rank();
  for (int i = 0; i < 40; ++i) pass(milliseconds(100));
  ASSERT_EQ(parent_.size(), 1U);  // it is silent
  pass(seconds(50));
  EXPECT_EQ(parent_.size(), 1U);  // that may take so long
  pass(seconds(15));
  ASSERT_EQ(parent_.size(), 2U);
  EXPECT_THAT(parent_[1], HasSubstr("\"event\":\"restart_group\""));
  pass(seconds(65));
  EXPECT_EQ(parent_.size(), 3U);
  start_rank();
  pass(seconds(1));
  EXPECT_EQ(parent_.size(), 3U);
}

TEST_F(ServiceTest, ALifeOfWhichNotAllComeIsEndedToo) {
  config_.tensor_parallel_size = 2;
  const auto join = [this](int rank, int life) { say(Hello{0, rank, 2, 1, "here", life}); };
  join(0, 1);
  pass(seconds(15));
  EXPECT_TRUE(parent_.empty());
  pass(seconds(10));
  ASSERT_EQ(parent_.size(), 1U);
  EXPECT_THAT(parent_[0], HasSubstr("\"event\":\"restart_group\""));
  EXPECT_THAT(parent_[0], HasSubstr("\"life\":1"));
  join(0, 2);
  ASSERT_EQ(parent_.size(), 2U);  // that the first life has ended
  pass(seconds(15));
  join(1, 1);  // not one of those that are waited for
  pass(seconds(10));
  ASSERT_EQ(parent_.size(), 3U);
  EXPECT_THAT(parent_[2], HasSubstr("\"event\":\"restart_group\""));
  EXPECT_THAT(parent_[2], HasSubstr("\"life\":2"));
  join(0, 3);
  pass(seconds(15));
  join(1, 3);
  ASSERT_EQ(parent_.size(), 4U);
  pass(seconds(100));
  EXPECT_EQ(parent_.size(), 4U);
}

// The store and heartbeats tell lives apart by their epochs alone.
TEST_F(ServiceTest, ALifeThatBeginsWhileTheLastOneLoadsHasAnEpochOfItsOwn) {
  config_.tensor_parallel_size = 2;
  say(Hello{0, 0, 2, 1, "here", /*life=*/1});
  say(Hello{0, 1, 2, 2, "here", /*life=*/2});
  std::vector<Epoch> epochs;
  for (const auto& frame : plans_) {
    const auto message = decode_coordinator_message(frame).value_or_throw();
    epochs.push_back(std::get<Welcome>(message).epoch);
  }
  EXPECT_EQ(epochs, (std::vector{Epoch{1}, Epoch{2}}));
  plans_.clear();
  say(Heartbeat{Epoch{1}, 0, 0});  // the rank that is left over
  say(Heartbeat{Epoch{2}, 0, 1});
  work();
  EXPECT_EQ(echoes_, 1);
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).worker_restarts, 1);
  EXPECT_THAT(told<StatusReply>().at(0).detail, HasSubstr("1 of 2 ranks have joined"));
}

TEST_F(ServiceTest, GroupsShareTheNodesStore) {
  say(start_two_groups(/*slabs=*/10));
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).state, "ready");
  EXPECT_EQ(told<StatusReply>().at(0).detail, "");
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_total, 10);
}

TEST_F(ServiceTest, TheGroupThatKnowsLastTellsOfTheStore) {
  Ready ready = start_two_groups(/*slabs=*/10);
  ready.kv_slabs = {.total = 10, .free = 5, .cached = 3, .ready = 10};
  say(ready);
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_used, 2);
  ask(wish("r1"));
  work();  // of the first group, which has released what it took
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(1).kv_slabs_used, 0);
  EXPECT_THAT(metrics_.text(), HasSubstr("foretoken_kv_cache_usage_perc{model_name=\"m\"} 0\n"));
}

TEST_F(ServiceTest, TheStatusTellsWhatTheStoreHoldsBeforeTheFirstStep) {
  store_ = std::make_shared<FakeStore>();
  say(Hello{0, 0, 1, 1, "here"});
  auto ready = FakeRank(FakeRankConfig{}, store_).ready(Epoch{1});
  ready.kv_slabs = {.total = 10, .free = 5, .cached = 3, .ready = 10};
  say(ready);
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_total, 10);
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_used, 2);  // by another group
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_cached, 3);
}

TEST_F(ServiceTest, TheStatusTellsOfTheArenaThatThereIs) {
  start_rank(/*slabs=*/10);
  store_->slabs = 6;  // its memory ran out
  ask(wish("r1"));
  work();
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_total, 6);
  EXPECT_EQ(told<StatusReply>().at(0).kv_slabs_used, 0);
}

TEST_F(ServiceTest, AFailureWhileLoadingShowsInTheStatus) {
  say(Hello{0, 0, 1, 1, "here"});
  say(WorkerFailed{Epoch{1}, 0, 0, {ErrorCode::kModelFile, "model.safetensors is cut short"}});
  ask(StatusRequest{});
  EXPECT_EQ(told<StatusReply>().at(0).state, "failed");
  EXPECT_THAT(told<StatusReply>().at(0).detail, HasSubstr("model.safetensors is cut short"));
}

TEST_F(ServiceTest, DrainFinishesWhatRunsAndTakesNothingNew) {
  start_rank();
  ask(wish("r1", 20));
  work(5);
  ask(DrainRequest{});
  EXPECT_EQ(told<DrainReply>().size(), 1U);
  EXPECT_EQ(parent_.back(), R"({"event":"draining"})");
  ask(wish("r2"));
  EXPECT_EQ(told<ErrorMessage>().at(0).code, "unavailable");
  EXPECT_FALSE(service().is_finished());
  work();
  pass(milliseconds(20));
  EXPECT_TRUE(service().is_finished());
  EXPECT_EQ(told<DoneMessage>().at(0).tokens.size(), 20U);
  work();
  EXPECT_EQ(shutdowns_, 1);
}

TEST_F(ServiceTest, DrainWaitsForAnAnswerToLeave) {
  start_rank();
  ask(wish("r1", 20));
  work(5);
  ask(DrainRequest{});
  slow_ = "p";
  work();
  pass(milliseconds(20));
  EXPECT_FALSE(service().is_finished());
  slow_.clear();
  pass(milliseconds(20));
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
  EXPECT_TRUE(service().is_finished());
}

TEST_F(ServiceTest, DrainEndsAtItsDeadline) {
  config_.drain_timeout_s = 5;
  ask(wish("waits for ever"));
  ask(wish("r1"));
  ask(DrainRequest{});
  pass(seconds(4));
  EXPECT_FALSE(service().is_finished());
  pass(seconds(1));
  EXPECT_TRUE(service().is_finished());
  EXPECT_EQ(told<ErrorMessage>().back().code, "unavailable");
}

TEST_F(ServiceTest, OnlyTheOperatorMayDrain) {
  operator_key_ = "operator";
  ask(DrainRequest{}, "p", "tenant");
  EXPECT_EQ(told<ErrorMessage>().at(0).code, "invalid_argument");
  ask(DrainRequest{}, "p", "operator");
  EXPECT_EQ(told<DrainReply>().size(), 1U);
}

// The same prompt of another tenant finds nothing: its keys differ from the first segment on.
TEST_F(ServiceTest, PrefixesAreATenantsOwn) {
  start_rank();
  auto request = wish("r1", 1);
  request.prompt_ids = std::vector<TokenId>(700, 5);
  const auto cached = [&](const std::string& tenant) {
    told_.clear();
    ask(request, "p", tenant);
    work();
    return told<DoneMessage>().at(0).usage.cached_tokens;
  };
  EXPECT_EQ(cached("one"), 0);
  EXPECT_EQ(cached("one"), 512);
  EXPECT_EQ(cached("two"), 0);
  EXPECT_EQ(cached("two"), 512);
}

TEST_F(ServiceTest, FramesOfRanksThatCanNotBeReadHarmNobody) {
  start_rank();
  for (const auto* junk : {"", "junk", "\xdf\xff\xff\xff\xff"}) {
    service().on_worker_frame({"rank", "", junk}, now_);
  }
  say(Hello{7, 0, 1, 1, "here"});
  say(Heartbeat{Epoch{1}, -1, 0});
  ask(wish("r1"));
  work();
  EXPECT_EQ(told<DoneMessage>().size(), 1U);
}

}  // namespace
}  // namespace foretoken::coordinator
