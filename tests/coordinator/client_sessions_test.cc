#include "coordinator/client_sessions.h"

#include <gtest/gtest.h>

#include "common/wire.h"

namespace foretoken::coordinator {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class FakeOutbox : public Outbox {
 public:
  Status to_client(const std::string&, std::string_view frame) override {
    if (error) return *error;
    frames.emplace_back(frame);
    return Ok{};
  }
  Status to_worker(const std::string&, std::string_view) override { return Ok{}; }
  void to_parent(const std::string&) override {}

  std::optional<Error> error;
  std::vector<std::string> frames;
};

class ClientSessionsTest : public ::testing::Test {
 protected:
  void block() { outbox_.error = Error{ErrorCode::kExhausted, "full"}; }
  void unblock() { outbox_.error.reset(); }
  void close() { outbox_.error = Error{ErrorCode::kNotFound, "gone"}; }
  void send(const std::string& message = "hello") {
    sessions_.send("p", ErrorMessage{"r", "internal", message}, now_);
  }
  std::vector<std::string> pass(milliseconds time) { return sessions_.on_time(now_ += time); }

  FakeOutbox outbox_;
  ClientSessions sessions_{outbox_};
  TimePoint now_ = TimePoint{} + seconds(1000);
};

TEST_F(ClientSessionsTest, KnowsWhoseRequestIsWhose) {
  sessions_.attach("p", "", "r", RequestId{1});
  sessions_.attach("q", "", "r", RequestId{2});
  EXPECT_EQ(sessions_.find("p", "r"), RequestId{1});
  EXPECT_EQ(sessions_.find("q", "r"), RequestId{2});
  EXPECT_EQ(sessions_.find("p", "other"), std::nullopt);
  EXPECT_EQ(sessions_.count("p", ""), 1U);
  sessions_.detach("p", "r");
  sessions_.detach("p", "r");  // nothing to do
  EXPECT_EQ(sessions_.find("p", "r"), std::nullopt);
  EXPECT_EQ(sessions_.find("q", "r"), RequestId{2});
}

TEST_F(ClientSessionsTest, CountsATenantOverItsConnections) {
  sessions_.attach("p", "key", "r", RequestId{1});
  sessions_.attach("q", "key", "r", RequestId{2});
  EXPECT_EQ(sessions_.count("new", "key"), 2U);
  sessions_.detach("q", "r");
  EXPECT_EQ(sessions_.count("new", "key"), 1U);
}

TEST_F(ClientSessionsTest, CountsARequestForTheTenantThatAskedForIt) {
  sessions_.attach("p", "one", "r1", RequestId{1});
  sessions_.attach("p", "other", "r2", RequestId{2});
  sessions_.detach("p", "r1");
  EXPECT_EQ(sessions_.count("new", "one"), 0U);
  EXPECT_EQ(sessions_.count("new", "other"), 1U);
  sessions_.detach("p", "r2");
  EXPECT_EQ(sessions_.count("new", "other"), 0U);
}

TEST_F(ClientSessionsTest, AFullSocketsFramesWaitInOrder) {
  block();
  send("one");
  send("two");
  EXPECT_FALSE(sessions_.can_send("p"));
  EXPECT_TRUE(sessions_.can_send("q"));
  unblock();
  EXPECT_TRUE(pass(milliseconds(1)).empty());
  EXPECT_TRUE(sessions_.can_send("p"));
  ASSERT_EQ(outbox_.frames.size(), 2U);
  EXPECT_NE(outbox_.frames[0].find("one"), std::string::npos);
}

TEST_F(ClientSessionsTest, AClientThatReadsNothingIsLostAfter30Seconds) {
  sessions_.attach("p", "", "r", RequestId{1});
  block();
  send();
  EXPECT_TRUE(pass(seconds(29)).empty());
  EXPECT_EQ(pass(seconds(1)), std::vector<std::string>{"p"});
  EXPECT_EQ(sessions_.requests_of("p"), std::vector<RequestId>{RequestId{1}});
}

TEST_F(ClientSessionsTest, AQueueOfManyRepliesIsNotEndless) {
  block();
  for (int i = 0; i < 1000; ++i) send(std::string(1000, 'x'));
  EXPECT_EQ(pass(milliseconds(1)), std::vector<std::string>{"p"});
  EXPECT_TRUE(pass(milliseconds(1)).empty());  // forgotten
}

TEST_F(ClientSessionsTest, OneLargeFrameMayWait) {
  block();
  send(std::string(2 << 20, 'x'));
  EXPECT_TRUE(pass(milliseconds(1)).empty());
  unblock();
  pass(milliseconds(1));
  EXPECT_EQ(outbox_.frames.size(), 1U);
}

TEST_F(ClientSessionsTest, SmallRepliesMayWaitBehindALargeFrame) {
  block();
  EXPECT_TRUE(sessions_.is_empty());
  send(std::string(2 << 20, 'x'));
  send();
  EXPECT_FALSE(sessions_.is_empty());
  EXPECT_TRUE(pass(milliseconds(1)).empty());
  unblock();
  pass(milliseconds(1));
  EXPECT_EQ(outbox_.frames.size(), 2U);
  EXPECT_TRUE(sessions_.is_empty());
}

TEST_F(ClientSessionsTest, SilentWorkShowsThatItLivesAndWhoIsGone) {
  sessions_.attach("p", "", "r", RequestId{1});
  EXPECT_TRUE(pass(ClientSessions::kKeepAlive).empty());
  ASSERT_EQ(outbox_.frames.size(), 1U);
  const auto message = decode_server_message(outbox_.frames[0]);
  ASSERT_TRUE(message);
  EXPECT_TRUE(std::get<TokenMessage>(*message).tokens.empty());
  close();
  EXPECT_EQ(pass(ClientSessions::kKeepAlive), std::vector<std::string>{"p"});
}

TEST_F(ClientSessionsTest, AConnectionWithoutRequestsIsLeftAlone) {
  send();
  EXPECT_EQ(outbox_.frames.size(), 1U);
  EXPECT_TRUE(pass(seconds(100)).empty());
  EXPECT_EQ(outbox_.frames.size(), 1U);
}

}  // namespace
}  // namespace foretoken::coordinator
