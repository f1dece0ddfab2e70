// The store as its peers meet it: leases of dead, stopped and replaced ranks, and peers that lie.
#include "kvstore/internal/server.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "tests/kvstore/running_server.h"

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261122;
constexpr std::size_t kArenaBytes = 32 << 20;

// A program that has said something, until it is killed.
class Holder {
 public:
  Holder(const std::string& socket, int rank, int epoch)
      : Holder({LEASE_HOLDER, socket, std::to_string(rank), std::to_string(epoch)}) {}
  explicit Holder(std::vector<std::string> words) {
    int pipe_ends[2] = {};
    if (pipe2(pipe_ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
    const FileDescriptor in(pipe_ends[0]);
    FileDescriptor out(pipe_ends[1]);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out.get(), STDOUT_FILENO);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    if (posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) {
      throw std::runtime_error("posix_spawn");
    }
    posix_spawn_file_actions_destroy(&actions);
    out.reset();
    char said[16] = {};
    EXPECT_GT(read(in.get(), said, sizeof said), 0) << "the holder failed";
  }
  ~Holder() { kill_and_wait(); }
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;

  void stop() const { kill(pid_, SIGSTOP); }
  void kill_and_wait() {
    if (pid_ == 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  pid_t pid_ = 0;
};

class ServerTest : public testing::Test {
 protected:
  ServerTest() : server(kArenaBytes), device(kernels::make_cpu_device({1, 1 << 20})) {}

  Result<std::unique_ptr<KvStore>> connect(
      int rank, int epoch, std::chrono::milliseconds timeout = std::chrono::seconds(20)) {
    StoreClientConfig config = test_client(server.socket(), rank, epoch);
    config.timeout = timeout;
    return KvStore::connect(config, *device);
  }
  FileDescriptor raw_peer() {
    return connect_to(server.socket(), std::chrono::seconds(20)).value_or_throw();
  }
  static Hello hello(int rank) {
    const StoreClientConfig config = test_client("", rank);
    Hello hello;
    hello.owner = {0, rank, Epoch{1}, rank, 2};
    hello.model = {config.model_hash, 3, 3, 64, kernels::DataType::kFp16};
    return hello;
  }
  static Received ask(const FileDescriptor& peer, const Request& request) {
    EXPECT_TRUE(send_message(peer.get(), encode(request)));
    return receive_message(peer.get(), kMaxMessageBytes).value_or_throw();
  }
  static bool closed(const FileDescriptor& peer) {
    const auto received = receive_message(peer.get(), kMaxMessageBytes);
    return !received || received->message.empty();
  }

  RunningServer server;
  std::unique_ptr<kernels::Device> device;
};

std::size_t num_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

TEST(Seqpacket, DescriptorsThatNobodyAskedForAreClosed) {
  int pair[2] = {};
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
  const FileDescriptor from(pair[0]);
  const FileDescriptor to(pair[1]);
  const std::size_t before = num_descriptors();
  for (const std::size_t count : {1, 2, 3}) {
    const std::vector<int> passed(count, from.get());
    alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {};
    char byte = 'x';
    iovec part{&byte, 1};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(count * sizeof(int));
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(count * sizeof(int));
    std::memcpy(CMSG_DATA(rights), passed.data(), count * sizeof(int));
    ASSERT_EQ(sendmsg(from.get(), &header, 0), 1);
    {
      const auto received = receive_message(to.get(), 16);
      EXPECT_EQ(received && received->passed, count < 3) << count;  // three are too many
    }
    EXPECT_EQ(num_descriptors(), before) << count;
  }
}

TEST(Seqpacket, PeersThatNoDescriptorIsLeftForAreTurnedAway) {
  const TestFolder folder;
  Listener listener(folder.socket());
  const auto connect = [&] {
    return connect_to(folder.socket(), std::chrono::seconds(1)).value_or_throw();
  };
  const FileDescriptor first = connect();
  const FileDescriptor second = connect();
  rlimit usual{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &usual), 0);
  const rlimit few{64, usual.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  std::vector<FileDescriptor> all;
  do {
    all.emplace_back(open("/dev/null", O_RDONLY | O_CLOEXEC));
  } while (all.back());
  EXPECT_FALSE(listener.accept());
  EXPECT_EQ(listener.take_turned_away(), 2);
  all.clear();
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &usual), 0);
  for (const FileDescriptor* peer : {&first, &second}) {
    const auto received = receive_message(peer->get(), 16);
    EXPECT_TRUE(received && received->message.empty());
  }
  const FileDescriptor third = connect();
  EXPECT_TRUE(listener.accept());
}

TEST_F(ServerTest, AKilledRanksMemoryComesBack) {
  const auto watcher = connect(1, 1).value_or_throw();
  ASSERT_TRUE(ready(*watcher));
  Holder holder(server.socket(), 0, 1);
  EXPECT_EQ(watcher->stat()->sequences, 3);
  EXPECT_EQ(watcher->stat()->slabs_used, 6);
  holder.kill_and_wait();
  EXPECT_TRUE(eventually(*watcher, [](const StoreStat& stat) {
    return stat.leases == 1 && stat.sequences == 0 && stat.slabs_used == 0;
  }));
}

// A stopped rank may wake up and write: its slabs are nobody else's until it is dead.
TEST_F(ServerTest, ANewEpochWaitsForTheOldOnesExit) {
  Holder holder(server.socket(), 0, 1);
  holder.stop();
  const auto early = connect(0, 2, std::chrono::milliseconds(200));
  ASSERT_FALSE(early);
  EXPECT_EQ(early.error().code, ErrorCode::kTimeout);
  holder.kill_and_wait();
  const auto late = connect(0, 2);
  ASSERT_TRUE(late) << late.error().message;
  EXPECT_EQ((*late)->stat()->slabs_used, 0);
}

TEST_F(ServerTest, AClosedSocketIsNoExit) {
  const auto watcher = connect(1, 1).value_or_throw();
  ASSERT_TRUE(ready(*watcher));
  {
    const FileDescriptor peer = raw_peer();
    ASSERT_TRUE(decode_reply(ask(peer, hello(0)).message));
    ASSERT_TRUE(std::holds_alternative<Grant>(
        *decode_reply(ask(peer, Reserve{SequenceId{1}, 2, {}}).message)));
  }  // closed; this process lives on and could still write
  for (int i = 0; i < 20; ++i) EXPECT_EQ(watcher->stat()->slabs_used, 2);
  EXPECT_EQ(watcher->stat()->leases, 2);
}

TEST_F(ServerTest, TheArenaIsSealed) {
  const FileDescriptor peer = raw_peer();
  const Received welcome = ask(peer, hello(0));
  ASSERT_TRUE(welcome.passed);
  const int seals = fcntl(welcome.passed.get(), F_GET_SEALS);
  EXPECT_EQ(seals, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(ftruncate(welcome.passed.get(), 0), 0);
  EXPECT_EQ(errno, EPERM);
}

TEST_F(ServerTest, TheSocketIsPrivate) {
  struct stat info {};
  ASSERT_EQ(stat(server.socket().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777U, 0600U);
  const std::string open_folder = testing::TempDir() + "/store-open-folder";
  mkdir(open_folder.c_str(), 0755);
  EXPECT_THROW(Listener(open_folder + "/store"), Exception);
  rmdir(open_folder.c_str());
}

TEST_F(ServerTest, AFileThatIsNoSocketStays) {
  const std::string path = server.socket() + ".key";
  std::ofstream(path) << "a key";
  try {
    const Listener wrong(path);
    FAIL() << "listens in place of a file";
  } catch (const Exception& refused) {
    EXPECT_EQ(refused.error().code, ErrorCode::kConfig);
  }
  EXPECT_TRUE(std::filesystem::exists(path));
}

TEST_F(ServerTest, OneStoreAPath) {
  try {
    const Listener second(server.socket());
    FAIL() << "two stores on one path";
  } catch (const Exception& refused) {
    EXPECT_EQ(refused.error().code, ErrorCode::kPortInUse);
  }
  EXPECT_TRUE(connect(0, 1)) << "the first one still serves";
}

// A rank of the next life may meet either.
TEST(RestartTest, AStoreTakesThePlaceOfOneThatIsEnding) {
  const TestFolder folder;
  const Holder ending({ENDING_STORE, folder.socket()});
  const FileDescriptor stop(eventfd(0, EFD_CLOEXEC));
  std::thread next([&] {
    Server server({folder.socket(), kArenaBytes});
    server.run(stop.get());
  });
  const auto device = kernels::make_cpu_device({1, 1 << 20});
  StoreClientConfig config = test_client(folder.socket(), 0);
  config.patience = std::chrono::seconds(20);
  EXPECT_TRUE(KvStore::connect(config, *device));
  eventfd_write(stop.get(), 1);
  next.join();
}

TEST_F(ServerTest, APeerThatTalksNonsenseIsDroppedAlone) {
  const auto good = connect(1, 1).value_or_throw();
  const FileDescriptor peer = raw_peer();
  ASSERT_TRUE(send_message(peer.get(), "nonsense"));
  EXPECT_TRUE(closed(peer));
  const FileDescriptor hasty = raw_peer();
  const auto refused = decode_reply(ask(hasty, Release{SequenceId{1}}).message);
  ASSERT_TRUE(refused);
  EXPECT_EQ(std::get<Error>(*refused).code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(closed(hasty));
  const FileDescriptor twice = raw_peer();
  ask(twice, hello(0));
  EXPECT_TRUE(std::holds_alternative<Error>(*decode_reply(ask(twice, hello(0)).message)));
  EXPECT_TRUE(closed(twice));
  EXPECT_EQ(good->stat()->bad_requests, 3);
}

TEST_F(ServerTest, SpeaksOneVersion) {
  Hello future = hello(0);
  future.version = kProtocolVersion + 1;
  const auto refused = decode_reply(ask(raw_peer(), future).message);
  ASSERT_TRUE(refused);
  EXPECT_EQ(std::get<Error>(*refused).code, ErrorCode::kInvalidArgument);
}

TEST_F(ServerTest, StandsHostileFrames) {
  const auto good = connect(1, 1).value_or_throw();
  ASSERT_TRUE(ready(*good));
  std::mt19937 random(kSeed);
  const std::string real = encode(Request{Reserve{SequenceId{1}, 3, {PrefixKey{}}}});
  for (int i = 0; i < 2'000; ++i) {
    std::string frame = real;
    for (unsigned flips = random() % 8; flips > 0; --flips) {
      frame[random() % frame.size()] = static_cast<char>(random());
    }
    if (random() % 2 == 0) frame.resize(1 + random() % frame.size());
    const FileDescriptor peer = raw_peer();
    ASSERT_TRUE(send_message(peer.get(), frame));
    while (!closed(peer)) {
    }
  }
  EXPECT_EQ(good->stat()->bad_requests, 2'000);
  EXPECT_TRUE(good->reserve(SequenceId{1}, {}, 1));
}

}  // namespace
}  // namespace foretoken::kvstore
