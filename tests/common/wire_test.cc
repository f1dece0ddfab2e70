#include "common/wire.h"

#include <gtest/gtest.h>

#include <limits>
#include <msgpack.hpp>
#include <random>

#include "common/internal/wire_fields.h"

namespace foretoken {
namespace {

using internal::kTypeName;
using internal::visit_fields;

// ---- messages with every field filled, and their comparison field by field ---------------------

template <typename T>
void fill(T& value, int& counter);

template <typename T>
void fill_one(std::optional<T>& value, int& counter) {
  fill(value.emplace(), counter);
}
template <typename T>
void fill_one(std::vector<T>& values, int& counter) {
  for (int i = 0; i < 3; ++i) fill(values.emplace_back(), counter);
}
void fill_one(std::string& value, int& counter) {
  value = "text " + std::to_string(++counter) + " \xc3\xa9";
}
void fill_one(PrefixKey& key, int& counter) {
  for (auto& byte : key.bytes) byte = static_cast<std::uint8_t>(++counter);
}
void fill_one(ErrorCode& code, int&) { code = ErrorCode::kExhausted; }
void fill_one(bool& value, int&) { value = !value; }
template <typename T>
void fill_one(T& value, int& counter) {
  if constexpr (std::is_enum_v<T>) {
    value = T{static_cast<std::underlying_type_t<T>>(++counter)};
  } else if constexpr (std::is_unsigned_v<T>) {
    value = static_cast<T>(++counter);
  } else if constexpr (std::is_arithmetic_v<T>) {
    value = static_cast<T>(-1.25 * ++counter);
  } else {
    visit_fields([&](std::string_view, auto& field) { fill(field, counter); }, value);
  }
}
template <typename T>
void fill(T& value, int& counter) {
  fill_one(value, counter);
}

template <typename T>
T filled() {
  T message;
  int counter = 0;
  fill(message, counter);
  return message;
}

template <typename T, typename Variant>
class WireRoundTrip {
 public:
  static Result<Variant> decode(const std::string& frame) {
    if constexpr (std::is_same_v<Variant, ClientRequest>) return decode_client_request(frame);
    if constexpr (std::is_same_v<Variant, ServerMessage>) return decode_server_message(frame);
    if constexpr (std::is_same_v<Variant, WorkerMessage>) return decode_worker_message(frame);
    if constexpr (std::is_same_v<Variant, CoordinatorMessage>) {
      return decode_coordinator_message(frame);
    }
  }

