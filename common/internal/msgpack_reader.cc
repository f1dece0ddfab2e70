#include "common/internal/msgpack_reader.h"

#include <bit>
#include <limits>

namespace foretoken::internal {

// One value's head, after https://github.com/msgpack/msgpack/blob/master/spec.md.
struct MsgpackReader::Header {
  enum class Type { kNil, kBoolean, kUnsigned, kSigned, kFloat, kText, kBinary, kArray, kMap };
  Type type = Type::kNil;
  std::uint64_t number = 0;  // the value's bits, or the count of bytes, elements or entries
  double real = 0;           // of kFloat

  std::string_view name() const {
    constexpr std::string_view kNames[] = {"nil",        "a boolean", "an integer",
                                           "an integer", "a float",   "a string",
                                           "bytes",      "an array",  "a map"};
    return kNames[static_cast<int>(type)];
  }
};

void MsgpackReader::fail(std::string_view what, std::string_view why) {
  if (failed_) return;
  failed_ = true;
  error_ = std::string(what) + ": " + std::string(why);
}

bool MsgpackReader::wrong_type(std::string_view what, std::string_view expected,
                               const Header& got) {
  fail(what, "expected " + std::string(expected) + ", got " + std::string(got.name()));
  return false;
}

std::optional<std::string_view> MsgpackReader::bytes(std::size_t count, std::string_view what) {
  if (failed_) return std::nullopt;
  if (count > bytes_.size() - position_) {
    fail(what, "the frame ends inside it");
    return std::nullopt;
  }
  const auto view = bytes_.substr(position_, count);
  position_ += count;
  return view;
}

std::optional<std::uint64_t> MsgpackReader::big_endian(std::size_t count, std::string_view what) {
  const auto view = bytes(count, what);
  if (!view) return std::nullopt;
  std::uint64_t value = 0;
  for (const char c : *view) value = value << 8 | static_cast<unsigned char>(c);
  return value;
}

std::optional<MsgpackReader::Header> MsgpackReader::header(std::string_view what) {
  using Type = Header::Type;
  const auto first = big_endian(1, what);
  if (!first) return std::nullopt;
  const auto byte = static_cast<std::uint8_t>(*first);

  const auto sized = [&](Type type, std::size_t count) -> std::optional<Header> {
    const auto value = big_endian(count, what);
    if (!value) return std::nullopt;
    return Header{type, *value};
  };
  const auto sign_extended = [&](std::size_t count) -> std::optional<Header> {
    auto head = sized(Type::kSigned, count);
    const auto shift = static_cast<int>(64 - 8 * count);
    if (head) {
      head->number =
          static_cast<std::uint64_t>(static_cast<std::int64_t>(head->number << shift) >> shift);
    }
    return head;
  };

  if (byte < 0x80) return Header{Type::kUnsigned, byte};
  if (byte < 0x90) return Header{Type::kMap, byte & 0x0FU};
  if (byte < 0xA0) return Header{Type::kArray, byte & 0x0FU};
  if (byte < 0xC0) return Header{Type::kText, byte & 0x1FU};
  if (byte >= 0xE0) {
    return Header{Type::kSigned, static_cast<std::uint64_t>(static_cast<std::int8_t>(byte))};
  }
  switch (byte) {
    case 0xC0:
      return Header{Type::kNil};
    case 0xC2:
    case 0xC3:
      return Header{Type::kBoolean, byte & 1U};
    case 0xC4:
    case 0xC5:
    case 0xC6:
      return sized(Type::kBinary, std::size_t{1} << (byte - 0xC4));
    case 0xCA: {
      auto head = sized(Type::kFloat, 4);
      if (head) head->real = std::bit_cast<float>(static_cast<std::uint32_t>(head->number));
      return head;
    }
    case 0xCB: {
      auto head = sized(Type::kFloat, 8);
      if (head) head->real = std::bit_cast<double>(head->number);
      return head;
    }
    case 0xCC:
    case 0xCD:
    case 0xCE:
    case 0xCF:
      return sized(Type::kUnsigned, std::size_t{1} << (byte - 0xCC));
    case 0xD0:
    case 0xD1:
    case 0xD2:
    case 0xD3:
      return sign_extended(std::size_t{1} << (byte - 0xD0));
    case 0xD9:
    case 0xDA:
    case 0xDB:
      return sized(Type::kText, std::size_t{1} << (byte - 0xD9));
    case 0xDC:
    case 0xDD:
      return sized(Type::kArray, std::size_t{2} << (byte - 0xDC));
    case 0xDE:
    case 0xDF:
      return sized(Type::kMap, std::size_t{2} << (byte - 0xDE));
    default:
      fail(what, "an extension type, which no message has");
      return std::nullopt;
  }
}

std::optional<std::size_t> MsgpackReader::map(std::string_view what) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  if (head->type != Header::Type::kMap) {
    wrong_type(what, "a map", *head);
    return std::nullopt;
  }
  if (head->number > (bytes_.size() - position_) / 2) {
    fail(what, "more entries than the frame has bytes for");
    return std::nullopt;
  }
  return head->number;
}

