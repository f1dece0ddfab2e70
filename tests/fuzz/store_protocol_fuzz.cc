// Anything as a store request or reply: refused or read whole; what is read is written the same.
#include <cstdint>
#include <string_view>

#include "common/check.h"
#include "kvstore/internal/protocol.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace foretoken::kvstore;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (const auto request = decode_request(bytes)) {
    const std::string written = encode(*request);
    const auto again = decode_request(written);
    FT_CHECK(again.has_value() && encode(*again) == written, size);
  }
  if (const auto reply = decode_reply(bytes)) {
    const std::string written = encode(*reply);
    const auto again = decode_reply(written);
    FT_CHECK(again.has_value() && encode(*again) == written, size);
  }
  return 0;
}
