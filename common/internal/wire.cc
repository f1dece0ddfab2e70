#include "common/wire.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <msgpack.hpp>
#include <optional>
#include <type_traits>
#include <variant>
#include <vector>

#include "common/internal/msgpack_reader.h"
#include "common/internal/wire_fields.h"

namespace foretoken {
namespace {

using internal::kTypeName;
using internal::MsgpackReader;
using internal::visit_fields;

// A list of strings takes 32 bytes for each byte of its frame, so its length has a cap of its own.
constexpr std::size_t kMaxStrings = 1024;

// ---- writing ---------------------------------------------------------------------------------

// Appends to a string, as msgpack::packer wants it.
struct StringStream {
  std::string bytes;
  void write(const char* data, std::size_t size) { bytes.append(data, size); }
};
using Packer = msgpack::packer<StringStream>;

template <typename T>
void write(Packer& out, const T& value);

template <typename T>
std::uint32_t count_fields(const T& message) {
  std::uint32_t count = 0;
  visit_fields([&](std::string_view, const auto&) { ++count; }, message);
  return count;
}

template <typename T>
void write_fields(Packer& out, const T& message) {
  visit_fields(
      [&](std::string_view name, const auto& field) {
        out.pack(name);
        write(out, field);
      },
      message);
}

template <typename T>
void write_value(Packer& out, const std::optional<T>& value) {
  if (value) {
    write(out, *value);
  } else {
    out.pack_nil();
  }
}
template <typename T>
void write_value(Packer& out, const std::vector<T>& values) {
  out.pack_array(static_cast<std::uint32_t>(values.size()));
  for (const auto& value : values) write(out, value);
}
void write_value(Packer& out, const PrefixKey& key) {
  out.pack_bin(static_cast<std::uint32_t>(key.bytes.size()));
  out.pack_bin_body(reinterpret_cast<const char*>(key.bytes.data()),
                    static_cast<std::uint32_t>(key.bytes.size()));
}
void write_value(Packer& out, ErrorCode code) { out.pack(error_code_name(code)); }
template <typename T>
requires(!std::is_arithmetic_v<T>) void write_value(Packer& out, const T& value) {
  if constexpr (std::is_enum_v<T>) {
    out.pack(raw(value));
  } else if constexpr (std::is_same_v<T, std::string>) {
    out.pack(value);
  } else {
    out.pack_map(count_fields(value));
    write_fields(out, value);
  }
}

template <typename T>
void write(Packer& out, const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    out.pack(value);
  } else {
    write_value(out, value);
  }
}

template <typename Variant>
std::string encode_any(const Variant& variant) {
  return std::visit(
      []<typename T>(const T& message) {
        StringStream stream;
        Packer out(stream);
        out.pack_map(count_fields(message) + 2);
        out.pack(std::string_view("v"));
        out.pack(kWireVersion);
        out.pack(std::string_view("type"));
        out.pack(kTypeName<T>);
        write_fields(out, message);
        return std::move(stream.bytes);
      },
      variant);
}

// ---- reading ---------------------------------------------------------------------------------

template <typename T>
void read(MsgpackReader& in, std::string_view name, T& value);

template <typename T>
void read_map(MsgpackReader& in, std::string_view name, T& message) {
  const auto entries = in.map(name);
  for (std::size_t i = 0; entries && i < *entries && !in.failed(); ++i) {
    const auto key = in.text(name);
    if (!key) return;
    bool known = false;
    visit_fields(
        [&](std::string_view field_name, auto& field) {
          if (known || field_name != *key) return;
          known = true;
          read(in, field_name, field);
        },
        message);
    if (!known) in.skip(name);
  }
}

template <typename T>
void read_value(MsgpackReader& in, std::string_view name, std::optional<T>& value) {
  value.reset();
  if (!in.nil()) read(in, name, value.emplace());
}
template <typename T>
void read_value(MsgpackReader& in, std::string_view name, std::vector<T>& values) {
  values.clear();
  const auto count = in.array(name);
  if (!count) return;
  if (std::is_same_v<T, std::string> && *count > kMaxStrings) {
    return in.fail(name, "more than " + std::to_string(kMaxStrings) + " elements");
  }
  values.reserve(*count);
  for (std::size_t i = 0; i < *count && !in.failed(); ++i) read(in, name, values.emplace_back());
}
void read_value(MsgpackReader& in, std::string_view name, std::string& value) {
  if (const auto view = in.text(name)) value.assign(*view);
}
void read_value(MsgpackReader& in, std::string_view name, PrefixKey& key) {
  const auto view = in.binary(name);
  if (!view) return;
  if (view->size() != key.bytes.size()) return in.fail(name, "expected 32 bytes");
  std::memcpy(key.bytes.data(), view->data(), key.bytes.size());
}
void read_value(MsgpackReader& in, std::string_view name, ErrorCode& code) {
  const auto view = in.text(name);
  if (!view) return;
  const auto known = error_code_from_name(*view);
  if (!known) return in.fail(name, "not the name of an error code");
  code = *known;
}
void read_value(MsgpackReader& in, std::string_view name, bool& value) {
  if (const auto read_bool = in.boolean(name)) value = *read_bool;
}

template <typename T>
void read_integer(MsgpackReader& in, std::string_view name, T& value) {
  using Limits = std::numeric_limits<T>;
  if constexpr (std::is_unsigned_v<T>) {
    if (const auto integer = in.unsigned_integer(name, Limits::max())) {
      value = static_cast<T>(*integer);
    }
  } else if (const auto integer = in.integer(name, Limits::min(), Limits::max())) {
    value = static_cast<T>(*integer);
  }
}

template <typename T>
void read_real(MsgpackReader& in, std::string_view name, T& value) {
  const auto number = in.number(name);
  if (!number) return;
  if (std::isfinite(*number) && std::abs(*number) > std::numeric_limits<T>::max()) {
    return in.fail(name, "out of range");
  }
  value = static_cast<T>(*number);
}

template <typename T>
void read_value(MsgpackReader& in, std::string_view name, T& value) {
  if constexpr (std::is_enum_v<T>) {
    auto number = raw(value);
    read_integer(in, name, number);
    value = T{number};
  } else if constexpr (std::is_integral_v<T>) {
    read_integer(in, name, value);
  } else if constexpr (std::is_floating_point_v<T>) {
    read_real(in, name, value);
  } else {
    read_map(in, name, value);
  }
}

template <typename T>
void read(MsgpackReader& in, std::string_view name, T& value) {
  if (!in.failed()) read_value(in, name, value);
}

Error corrupt(const std::string& why) {
  return {ErrorCode::kCorrupt, "can't read the frame: " + why};
}

// The "type" of a frame whose "v" is ours. Encoders write both first, but any order is read.
Result<std::string_view> read_type(std::string_view frame) {
  MsgpackReader in(frame);
  std::optional<std::string_view> type;
  std::optional<std::int64_t> version;
  const auto entries = in.map("frame");
  for (std::size_t i = 0; entries && i < *entries && !in.failed() && !(type && version); ++i) {
    const auto key = in.text("frame");
    if (!key) break;
    if (*key == "v") {
      version = in.integer("v", 0, std::numeric_limits<int>::max());
    } else if (*key == "type") {
      type = in.text("type");
    } else {
      in.skip("frame");
    }
  }
  if (in.failed()) return corrupt(in.error());
  if (!version) return corrupt("v: missing");
  if (*version != kWireVersion) {
    return corrupt("v: the peer speaks version " + std::to_string(*version) + ", this side " +
                   std::to_string(kWireVersion));
  }
  if (!type) return corrupt("type: missing");
  return *type;
}

template <typename T>
Result<T> decode_as(std::string_view frame, std::size_t most_elements) {
  MsgpackReader in(frame, most_elements);
  T message;
  read_map(in, kTypeName<T>, message);
  if (!in.failed() && !in.at_end()) in.fail("frame", "bytes after its end");
  if (in.has_too_many()) return Error{ErrorCode::kInvalidArgument, in.error()};
  if (in.failed()) return corrupt(in.error());
  return message;
}

// Tries the alternatives of a variant in turn.
template <typename Variant, std::size_t kIndex = 0>
Result<Variant> decode_alternative(std::string_view type, std::string_view frame,
                                   std::size_t most_elements) {
  if constexpr (kIndex == std::variant_size_v<Variant>) {
    return corrupt("type: no such message");
  } else {
    using T = std::variant_alternative_t<kIndex, Variant>;
    if (type != kTypeName<T>)
      return decode_alternative<Variant, kIndex + 1>(type, frame, most_elements);
    auto message = decode_as<T>(frame, most_elements);
    if (!message) return message.error();
    return Variant(*std::move(message));
  }
}

template <typename Variant>
Result<Variant> decode_any(std::string_view frame, std::size_t max_bytes,
                           std::size_t most_elements = std::numeric_limits<std::size_t>::max()) {
  if (frame.size() > max_bytes) {
    return corrupt("it has " + std::to_string(frame.size()) + " bytes, at most " +
                   std::to_string(max_bytes) + " are read");
  }
  FT_ASSIGN_OR_RETURN(const auto type, read_type(frame));
  return decode_alternative<Variant>(type, frame, most_elements);
}

}  // namespace