std::optional<std::size_t> MsgpackReader::array(std::string_view what) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  if (head->type != Header::Type::kArray) {
    wrong_type(what, "an array", *head);
    return std::nullopt;
  }
  if (head->number > bytes_.size() - position_) {
    fail(what, "more elements than the frame has bytes for");
    return std::nullopt;
  }
  if (head->number > most_elements_) {
    has_too_many_ = !failed_;
    fail(what, std::to_string(head->number) + " elements, at most " +
                   std::to_string(most_elements_) + " are read");
    return std::nullopt;
  }
  return head->number;
}

std::optional<std::string_view> MsgpackReader::text(std::string_view what) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  if (head->type != Header::Type::kText) {
    wrong_type(what, "a string", *head);
    return std::nullopt;
  }
  return bytes(head->number, what);
}

std::optional<std::string_view> MsgpackReader::binary(std::string_view what) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  if (head->type != Header::Type::kBinary) {
    wrong_type(what, "bytes", *head);
    return std::nullopt;
  }
  return bytes(head->number, what);
}

std::optional<bool> MsgpackReader::boolean(std::string_view what) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  if (head->type != Header::Type::kBoolean) {
    wrong_type(what, "a boolean", *head);
    return std::nullopt;
  }
  return head->number != 0;
}

std::optional<double> MsgpackReader::number(std::string_view what) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  switch (head->type) {
    case Header::Type::kFloat:
      return head->real;
    case Header::Type::kUnsigned:
      return static_cast<double>(head->number);
    case Header::Type::kSigned:
      return static_cast<double>(static_cast<std::int64_t>(head->number));
    default:
      wrong_type(what, "a number", *head);
      return std::nullopt;
  }
}

std::optional<std::int64_t> MsgpackReader::integer(std::string_view what, std::int64_t least,
                                                   std::int64_t most) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  const bool is_unsigned = head->type == Header::Type::kUnsigned;
  if (!is_unsigned && head->type != Header::Type::kSigned) {
    wrong_type(what, "an integer", *head);
    return std::nullopt;
  }
  const auto value = static_cast<std::int64_t>(head->number);
  if ((is_unsigned && value < 0) || value < least || value > most) {
    fail(what, "must be in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
    return std::nullopt;
  }
  return value;
}

std::optional<std::uint64_t> MsgpackReader::unsigned_integer(std::string_view what,
                                                             std::uint64_t most) {
  const auto head = header(what);
  if (!head) return std::nullopt;
  const bool is_signed = head->type == Header::Type::kSigned;
  if (!is_signed && head->type != Header::Type::kUnsigned) {
    wrong_type(what, "an integer", *head);
    return std::nullopt;
  }
  if ((is_signed && static_cast<std::int64_t>(head->number) < 0) || head->number > most) {
    fail(what, "must be in [0, " + std::to_string(most) + "]");
    return std::nullopt;
  }
  return head->number;
}

bool MsgpackReader::nil() {
  if (failed_ || at_end() || static_cast<std::uint8_t>(bytes_[position_]) != 0xC0) return false;
  ++position_;
  return true;
}

bool MsgpackReader::skip(std::string_view what) {
  std::uint64_t left[kMaxDepth + 1] = {1};  // values still to come, at each depth
  int depth = 0;
  while (depth >= 0) {
    if (left[depth] == 0) {
      --depth;
      continue;
    }
    --left[depth];
    const auto head = header(what);
    if (!head) return false;
    const auto type = head->type;
    if (type == Header::Type::kText || type == Header::Type::kBinary) {
      if (!bytes(head->number, what)) return false;
    } else if (type == Header::Type::kArray || type == Header::Type::kMap) {
      if (++depth > kMaxDepth) {
        fail(what, "nested deeper than " + std::to_string(kMaxDepth));
        return false;
      }
      left[depth] = type == Header::Type::kMap ? head->number * 2 : head->number;
    }
  }
  return true;
}

}  // namespace foretoken::internal
