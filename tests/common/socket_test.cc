#include "common/socket.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>
#include <zmq.hpp>

namespace foretoken {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
constexpr milliseconds kDeadline{10000};
constexpr milliseconds kShort{300};

std::optional<RouterFrame> receive(RouterSocket& router, milliseconds timeout) {
  const auto end = steady_clock::now() + timeout;
  RouterSocket* sockets[] = {&router};
  while (steady_clock::now() < end) {
    if (auto frame = router.receive()) return frame;
    wait_readable(sockets, {}, milliseconds(20));
  }
  return router.receive();
}

class SocketTest : public ::testing::Test {
 protected:
  std::unique_ptr<RouterSocket> bind(RouterSocket::Config config) {
    if (config.endpoint.empty()) config.endpoint = "tcp://127.0.0.1:0";
    return RouterSocket::bind(context_, config).value_or_throw();
  }
  std::unique_ptr<DealerSocket> dial(const RouterSocket& router,
                                     std::optional<ClientKeys> keys = std::nullopt) {
    return DealerSocket::connect(make_socket_context(),
                                 {.endpoint = router.endpoint(), .keys = std::move(keys)})
        .value_or_throw();
  }
  std::shared_ptr<SocketContext> context_ = make_socket_context();
};

TEST_F(SocketTest, CarriesFramesBothWays) {
  const auto router = bind({});
  EXPECT_EQ(router->endpoint().find(":0"), std::string::npos);
  const auto dealer = dial(*router);
  ASSERT_TRUE(dealer->send("hello"));
  const auto frame = receive(*router, kDeadline);
  ASSERT_TRUE(frame);
  EXPECT_EQ(frame->body, "hello");
  EXPECT_EQ(frame->client_key, "");
  ASSERT_TRUE(router->send(frame->peer, "world"));
  EXPECT_EQ(dealer->receive(kDeadline), "world");
  EXPECT_EQ(dealer->receive(milliseconds(0)), std::nullopt);
}

TEST_F(SocketTest, WorksOverIpc) {
  const auto path = std::filesystem::temp_directory_path() /
                    ("foretoken_socket_test_" + std::to_string(::getpid()));
  const auto router = bind({.endpoint = "ipc://" + path.string()});
  const auto dealer = dial(*router);
  ASSERT_TRUE(dealer->send("hello"));
  EXPECT_TRUE(receive(*router, kDeadline));
  std::filesystem::remove(path);
}

TEST_F(SocketTest, ALostConnectionShowsAndWhatCameBeforeIsThere) {
  for (const bool with_keys : {false, true}) {
    const auto server = make_key_pair();
    const auto client = make_key_pair();
    RouterSocket::Config config;
    DealerSocket::Config dialed{.watches_connection = true};
    if (with_keys) {
      config.server_keys = server;
      config.allowed_clients = {client.public_key};
      dialed.keys = ClientKeys{server.public_key, client};
    }
    auto router = bind(config);
    dialed.endpoint = router->endpoint();
    const auto dealer = DealerSocket::connect(make_socket_context(), dialed).value_or_throw();
    ASSERT_TRUE(dealer->send("hello"));
    const auto frame = receive(*router, kDeadline);
    ASSERT_TRUE(frame);
    EXPECT_FALSE(dealer->was_lost());
    ASSERT_TRUE(router->send(frame->peer, "last words"));
    std::this_thread::sleep_for(kShort);  // no linger
    router.reset();
    while (!dealer->was_lost()) std::this_thread::sleep_for(milliseconds(1));
    EXPECT_EQ(dealer->receive(kDeadline), "last words");
    const auto begin = steady_clock::now();
    EXPECT_EQ(dealer->receive(kDeadline), std::nullopt);
    EXPECT_LT(steady_clock::now() - begin, kDeadline / 2);
  }
}

TEST_F(SocketTest, AConnectionThatNeverWasIsNotLost) {
  const auto server = make_key_pair();
  const auto router = bind({.server_keys = server});  // nobody is allowed
  const ClientKeys stranger{server.public_key, make_key_pair()};
  const DealerSocket::Config to[] = {
      {.endpoint = "ipc:///tmp/foretoken-nobody", .watches_connection = true},
      {.endpoint = router->endpoint(), .watches_connection = true},
      {.endpoint = router->endpoint(), .keys = stranger, .watches_connection = true}};
  for (const auto& config : to) {
    const auto dealer = DealerSocket::connect(make_socket_context(), config).value_or_throw();
    const auto begin = steady_clock::now();
    EXPECT_EQ(dealer->receive(2 * kShort), std::nullopt);
    EXPECT_GE(steady_clock::now() - begin, 2 * kShort);
    EXPECT_FALSE(dealer->was_lost());
  }
}

TEST_F(SocketTest, TellsThatAPeerIsGoneOrWasNeverThere) {
  const auto router = bind({});
  EXPECT_EQ(router->send("nobody", "x").error().code, ErrorCode::kNotFound);
  auto dealer = dial(*router);
  ASSERT_TRUE(dealer->send("hello"));
  const auto frame = receive(*router, kDeadline);
  ASSERT_TRUE(frame);
  dealer.reset();
  const auto end = steady_clock::now() + kDeadline;
  Status sent = Ok{};
  while ((sent = router->send(frame->peer, "x")) && steady_clock::now() < end) ::usleep(1000);
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code, ErrorCode::kNotFound);
}

