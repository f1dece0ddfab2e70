// MsgpackReader: pulls values out of msgpack bytes that nobody vouches for.
//
// Why not msgpack::unpack: its object tree takes 24 bytes for a one-byte value, so a 4 MiB frame
// would become 100 MB before any cap could be checked. This reader allocates nothing; what it
// returns views the frame. The first failure sticks: later reads fail, error() says what and where.
//
// Not thread-safe. Example: common/internal/wire.cc
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

namespace foretoken::internal {

class MsgpackReader {
 public:
  // `bytes` must outlive the reader and the views it returns.
  // Arrays of more elements than these fail.
  explicit MsgpackReader(std::string_view bytes,
                         std::size_t most_elements = std::numeric_limits<std::size_t>::max())
      : bytes_(bytes), most_elements_(most_elements) {}

  // Each reads one value of its type; nullopt after a failure. `what` names it in the error.
  // Of maps and arrays: the number of entries, which is at most the number of bytes left.
  std::optional<std::size_t> map(std::string_view what);
  std::optional<std::size_t> array(std::string_view what);
  std::optional<std::string_view> text(std::string_view what);
  std::optional<std::string_view> binary(std::string_view what);
  std::optional<bool> boolean(std::string_view what);
  std::optional<double> number(std::string_view what);  // an integer counts as one
  // An integer in [least, most].
  std::optional<std::int64_t> integer(std::string_view what, std::int64_t least, std::int64_t most);
  std::optional<std::uint64_t> unsigned_integer(std::string_view what, std::uint64_t most);

  // Reads a nil if one comes next, and says so.
  bool nil();
  // Steps over any value without extension types, at most kMaxDepth deep. False after a failure.
  bool skip(std::string_view what);

  bool at_end() const { return position_ == bytes_.size(); }

  // Records a failure, if it is the first.
  void fail(std::string_view what, std::string_view why);
  bool failed() const { return failed_; }
  // Whether the failure is an array of more than most_elements.
  bool has_too_many() const { return has_too_many_; }
  const std::string& error() const { return error_; }

  static constexpr int kMaxDepth = 32;

 private:
  struct Header;  // a value's first bytes, decoded
  std::optional<Header> header(std::string_view what);
  std::optional<std::string_view> bytes(std::size_t count, std::string_view what);
  std::optional<std::uint64_t> big_endian(std::size_t count, std::string_view what);
  bool wrong_type(std::string_view what, std::string_view expected, const Header& got);

  std::string_view bytes_;
  std::size_t most_elements_;
  std::size_t position_ = 0;
  bool failed_ = false;
  bool has_too_many_ = false;
  std::string error_;
};

}  // namespace foretoken::internal