  // Two messages are equal when their frames are: the writer is checked on its own below.
  static void check(const T& message) {
    SCOPED_TRACE(kTypeName<T>);
    const auto frame = encode(Variant(message));
    const auto back = decode(frame);
    ASSERT_TRUE(back) << back.error().message;
    ASSERT_TRUE(std::holds_alternative<T>(*back));
    EXPECT_EQ(encode(*back), frame);

    // No part of a frame is a frame.
    for (std::size_t size = 0; size < frame.size(); ++size) {
      const auto cut = decode(frame.substr(0, size));
      ASSERT_FALSE(cut) << "cut to " << size << " of " << frame.size();
      ASSERT_EQ(cut.error().code, ErrorCode::kCorrupt);
    }
    EXPECT_FALSE(decode(frame + '\0'));
  }
};

template <typename Variant, std::size_t... kIndex>
void check_all(std::index_sequence<kIndex...>) {
  (WireRoundTrip<std::variant_alternative_t<kIndex, Variant>, Variant>::check(
       filled<std::variant_alternative_t<kIndex, Variant>>()),
   ...);
  (WireRoundTrip<std::variant_alternative_t<kIndex, Variant>, Variant>::check({}), ...);
}
template <typename Variant>
void check_all() {
  check_all<Variant>(std::make_index_sequence<std::variant_size_v<Variant>>());
}

TEST(Wire, EveryMessageComesBackAndNoPartOfItDoes) {
  check_all<ClientRequest>();
  check_all<ServerMessage>();
  check_all<WorkerMessage>();
  check_all<CoordinatorMessage>();
}

TEST(Wire, FieldsComeBackWithTheirValues) {
  GenerateRequest request;
  request.request_id = "r1";
  request.prompt_ids = {{1, -2, 70000, std::numeric_limits<TokenId>::max()}};
  request.sampling.seed = std::numeric_limits<std::uint64_t>::max();
  request.sampling.temperature = 0.7F;
  request.stop = {"\n\n", ""};
  const auto back = decode_client_request(encode(ClientRequest(request)));
  ASSERT_TRUE(back);
  const auto& got = std::get<GenerateRequest>(*back);
  EXPECT_EQ(got.prompt_ids, request.prompt_ids);
  EXPECT_EQ(got.prompt, std::nullopt);
  EXPECT_EQ(got.sampling, request.sampling);
  EXPECT_EQ(got.stop, request.stop);

  StepResult result;
  result.admits.push_back({SequenceId{7}, 256, Error{ErrorCode::kExhausted, "no slabs"}});
  const auto worker = decode_worker_message(encode(WorkerMessage(result)));
  ASSERT_TRUE(worker);
  const auto& admit = std::get<StepResult>(*worker).admits.at(0);
  EXPECT_EQ(admit.sequence, SequenceId{7});
  EXPECT_EQ(admit.error->code, ErrorCode::kExhausted);
  EXPECT_EQ(admit.error->message, "no slabs");
}

// The frame is plain msgpack: the library's own reader agrees.
TEST(Wire, FramesAreMsgpackMaps) {
  const auto frame = encode(ClientRequest(CancelRequest{"r9"}));
  const auto handle = msgpack::unpack(frame.data(), frame.size());
  const auto map = handle.get().as<std::map<std::string, msgpack::object>>();
  EXPECT_EQ(map.at("v").as<int>(), kWireVersion);
  EXPECT_EQ(map.at("type").as<std::string>(), "cancel");
  EXPECT_EQ(map.at("request_id").as<std::string>(), "r9");
}

// ---- hostile frames --------------------------------------------------------------------------

class Frame {
 public:
  explicit Frame(std::uint32_t entries) : out_(bytes_) { out_.pack_map(entries + 2); }
  Frame& head(std::string_view type) { return add("v", kWireVersion).add("type", type); }
  template <typename T>
  Frame& add(std::string_view key, const T& value) {
    out_.pack(key);
    out_.pack(value);
    return *this;
  }
  Frame& add_raw(std::string_view key, std::string_view raw) {
    out_.pack(key);
    bytes_.write(raw.data(), raw.size());
    return *this;
  }
  std::string bytes() const { return bytes_.str(); }