TEST_F(SocketTest, TellsThatAPeerDoesNotRead) {
  const auto router = bind({});
  const auto dealer = dial(*router);
  ASSERT_TRUE(dealer->send("hello"));
  const auto frame = receive(*router, kDeadline);
  ASSERT_TRUE(frame);
  const std::string body(64 << 10, 'x');
  Status sent = Ok{};
  for (int i = 0; i < 100000 && sent; ++i) sent = router->send(frame->peer, body);
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code, ErrorCode::kExhausted);
}

// What the kernel takes comes on top.
TEST_F(SocketTest, QueuesAsManyMessagesForAPeerAsItWasTold) {
  const auto router = bind({.max_queued = 4});
  zmq::context_t context;
  zmq::socket_t dealer(context, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, 0);
  dealer.set(zmq::sockopt::rcvhwm, 1);
  dealer.connect(router->endpoint());
  dealer.send(zmq::str_buffer("hello"));
  const auto frame = receive(*router, kDeadline);
  ASSERT_TRUE(frame);
  const std::string body(4 << 20, 'x');
  int sent = 0;
  while (sent < 100 && router->send(frame->peer, body)) ++sent;
  EXPECT_GE(sent, 4);
  EXPECT_LT(sent, 20);
}

TEST_F(SocketTest, ReportsAPortInUse) {
  const auto router = bind({});
  const auto second = RouterSocket::bind(make_socket_context(), {.endpoint = router->endpoint()});
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kPortInUse);
  EXPECT_EQ(RouterSocket::bind(context_, {.endpoint = "nonsense"}).error().code,
            ErrorCode::kConfig);
}

// libzmq would take the path over, and the one that listened would not hear of it.
TEST_F(SocketTest, ReportsAnIpcPathInUse) {
  const auto path = std::filesystem::path(testing::TempDir()) / "foretoken-socket-in-use";
  std::ofstream(path) << "what a process that was killed leaves";
  const RouterSocket::Config config{.endpoint = "ipc://" + path.string()};
  const auto router = bind(config);
  const auto second = RouterSocket::bind(context_, config);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kPortInUse);
}

TEST_F(SocketTest, GivesMultipartMessagesOnAsEmptyFrames) {
  const auto router = bind({});
  zmq::context_t context;
  zmq::socket_t dealer(context, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, 0);
  dealer.connect(router->endpoint());
  dealer.send(zmq::str_buffer("one"), zmq::send_flags::sndmore);
  dealer.send(zmq::str_buffer("two"));
  const auto frame = receive(*router, kDeadline);
  ASSERT_TRUE(frame);
  EXPECT_EQ(frame->body, "");
}

TEST_F(SocketTest, DropsAConnectionThatSendsTooMuch) {
  const auto router = bind({.max_frame_bytes = 1000});
  const auto dealer = dial(*router);
  ASSERT_TRUE(dealer->send(std::string(1001, 'x')));
  EXPECT_FALSE(receive(*router, kShort));
  ASSERT_TRUE(dial(*router)->send("small"));
}

class CurveTest : public SocketTest {
 protected:
  ClientKeys keys_for(const KeyPair& own) { return {server_.public_key, own}; }
  const KeyPair server_ = make_key_pair();
  const KeyPair friend_ = make_key_pair();
  const KeyPair stranger_ = make_key_pair();
};

