#include "kvstore/internal/protocol.h"

#include <gtest/gtest.h>

#include <msgpack.hpp>
#include <numeric>
#include <random>

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261122;

PrefixKey some_key(std::uint8_t first) {
  PrefixKey key;
  std::iota(key.bytes.begin(), key.bytes.end(), first);
  return key;
}
Hello some_hello() {
  Hello hello;
  hello.owner = {3, 7, Epoch{4'000'000'000U}, 2, 5};
  hello.model = {"3fa9", 8, 32, 128, kernels::DataType::kBf16};
  return hello;
}

template <typename Message>
Message request_there_and_back(const Message& message) {
  auto decoded = decode_request(encode(Request{message}));
  EXPECT_TRUE(decoded) << decoded.error().message;
  return std::get<Message>(*decoded);
}
template <typename Message>
Message reply_there_and_back(const Message& message) {
  auto decoded = decode_reply(encode(Reply{message}));
  EXPECT_TRUE(decoded) << decoded.error().message;
  return std::get<Message>(*decoded);
}

TEST(StoreProtocol, CarriesEveryRequest) {
  const Hello hello = request_there_and_back(some_hello());
  EXPECT_EQ(hello.version, kProtocolVersion);
  EXPECT_EQ(hello.owner.group, 3);
  EXPECT_EQ(hello.owner.rank, 7);
  EXPECT_EQ(hello.owner.epoch, Epoch{4'000'000'000U});
  EXPECT_EQ(hello.owner.first_head, 2);
  EXPECT_EQ(hello.owner.num_heads, 5);
  EXPECT_EQ(hello.model, some_hello().model);

  const SequenceId sequence{0xFFFF'FFFF'FFFF'FFFFULL};
  const Reserve reserve = request_there_and_back(Reserve{sequence, 9, {some_key(1), some_key(2)}});
  EXPECT_EQ(reserve.sequence, sequence);
  EXPECT_EQ(reserve.num_segments, 9);
  EXPECT_EQ(reserve.keys, (std::vector<PrefixKey>{some_key(1), some_key(2)}));
  EXPECT_EQ(request_there_and_back(Use{sequence, 4}).hit_segments, 4);
  const Commit commit = request_there_and_back(Commit{sequence, 5, some_key(9)});
  EXPECT_EQ(commit.segment, 5);
  EXPECT_EQ(commit.key, some_key(9));
  EXPECT_EQ(request_there_and_back(Release{sequence}).sequence, sequence);
  EXPECT_EQ(request_there_and_back(Distrust{sequence}).sequence, sequence);
  const std::vector<Seal> seals{{{1, 2}, {3}}, {{4}, {5, 6}}};
  const Publish publish = request_there_and_back(Publish{sequence, 5, some_key(9), {3, 4}, seals});
  EXPECT_EQ(publish.seals, seals);
  EXPECT_EQ(publish.sequence, sequence);
  EXPECT_EQ(publish.segment, 5);
  EXPECT_EQ(publish.key, some_key(9));
  EXPECT_EQ(publish.digests, (std::vector<std::uint64_t>{3, 4}));
  const Refute refute = request_there_and_back(Refute{sequence, 2, 5});
  EXPECT_EQ(refute.head, 2);
  EXPECT_EQ(refute.segment, 5);
  EXPECT_EQ(request_there_and_back(NvmeFaults{7, 0}).io_errors, 7);
  EXPECT_EQ(request_there_and_back(NvmeFaults{0, 8}).checksum_failures, 8);
  const PrefillTimes times = request_there_and_back(
      PrefillTimes{1, std::chrono::microseconds(2), 3, std::chrono::microseconds(4)});
  EXPECT_EQ(times.computed, 1);
  EXPECT_EQ(times.computing.count(), 2);
  EXPECT_EQ(times.read, 3);
  EXPECT_EQ(times.reading.count(), 4);
  EXPECT_EQ(request_there_and_back(FindWeights{6, "3fa9"}).model_hash, "3fa9");
  const KeepWeights keep = request_there_and_back(KeepWeights{7, "3fa9", 16'060'522'496});
  EXPECT_EQ(keep.version, 7);
  EXPECT_EQ(keep.model_hash, "3fa9");
  EXPECT_EQ(keep.bytes, 16'060'522'496U);
  request_there_and_back(WeightsFilled{});
  request_there_and_back(StatRequest{});
  request_there_and_back(FindKey{});
  request_there_and_back(Goodbye{});
}

TEST(StoreProtocol, CarriesEveryReply) {
  const Error error = reply_there_and_back(Error{ErrorCode::kExhausted, "no room"});
  EXPECT_EQ(error.code, ErrorCode::kExhausted);
  EXPECT_EQ(error.message, "no room");
  const Welcome welcome = reply_there_and_back(Welcome{std::uint64_t{1} << 40, 12, true});
  EXPECT_EQ(welcome.slab_bytes, std::uint64_t{1} << 40);
  EXPECT_EQ(welcome.slabs_per_head, 12U);
  EXPECT_TRUE(welcome.encrypts_nvme);
  EXPECT_EQ(reply_there_and_back(FileKey{CipherKind::kXChaCha20Poly1305}).cipher,
            CipherKind::kXChaCha20Poly1305);
  EXPECT_FALSE(decode_reply(encode(Reply{FileKey{CipherKind{3}}})));
  const Grant grant = reply_there_and_back(Grant{{1, 2}, {SlabIndex{7}, SlabIndex{4'000'000'000}}});
  EXPECT_EQ(grant.head_hits, (std::vector<int>{1, 2}));
  EXPECT_EQ(grant.slabs, (std::vector<SlabIndex>{SlabIndex{7}, SlabIndex{4'000'000'000}}));
  const StoreStat stat = reply_there_and_back(
      StoreStat{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
                NvmeStat{NvmeState::kReadOnly, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}});
  EXPECT_EQ(stat.nvme, (NvmeStat{NvmeState::kReadOnly, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
  EXPECT_EQ(stat.slabs_total, 1);
  EXPECT_EQ(stat.evictions, 8);
  EXPECT_EQ(stat.bad_requests, 11);
  EXPECT_EQ(reply_there_and_back(WeightMemory{16'060'522'496}).bytes, 16'060'522'496U);
}

TEST(StoreProtocol, TheLargestMessagesFit) {
  Reserve reserve{SequenceId{1}, kMaxSegments, {}};
  reserve.keys.resize(kMaxSegments);
  EXPECT_LE(encode(Request{reserve}).size(), kMaxMessageBytes);
  EXPECT_EQ(request_there_and_back(reserve).keys.size(), static_cast<std::size_t>(kMaxSegments));
  Grant grant;
  grant.head_hits.resize(kMaxHeads);
  grant.slabs.resize(kMaxGrantSlabs);
  EXPECT_LE(encode(Reply{grant}).size(), kMaxMessageBytes);
  reply_there_and_back(grant);
}

std::string expect_refused(const std::string& bytes) {
  const auto decoded = decode_request(bytes);
  EXPECT_FALSE(decoded);
  if (decoded) return {};
  EXPECT_EQ(decoded.error().code, ErrorCode::kCorrupt);
  return decoded.error().message;
}

template <typename Pack>
std::string packed(const Pack& pack) {
  msgpack::sbuffer buffer;
  msgpack::packer<msgpack::sbuffer> packer(buffer);
  pack(packer);
  return {buffer.data(), buffer.size()};
}

TEST(StoreProtocol, RefusesWhatItIsNotMadeOf) {
  EXPECT_NE(expect_refused("").find("message"), std::string::npos);
  expect_refused("hello");
  expect_refused(std::string(kMaxMessageBytes + 1, '\0'));
  EXPECT_NE(expect_refused(packed([](auto& p) { p.pack_array(1).pack(99); })).find("kind"),
            std::string::npos);
  EXPECT_NE(expect_refused(packed([](auto& p) { p.pack_map(0); })).find("no array"),
            std::string::npos);
  const auto release = [](auto&& id) {
    return packed([&](auto& p) { p.pack_array(2).pack(5).pack(id); });
  };
  EXPECT_TRUE(decode_request(release(1U)));
  EXPECT_NE(expect_refused(release(-1)).find("sequence"), std::string::npos);
  expect_refused(release(1.5));
  expect_refused(release("1"));
  EXPECT_NE(expect_refused(packed([](auto& p) { p.pack_array(1).pack(5); })).find("missing"),
            std::string::npos);
  EXPECT_NE(expect_refused(packed([](auto& p) {
              p.pack_array(3).pack(5).pack(1).pack(1);
            })).find("more fields"),
            std::string::npos);
  EXPECT_NE(expect_refused(release(1U) + "x").find("after its end"), std::string::npos);
  expect_refused(
      packed([](auto& p) { p.pack_array(2).pack(5).pack_ext(1, 3).pack_ext_body("abc", 1); }));
  // Use with a nested array, a Commit with half a key, a Reserve with more keys than there may be.
  expect_refused(packed([](auto& p) { p.pack_array(3).pack(3).pack(1).pack_array(0); }));
  expect_refused(packed([](auto& p) {
    p.pack_array(4).pack(4).pack(1).pack(0).pack_bin(16).pack_bin_body("0123456789abcdef", 16);
  }));
  expect_refused(packed([](auto& p) { p.pack_array(4).pack(4).pack(1).pack(0).pack_bin(0); }));
}

TEST(StoreProtocol, TruncatedAndFlippedMessagesNeverThrow) {
  std::mt19937 random(kSeed);
  const std::string messages[] = {encode(Request{some_hello()}),
                                  encode(Request{Reserve{SequenceId{5}, 3, {some_key(1)}}}),
                                  encode(Request{Commit{SequenceId{5}, 3, some_key(1)}})};
  for (const std::string& message : messages) {
    for (std::size_t size = 0; size < message.size(); ++size) {
      expect_refused(message.substr(0, size));
    }
    for (int i = 0; i < 5'000; ++i) {
      std::string changed = message;
      changed[random() % changed.size()] = static_cast<char>(random());
      (void)decode_request(changed).has_value();
      (void)decode_reply(changed).has_value();
    }
  }
}

}  // namespace
}  // namespace foretoken::kvstore
