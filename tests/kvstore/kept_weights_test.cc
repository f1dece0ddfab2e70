// The store's copy of the weights as ranks meet it: whole or not at all, one filler, one model.
#include "kvstore/kept_weights.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include "kvstore/internal/connection.h"
#include "kvstore/internal/host_memory.h"
#include "tests/kvstore/running_server.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kArenaBytes = 32 << 20;
const std::string kModel = "test-model";  // test_client()'s

std::vector<std::byte> some_bytes(std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 251);
  return bytes;
}

class KeptWeightsTest : public testing::Test {
 protected:
  KeptWeightsTest() : server(kArenaBytes) {}

  std::unique_ptr<KeptWeights> door(const std::string& model = kModel) {
    return KeptWeights::connect(server.socket(), model).value_or_throw();
  }
  Connection peer() {
    return Connection(connect_to(server.socket(), std::chrono::seconds(20)).value_or_throw());
  }
  // What a rank asks that fills by itself; the memory.
  static Result<FileDescriptor> begin(Connection& peer, std::uint64_t bytes,
                                      const std::string& model = kModel) {
    FileDescriptor memory;
    FT_RETURN_IF_ERROR(
        peer.ask_for<WeightMemory>(KeepWeights{kProtocolVersion, model, bytes}, &memory));
    return memory;
  }
  static ErrorCode code_of(const auto& result) {
    return result ? ErrorCode::kInternal : result.error().code;
  }
  static Status keep(KeptWeights& door, std::span<const std::byte> bytes) {
    const std::array pieces{bytes};
    return door.keep(pieces, {});
  }
  // What a dead filler held is given up when the store sees it.
  Status keep_once_free(std::span<const std::byte> bytes) {
    for (int i = 0;; ++i) {
      const Status kept = keep(*door(), bytes);
      if (kept || kept.error().code != ErrorCode::kUnavailable || i > 500) return kept;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  std::vector<std::byte> kept_bytes() {
    const auto reader = door();
    const std::filesystem::path path = reader->find().value_or_throw();
    std::vector<std::byte> bytes(std::filesystem::file_size(path));
    std::ifstream(path, std::ios::binary)
        .read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return bytes;
  }

  RunningServer server;
};

TEST_F(KeptWeightsTest, PiecesComeBackOneBehindTheOther) {
  EXPECT_EQ(code_of(door()->find()), ErrorCode::kNotFound);
  const auto bytes = some_bytes((40 << 20) + 12'345);  // cut among threads, off page borders
  const auto all = std::span<const std::byte>(bytes);
  const std::array pieces{all.first(1), all.subspan(1, 999), all.subspan(1000, 0),
                          all.subspan(1000)};
  ASSERT_TRUE(door()->keep(pieces, {}));
  EXPECT_EQ(kept_bytes(), bytes);
}

TEST_F(KeptWeightsTest, NobodySeesAHalfFilledCopy) {
  std::optional<Connection> filler = peer();
  ASSERT_TRUE(begin(*filler, 4096));
  EXPECT_EQ(code_of(door()->find()), ErrorCode::kNotFound);
  filler.reset();  // as when its process is killed
  EXPECT_EQ(code_of(door()->find()), ErrorCode::kNotFound);
  const auto bytes = some_bytes(5000);
  ASSERT_TRUE(keep_once_free(bytes));
  EXPECT_EQ(kept_bytes(), bytes);
}

TEST_F(KeptWeightsTest, AStoppedCopyIsGivenUp) {
  std::stop_source stop;
  stop.request_stop();
  const auto bytes = some_bytes(5000);
  const std::array pieces{std::span<const std::byte>(bytes)};
  EXPECT_EQ(code_of(door()->keep(pieces, stop.get_token())), ErrorCode::kCancelled);
  EXPECT_TRUE(keep_once_free(bytes));
}

// The kernel refuses the seal, so what says it is whole can't be changed by its filler any more.
TEST_F(KeptWeightsTest, ACopyThatCanStillBeWrittenIsNotWhole) {
  Connection filler = peer();
  const auto memory = begin(filler, 4096);
  ASSERT_TRUE(memory);
  void* mapped = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory->get(), 0);
  ASSERT_NE(mapped, MAP_FAILED);
  EXPECT_EQ(code_of(filler.ask(WeightsFilled{})), ErrorCode::kIo);
  munmap(mapped, 4096);
  EXPECT_EQ(code_of(door()->find()), ErrorCode::kNotFound);
  EXPECT_TRUE(begin(filler, 4096)) << "it was given up";
}

TEST_F(KeptWeightsTest, AWholeCopyIsReadOnlyAndPrivate) {
  Connection filler = peer();
  const auto memory = begin(filler, 4096);
  ASSERT_TRUE(memory);
  ASSERT_TRUE(filler.ask(WeightsFilled{}));
  EXPECT_EQ(fcntl(memory->get(), F_GET_SEALS),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
  EXPECT_LT(pwrite(memory->get(), "x", 1, 0), 0);
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory->get(), 0), MAP_FAILED);
  struct stat info {};
  ASSERT_EQ(fstat(memory->get(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777U, 0600U);
}

TEST_F(KeptWeightsTest, OneRankFills) {
  Connection first = peer();
  ASSERT_TRUE(begin(first, 4096));
  Connection second = peer();
  EXPECT_EQ(code_of(begin(second, 4096)), ErrorCode::kUnavailable);
  EXPECT_EQ(code_of(second.ask(WeightsFilled{})), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(door()->find()), ErrorCode::kNotFound);
  ASSERT_TRUE(first.ask(WeightsFilled{}));
  EXPECT_EQ(code_of(begin(second, 4096)), ErrorCode::kUnavailable) << "it is there";
  EXPECT_TRUE(door()->find());
}

TEST_F(KeptWeightsTest, AnotherModelsAreRefused) {
  const auto bytes = some_bytes(5000);
  ASSERT_TRUE(keep(*door(), bytes));
  EXPECT_EQ(code_of(door("other")->find()), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(keep(*door("other"), bytes)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(kept_bytes(), bytes);
}

TEST_F(KeptWeightsTest, TheKvsModelIsTheStores) {
  const auto device = kernels::make_cpu_device({1, 1 << 20});
  const auto store = KvStore::connect(test_client(server.socket(), 0), *device).value_or_throw();
  EXPECT_EQ(code_of(door("other")->find()), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(keep(*door("other"), some_bytes(10))), ErrorCode::kInvalidArgument);
  EXPECT_TRUE(keep(*door(), some_bytes(10)));
}

// A lease of the same connection may end while that goes on.
TEST_F(KeptWeightsTest, AFillerThatSaysGoodbyeIsForgotten) {
  Connection filler = peer();
  Hello hello;
  hello.owner = {.group = 0, .rank = 0, .epoch = Epoch{1}, .first_head = 0, .num_heads = 2};
  hello.model = {kModel, 3, 3, 64, kernels::DataType::kFp16};
  FileDescriptor arena;
  ASSERT_TRUE(filler.ask_for<Welcome>(hello, &arena));
  ASSERT_TRUE(begin(filler, 4096));
  ASSERT_TRUE(filler.tell(Goodbye{}));
  EXPECT_TRUE(keep_once_free(some_bytes(10)));
}

TEST_F(KeptWeightsTest, MemoryThatTheMachineLacksIsRefusedInWords) {
  Connection filler = peer();
  const auto refused = begin(filler, std::uint64_t{1} << 60);
  ASSERT_EQ(code_of(refused), ErrorCode::kExhausted);
  EXPECT_NE(refused.error().message.find("the weights take"), std::string::npos);
  EXPECT_TRUE(begin(filler, 4096)) << "less may fit";
}

TEST_F(KeptWeightsTest, SpeaksOneVersion) {
  EXPECT_EQ(code_of(peer().ask(FindWeights{kProtocolVersion - 1, kModel})),
            ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace foretoken::kvstore