TEST_F(CurveTest, LetsOnlyKnownKeysIn) {
  const auto router = bind({.server_keys = server_, .allowed_clients = {friend_.public_key}});
  const auto stranger = dial(*router, keys_for(stranger_));
  const auto plain = dial(*router);
  const auto wrong_server = dial(*router, ClientKeys{make_key_pair().public_key, friend_});
  // Taken only if the connection is not closed yet.
  static_cast<void>(stranger->send("stranger"));
  static_cast<void>(plain->send("plain"));
  static_cast<void>(wrong_server->send("wrong server key"));

  const auto good = dial(*router, keys_for(friend_));
  ASSERT_TRUE(good->send("friend"));
  const auto frame = receive(*router, kDeadline);
  ASSERT_TRUE(frame);
  EXPECT_EQ(frame->body, "friend");
  EXPECT_EQ(frame->client_key, friend_.public_key);
  ASSERT_TRUE(router->send(frame->peer, "welcome"));
  EXPECT_EQ(good->receive(kDeadline), "welcome");
  EXPECT_FALSE(receive(*router, kShort));
}

TEST_F(CurveTest, RefusesPlainPasswords) {
  const auto router = bind({.server_keys = server_, .allowed_clients = {friend_.public_key}});
  zmq::context_t context;
  zmq::socket_t dealer(context, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, 0);
  dealer.set(zmq::sockopt::plain_username, "admin");
  dealer.set(zmq::sockopt::plain_password, "admin");
  dealer.connect(router->endpoint());
  dealer.send(zmq::str_buffer("let me in"));
  EXPECT_FALSE(receive(*router, kShort));
}

TEST_F(CurveTest, OneContextHoldsSocketsWithAndWithoutKeys) {
  const auto closed = bind({.server_keys = server_, .allowed_clients = {friend_.public_key}});
  const auto other = bind({.server_keys = server_, .allowed_clients = {stranger_.public_key}});
  const auto open = bind({});
  const auto plain = dial(*open);
  ASSERT_TRUE(plain->send("plain"));
  EXPECT_TRUE(receive(*open, kDeadline));
  const auto wrong_door = dial(*other, keys_for(friend_));
  ASSERT_TRUE(wrong_door->send("friend at the other door"));
  const auto right_door = dial(*closed, keys_for(friend_));
  ASSERT_TRUE(right_door->send("friend"));
  EXPECT_TRUE(receive(*closed, kDeadline));
  EXPECT_FALSE(receive(*other, kShort));
}

class KeyFileTest : public ::testing::Test {
 protected:
  KeyFileTest() {
    char name[] = "/tmp/foretoken_key_test_XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~KeyFileTest() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path folder_;
};

TEST_F(KeyFileTest, KeepsKeysPrivate) {
  const ClientKeys keys{make_key_pair().public_key, make_key_pair()};
  const auto path = folder_ / "client.key";
  ASSERT_TRUE(write_client_keys(path, keys));
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600U);
  const auto back = read_client_keys(path);
  ASSERT_TRUE(back) << back.error().message;
  EXPECT_EQ(back->server_public_key, keys.server_public_key);
  EXPECT_EQ(back->own.secret_key, keys.own.secret_key);

  ASSERT_EQ(::chmod(path.c_str(), 0640), 0);
  EXPECT_EQ(read_client_keys(path).error().code, ErrorCode::kConfig);
}

TEST_F(KeyFileTest, RefusesWhatIsNoKeyFile) {
  const auto path = folder_ / "client.key";
  EXPECT_EQ(read_client_keys(path).error().code, ErrorCode::kIo);
  for (const auto* text : {"", "nonsense", "[]", "{}", R"({"server_public_key": 3})",
                           R"({"server_public_key": "short"})"}) {
    ASSERT_TRUE(write_private_file(path, text));
    EXPECT_EQ(read_client_keys(path).error().code, ErrorCode::kConfig) << text;
  }
  std::filesystem::create_symlink(path, folder_ / "link");
  EXPECT_FALSE(read_client_keys(folder_ / "link"));
}

TEST(Keys, AreKnownByTheirForm) {
  const auto keys = make_key_pair();
  EXPECT_TRUE(is_curve_key(keys.public_key));
  EXPECT_TRUE(is_curve_key(keys.secret_key));
  EXPECT_NE(keys.public_key, make_key_pair().public_key);
  EXPECT_FALSE(is_curve_key(""));
  EXPECT_FALSE(is_curve_key(std::string(40, ' ')));
  EXPECT_FALSE(is_curve_key(keys.public_key + "0"));
}

}  // namespace
}  // namespace foretoken
