// The C++ client against a real coordinator process with fake ranks.
#include "client/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <nlohmann/json.hpp>
#include <thread>
#include <zmq.hpp>

#include "common/wire.h"
#include "tests/coordinator/fake_worker.h"
#include "tests/coordinator/test_service.h"
#include "tests/coordinator/tiny_model.h"

namespace foretoken::client {
namespace {

using coordinator::FakeRankConfig;
using coordinator::reference_tokens;
using coordinator::TestService;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

ServiceConfig config_of(int tensor_parallel_size) {
  ServiceConfig config;
  config.port = 0;
  config.tensor_parallel_size = tensor_parallel_size;
  return config;
}

std::vector<TokenId> bytes_of(const std::string& text) {
  std::vector<TokenId> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

std::vector<TokenId> ids_of(const std::vector<TokenInfo>& tokens) {
  std::vector<TokenId> ids;
  for (const auto& token : tokens) ids.push_back(token.id);
  return ids;
}

GenerateRequest wish(const std::string& prompt, int max_tokens) {
  GenerateRequest request;
  request.prompt = prompt;
  request.max_tokens = max_tokens;
  return request;
}

TEST(Client, StreamsARequestAndAsksAboutTheService) {
  TestService service(config_of(2));
  service.start_ranks();
  const auto client = service.connect();
  service.wait_until_ready(*client);

  std::string streamed;
  std::vector<TokenId> ids;
  const auto done = client->generate(wish("Once upon a time", 40), [&](const TokenMessage& m) {
    streamed += m.text;
    for (const auto& token : m.tokens) ids.push_back(token.id);
    return StreamAction::kContinue;
  });
  ASSERT_TRUE(done) << done.error().message;
  const auto expected = reference_tokens(bytes_of("Once upon a time"), 0, 40, {});
  EXPECT_EQ(ids_of(done->tokens), expected);
  EXPECT_EQ(ids, expected);
  EXPECT_EQ(streamed, done->text);
  EXPECT_EQ(done->prompt_ids, bytes_of("Once upon a time"));
  EXPECT_EQ(done->usage.completion_tokens, static_cast<std::int64_t>(expected.size()));
  EXPECT_EQ(done->kv.policy, "attention-predictor");
  EXPECT_GT(done->kv.blocks_fetched, 0);
  EXPECT_GT(done->timing.total_ms, 0);

  const auto models = client->models();
  ASSERT_TRUE(models);
  EXPECT_EQ(models->models, std::vector<std::string>{"tiny"});
  EXPECT_EQ(models->max_model_len, coordinator::kTinyContext);
  const auto status = client->status();
  ASSERT_TRUE(status);
  EXPECT_EQ(status->requests_running, 0);
  EXPECT_EQ(status->kv_slabs_used, 0);
}

TEST(Client, ManyRequestsAtOnceGetTheirOwnTokens) {
  TestService service(config_of(2));
  service.start_ranks();
  const auto client = service.connect();
  std::map<std::string, std::vector<TokenId>> expected;
  for (int i = 0; i < 40; ++i) {
    const std::string prompt(static_cast<std::size_t>(1 + i * 37), static_cast<char>('a' + i % 26));
    const auto name = client->submit(wish(prompt, 1 + i));
    ASSERT_TRUE(name);
    expected[*name] = reference_tokens(bytes_of(prompt), 0, 1 + i, {});
  }
  while (!expected.empty()) {
    const auto message = client->receive(20s);
    ASSERT_TRUE(message) << message.error().message;
    const auto* error = std::get_if<ErrorMessage>(&*message);
    ASSERT_EQ(error, nullptr) << error->message;
    if (const auto* done = std::get_if<DoneMessage>(&*message)) {
      ASSERT_EQ(ids_of(done->tokens), expected.at(done->request_id));
      expected.erase(done->request_id);
    }
  }
}

TEST(Client, GenerateLeavesTheMessagesOfSubmittedRequests) {
  TestService service(config_of(1));
  service.start_ranks();
  const auto client = service.connect();
  const auto first = client->submit(wish("a", 5));
  ASSERT_TRUE(first);
  ASSERT_TRUE(client->generate(wish("b", 50)));
  std::size_t tokens = 0;
  while (true) {
    const auto message = client->receive(20s);
    ASSERT_TRUE(message) << message.error().message;
    if (const auto* token = std::get_if<TokenMessage>(&*message)) tokens += token->tokens.size();
    const auto* done = std::get_if<DoneMessage>(&*message);
    if (done == nullptr) continue;
    EXPECT_EQ(done->request_id, *first);
    break;
  }
  EXPECT_EQ(tokens, 5U);
}

TEST(Client, CancelsFromTheCallback) {
  TestService service(config_of(1));
  service.start_ranks(/*step_ms=*/5);
  const auto client = service.connect();
  auto request = wish("endless", 4000);
  request.ignore_eos = true;
  std::size_t tokens = 0;
  const auto done = client->generate(request, [&](const TokenMessage& message) {
    tokens += message.tokens.size();
    return tokens < 3 ? StreamAction::kContinue : StreamAction::kCancel;
  });
  ASSERT_TRUE(done) << done.error().message;
  EXPECT_EQ(done->finish_reason, "cancelled");
  EXPECT_GE(done->tokens.size(), 3U);
  EXPECT_LT(done->tokens.size(), 4000U);
  const auto again = client->generate(wish("next", 3));
  EXPECT_TRUE(again);
  EXPECT_EQ(client->status()->kv_slabs_used, 0);
}

TEST(Client, CancelsWhileNoTokenComes) {
  TestService service(config_of(1));  // without ranks
  const auto client = service.connect();
  int calls = 0;
  const auto done = client->generate(wish("waits", 10), [&](const TokenMessage& message) {
    EXPECT_TRUE(message.tokens.empty());
    return ++calls < 3 ? StreamAction::kContinue : StreamAction::kCancel;
  });
  ASSERT_TRUE(done) << done.error().message;
  EXPECT_EQ(done->finish_reason, "cancelled");
}

// How long a request may take is the service's to say, unless the client says less.
TEST(Client, ARequestHasTheTimeThatTheServiceGives) {
  EXPECT_FALSE(ClientConfig{}.request_timeout);
  auto config = config_of(1);
  config.request_timeout_s = 1;
  TestService service(config);
  const auto told = service.connect()->generate(wish("waits", 10));
  ASSERT_FALSE(told);
  EXPECT_THAT(told.error().message, HasSubstr("--request-timeout-s 1"));
  const auto hasty =
      Client::connect({.endpoint = service.endpoint(),
                       .keys = read_client_keys(service.folder() / "client.key").value_or_throw(),
                       .request_timeout = 300ms});
  EXPECT_THAT((*hasty)->generate(wish("waits", 10)).error().message, HasSubstr("longer"));
}

TEST(Client, ErrorsSayWhatIsWrong) {
  TestService service(config_of(1));
  service.start_ranks();
  const auto client = service.connect();
  const auto too_long = client->generate(wish(std::string(5000, 'x'), 10));
  ASSERT_FALSE(too_long);
  EXPECT_EQ(too_long.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(too_long.error().message, HasSubstr("--max-model-len"));
  EXPECT_EQ(client->generate(wish("", 10)).error().code, ErrorCode::kInvalidArgument);
  auto stops = wish("x", 10);
  stops.stop.assign(2000, "a");
  EXPECT_EQ(client->generate(stops).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(client->generate(wish(std::string(5 << 20, 'x'), 10)).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_TRUE(client->generate(wish("fine", 2)));
}

TEST(Client, NoticesThatNobodyIsThere) {
  const auto client =
      Client::connect({.endpoint = "ipc:///tmp/foretoken-nobody", .silence_timeout = 300ms});
  ASSERT_TRUE(client);
  EXPECT_EQ((*client)->status().error().code, ErrorCode::kUnavailable);
  EXPECT_EQ((*client)->generate(wish("x", 1)).error().code, ErrorCode::kUnavailable);
  EXPECT_FALSE(Client::connect({.endpoint = "nonsense"}));
}

TEST(Client, NeedsAKnownKey) {
  TestService service(config_of(1));
  const auto good = read_client_keys(service.folder() / "client.key").value_or_throw();
  const ClientKeys stranger{good.server_public_key, make_key_pair()};
  for (const std::optional<ClientKeys>& keys : {std::optional<ClientKeys>(), {stranger}}) {
    const auto client =
        Client::connect({.endpoint = service.endpoint(), .keys = keys, .silence_timeout = 500ms});
    EXPECT_EQ((*client)->status().error().code, ErrorCode::kUnavailable);
  }
  EXPECT_TRUE(service.connect(good)->status());
}

// It could take the name of a connection that is gone, and with it what that one is still sent.
TEST(Client, MayNotNameItsConnection) {
  auto config = config_of(1);
  config.zmq_endpoint = "ipc:///tmp/foretoken_test_named_" + std::to_string(getpid());
  TestService service(config);
  zmq::context_t context;
  zmq::socket_t named(context, zmq::socket_type::dealer);
  named.set(zmq::sockopt::linger, 0);
  named.set(zmq::sockopt::rcvtimeo, 20000);
  named.set(zmq::sockopt::routing_id, "X");
  named.connect(service.endpoint());
  named.send(zmq::buffer(encode(ClientRequest(StatusRequest{}))));
  zmq::message_t answer;
  ASSERT_TRUE(named.recv(answer));
  const auto message = decode_server_message(answer.to_string()).value_or_throw();
  const auto* error = std::get_if<ErrorMessage>(&message);
  ASSERT_NE(error, nullptr);
  EXPECT_EQ(error->code, "invalid_argument");
  EXPECT_THAT(error->message, HasSubstr("routing id"));
  EXPECT_TRUE(service.connect()->status());
}

TEST(Client, DrainLetsWhatRunsFinish) {
  TestService service(config_of(1));
  service.start_ranks(/*step_ms=*/5);
  const auto client = service.connect();
  service.wait_until_ready(*client);
  auto request = wish("goes on", 30);
  request.ignore_eos = true;
  ASSERT_TRUE(client->submit(request));
  ASSERT_TRUE(client->drain());
  const auto other = service.connect();
  EXPECT_EQ(other->generate(wish("late", 1)).error().code, ErrorCode::kUnavailable);
  while (true) {
    const auto message = client->receive(20s);
    ASSERT_TRUE(message) << message.error().message;
    const auto* done = std::get_if<DoneMessage>(&*message);
    if (done == nullptr) continue;
    EXPECT_EQ(done->tokens.size(), 30U);
    break;
  }
  EXPECT_EQ(service.coordinator().wait(), 0);
  for (auto& rank : service.ranks()) EXPECT_EQ(rank->wait(), 0);
}

TEST(Client, SigtermDrainsAndASecondOneEndsAtOnce) {
  TestService service(config_of(1));
  service.start_ranks(/*step_ms=*/20);
  const auto client = service.connect();
  auto request = wish("goes on", 4000);
  request.ignore_eos = true;
  ASSERT_TRUE(client->submit(request));
  ASSERT_TRUE(client->receive(20s));
  service.coordinator().signal(SIGTERM);
  while (client->status()->state != "draining") std::this_thread::sleep_for(5ms);
  service.coordinator().signal(SIGTERM);
  EXPECT_EQ(service.coordinator().wait(), 0);
}

// A rank is killed while it decodes; its group comes back as a new epoch; no token is lost or
// doubled. The ranks are restarted as `foretoken serve` would.
TEST(Client, SurvivesTheDeathOfARank) {
  TestService service(config_of(2));
  service.start_ranks(/*step_ms=*/5);
  const auto client = service.connect();
  service.wait_until_ready(*client);
  auto request = wish("a long story", 300);
  request.ignore_eos = true;
  std::vector<TokenId> ids;
  bool killed = false;
  const auto done = client->generate(request, [&](const TokenMessage& message) {
    for (const auto& token : message.tokens) ids.push_back(token.id);
    if (ids.size() > 50 && !killed) {
      killed = true;
      service.ranks()[1]->signal(SIGKILL);
      service.start_ranks();
    }
    return StreamAction::kContinue;
  });
  ASSERT_TRUE(done) << done.error().message;
  FakeRankConfig no_end;
  auto expected = std::vector<TokenId>();
  auto all = bytes_of("a long story");
  while (expected.size() < 300) {
    expected.push_back(coordinator::next_token(all, 0, no_end));
    all.push_back(expected.back());
  }
  EXPECT_EQ(ids, expected);
  EXPECT_EQ(ids_of(done->tokens), expected);
  EXPECT_GE(client->status()->worker_restarts, 1);
}

// It answers a question about its status late, when it has been sent more than it knew then.
TEST(Client, AServiceThatStoodStillHasForgottenNothing) {
  TestService service(config_of(1));
  const auto client = service.connect();
  ASSERT_TRUE(client->submit(wish("first", 10)));
  ASSERT_TRUE(client->status());
  service.coordinator().signal(SIGSTOP);
  const auto wait = [&](std::chrono::milliseconds time) {
    const auto message = client->receive(time);
    ASSERT_FALSE(message);
    EXPECT_EQ(message.error().code, ErrorCode::kTimeout) << message.error().message;
  };
  wait(1500ms);  // long enough for the question
  ASSERT_TRUE(client->submit(wish("second", 10)));
  wait(1500ms);
  service.coordinator().signal(SIGCONT);
  wait(1000ms);
}

// The service's side, in the hands of a test.
class FakePeer {
 public:
  explicit FakePeer(const std::string& endpoint)
      : socket_(
            RouterSocket::bind(make_socket_context(), {.endpoint = endpoint}).value_or_throw()) {}
  const std::string& endpoint() const { return socket_->endpoint(); }

  // Waits for a frame and returns whose it is.
  std::string take() {
    RouterSocket* const sockets[] = {socket_.get()};
    const auto end = std::chrono::steady_clock::now() + 10s;
    while (std::chrono::steady_clock::now() < end) {
      if (const auto frame = socket_->receive()) return frame->peer;
      wait_readable(sockets, {}, 20ms);
    }
    ADD_FAILURE() << "no frame came";
    return "";
  }
  void send(const std::string& peer, const ServerMessage& message) {
    socket_->send(peer, encode(message)).value_or_throw();
  }

 private:
  std::unique_ptr<RouterSocket> socket_;
};

DoneMessage done_of(const std::string& name) {
  DoneMessage done;
  done.request_id = name;
  return done;
}

class ClientOver : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Endpoints, ClientOver, ::testing::Values("tcp", "ipc"));

TEST_P(ClientOver, ALostConnectionEndsItsRequestsAtOnce) {
  const auto path = "ipc:///tmp/foretoken_test_lost_" + std::to_string(getpid());
  auto service = std::make_unique<FakePeer>(GetParam() == "tcp" ? "tcp://127.0.0.1:0" : path);
  const auto endpoint = service->endpoint();
  const auto client = Client::connect({.endpoint = endpoint}).value_or_throw();
  std::vector<std::string> names;
  std::string peer;
  for (const char* prompt : {"done", "lost", "lost too"}) {
    names.push_back(client->submit(wish(prompt, 10)).value_or_throw());
    peer = service->take();
  }
  service->send(peer, TokenMessage{names[1], {}, "it begins"});
  service->send(peer, done_of(names[0]));
  std::this_thread::sleep_for(100ms);  // a service that is ended loses what it has not sent yet
  service.reset();

  const auto begin = std::chrono::steady_clock::now();
  std::vector<ServerMessage> messages;  // what came before the loss comes first
  for (int i = 0; i < 4; ++i) messages.push_back(client->receive(10s).value_or_throw());
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 2s);
  EXPECT_EQ(std::get<TokenMessage>(messages[0]).text, "it begins");
  EXPECT_EQ(std::get<DoneMessage>(messages[1]).request_id, names[0]);
  for (const std::size_t i : {2U, 3U}) {
    const auto& error = std::get<ErrorMessage>(messages[i]);
    EXPECT_EQ(error.request_id, names[i - 1]);
    EXPECT_EQ(error.code, "unavailable");
    EXPECT_THAT(error.message, HasSubstr("was lost, and the request with it"));
  }

  service = std::make_unique<FakePeer>(endpoint);
  const auto name = client->submit(wish("new", 10)).value_or_throw();
  peer = service->take();
  service->send(peer, done_of(name));
  const auto message = client->receive(10s).value_or_throw();
  EXPECT_EQ(std::get<DoneMessage>(message).request_id, name);
}

TEST(Client, AKilledServiceEndsGenerateAtOnce) {
  TestService service(config_of(1));
  service.start_ranks(/*step_ms=*/5);
  const auto client = service.connect();
  service.wait_until_ready(*client);
  auto request = wish("goes on", 4000);
  request.ignore_eos = true;
  auto killed = std::chrono::steady_clock::time_point::max();
  const auto done = client->generate(request, [&](const TokenMessage& message) {
    if (!message.tokens.empty() && killed == std::chrono::steady_clock::time_point::max()) {
      service.coordinator().signal(SIGKILL);
      killed = std::chrono::steady_clock::now();
    }
    return StreamAction::kContinue;
  });
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(done.error().message, HasSubstr("was lost, and the request with it"));
  EXPECT_LT(std::chrono::steady_clock::now() - killed, 2s);
}

TEST(Client, AQuestionEndsWithItsConnection) {
  TestService service(config_of(1));
  const auto client = service.connect();
  ASSERT_TRUE(client->status());
  service.coordinator().signal(SIGSTOP);
  std::jthread end([&] {
    std::this_thread::sleep_for(300ms);
    service.coordinator().signal(SIGKILL);
  });
  const auto told = client->status();
  ASSERT_FALSE(told);
  EXPECT_EQ(told.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(told.error().message, HasSubstr("lost before an answer came"));
}

TEST(Client, LosesItsRequestWithAServiceThatIsRestarted) {
  auto config = config_of(1);
  config.zmq_endpoint = "ipc:///tmp/foretoken_test_restart_" + std::to_string(getpid());
  auto service = std::make_unique<TestService>(config);
  const auto client = service->connect();
  ASSERT_TRUE(client->submit(wish("waits for ever", 10)));
  ASSERT_TRUE(client->status());
  service.reset();
  service = std::make_unique<TestService>(config);
  EXPECT_TRUE(client->status());  // the new one's; the request's end isn't lost over it
  const auto message = client->receive(20s).value_or_throw();
  EXPECT_EQ(std::get<ErrorMessage>(message).code, "unavailable");
}

// As one does whose client has read nothing for long.
TEST(Client, LearnsThatItsServiceForgotItsRequest) {
  FakePeer service("tcp://127.0.0.1:0");
  const auto client = Client::connect({.endpoint = service.endpoint()}).value_or_throw();
  client->submit(wish("forgotten", 10)).value_or_throw();
  service.take();
  EXPECT_EQ(client->receive(1200ms).error().code, ErrorCode::kTimeout);
  service.send(service.take(), StatusReply{});  // to what the client has asked after a second
  const auto message = client->receive(10s);
  ASSERT_FALSE(message);
  EXPECT_EQ(message.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(message.error().message, HasSubstr("lost the request"));
}

}  // namespace
}  // namespace foretoken::client