 private:
  std::stringstream bytes_;
  msgpack::packer<std::stringstream> out_;
};

std::string why(const std::string& frame) {
  const auto result = decode_client_request(frame);
  return result ? "accepted" : result.error().message;
}

TEST(Wire, NamesWhatIsWrong) {
  const auto generate = [](auto add) {
    Frame frame(1);
    frame.head("generate");
    add(frame);
    return why(frame.bytes());
  };
  EXPECT_NE(generate([](Frame& f) {
              f.add("max_tokens", "ten");
            }).find("max_tokens: expected an integer, got a string"),
            std::string::npos);
  EXPECT_NE(generate([](Frame& f) {
              f.add("max_tokens", std::int64_t{1} << 40);
            }).find("max_tokens: must be in"),
            std::string::npos);
  EXPECT_NE(generate([](Frame& f) { f.add("prompt", 3.5); }).find("prompt: expected a string"),
            std::string::npos);
  EXPECT_NE(generate([](Frame& f) {
              f.add("prompt_ids", std::vector<double>{1.5});
            }).find("prompt_ids: expected an integer"),
            std::string::npos);
  EXPECT_NE(generate([](Frame& f) {
              f.add("stop", std::vector<std::string>(1025));
            }).find("stop: more than 1024"),
            std::string::npos);
  EXPECT_NE(generate([](Frame& f) { f.add("stream", 1); }).find("stream: expected a boolean"),
            std::string::npos);
  EXPECT_NE(why(Frame(0).head("generete").bytes()).find("no such message"), std::string::npos);
  EXPECT_NE(why(Frame(0).add("v", 99).add("type", "status").bytes()).find("version 99"),
            std::string::npos);
  EXPECT_NE(why("").find("the frame ends"), std::string::npos);
}

TEST(Wire, UnknownFieldsOfANewerPeerAreSkipped) {
  const std::map<std::string, std::vector<int>> nested = {{"a", {1, 2}}, {"b", {}}};
  EXPECT_EQ(why(Frame(2).head("status").add("new", nested).add("newer", 1.5).bytes()), "accepted");
  EXPECT_EQ(why(Frame(1).add("new", nested).head("status").bytes()), "accepted");
}

TEST(Wire, RefusesExtensionTypesEverywhere) {
  for (const std::string& ext :
       {std::string("\xd4\x01\x00", 3), std::string("\xc7\x01\x05\x00", 4),
        std::string("\xc8\x00\x01\x05\x00", 5), std::string("\xc9\x00\x00\x00\x01\x05\x00", 7),
        std::string("\xd8\x01" + std::string(16, 'x')), std::string("\xc1")}) {
    EXPECT_NE(why(Frame(1).head("generate").add_raw("prompt", ext).bytes()).find("extension type"),
              std::string::npos);
    EXPECT_NE(why(Frame(1).head("generate").add_raw("junk", ext).bytes()).find("extension type"),
              std::string::npos);
    EXPECT_NE(why(ext).find("extension type"), std::string::npos);
  }
}

TEST(Wire, RefusesDepthAndCountBombs) {
  const auto deep = std::string(100000, '\x91') + '\x01';
  EXPECT_NE(why(Frame(1).head("generate").add_raw("junk", deep).bytes()).find("nested deeper"),
            std::string::npos);
  EXPECT_NE(why(deep).find("expected a map"), std::string::npos);
  const std::string four_billion("\xdd\xff\xff\xff\xff", 5);
  for (const auto* key : {"prompt_ids", "stop", "junk"}) {
    EXPECT_NE(why(Frame(1).head("generate").add_raw(key, four_billion).bytes()), "accepted");
  }
  EXPECT_NE(why(std::string("\xdf\xff\xff\xff\xff", 5)).find("more entries"), std::string::npos);
  EXPECT_NE(why(std::string(kMaxFrameBytes + 1, '\xc0')).find("at most"), std::string::npos);
}

TEST(Wire, SurvivesRandomDamage) {
  constexpr unsigned kSeed = 20261122;
  std::mt19937 random(kSeed);
  SCOPED_TRACE(kSeed);
  const std::string frames[] = {encode(ClientRequest(filled<GenerateRequest>())),
                                encode(ServerMessage(filled<DoneMessage>())),
                                encode(WorkerMessage(filled<StepResult>())),
                                encode(CoordinatorMessage(filled<StepPlan>()))};
  int accepted = 0;
  for (int i = 0; i < 40000; ++i) {
    auto frame = frames[i % 4];
    const auto flips = 1 + random() % 4;
    for (unsigned f = 0; f < flips; ++f)
      frame[random() % frame.size()] = static_cast<char>(random());
    accepted += decode_client_request(frame).has_value();
    accepted += decode_server_message(frame).has_value();
    accepted += decode_worker_message(frame).has_value();
    accepted += decode_coordinator_message(frame).has_value();
  }
  EXPECT_GT(accepted, 0);  // damage inside a number or a string shows nowhere
}

}  // namespace
}  // namespace foretoken