std::string encode(const ClientRequest& message) { return encode_any(message); }
std::string encode(const ServerMessage& message) { return encode_any(message); }
std::string encode(const WorkerMessage& message) { return encode_any(message); }
std::string encode(const CoordinatorMessage& message) { return encode_any(message); }

Result<ClientRequest> decode_client_request(std::string_view frame, std::size_t most_elements) {
  return decode_any<ClientRequest>(frame, kMaxFrameBytes, most_elements);
}
std::string_view peek_request_id(std::string_view frame) {
  MsgpackReader in(frame);
  const auto entries = in.map("frame");
  for (std::size_t i = 0; entries && i < *entries && !in.failed(); ++i) {
    if (in.text("frame") == "request_id") return in.text("request_id").value_or("");
    in.skip("frame");
  }
  return "";
}
Result<ServerMessage> decode_server_message(std::string_view frame) {
  return decode_any<ServerMessage>(frame, kMaxPlanBytes);
}
Result<WorkerMessage> decode_worker_message(std::string_view frame) {
  return decode_any<WorkerMessage>(frame, kMaxPlanBytes);
}
Result<CoordinatorMessage> decode_coordinator_message(std::string_view frame) {
  return decode_any<CoordinatorMessage>(frame, kMaxPlanBytes);
}

}  // namespace foretoken
