// Fuzzes the wire: whatever bytes come, decoding gives a message or kCorrupt (kInvalidArgument for
// a list that is too long); what is accepted is written and read again to the same bytes.
#include <cstdint>
#include <string>
#include <string_view>

#include "common/check.h"
#include "common/wire.h"

namespace {

template <typename Decode>
void try_decode(std::string_view frame, Decode decode) {
  const auto message = decode(frame);
  if (!message) {
    FT_CHECK(message.error().code == foretoken::ErrorCode::kCorrupt ||
             message.error().code == foretoken::ErrorCode::kInvalidArgument);
    return;
  }
  const auto written = foretoken::encode(*message);
  const auto again = decode(written);
  FT_CHECK(again.has_value());
  FT_CHECK(foretoken::encode(*again) == written);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view frame(reinterpret_cast<const char*>(data), size);
  try_decode(frame, [](std::string_view bytes) {
    static_cast<void>(foretoken::peek_request_id(bytes));
    return foretoken::decode_client_request(bytes, 1024);
  });
  try_decode(frame, foretoken::decode_server_message);
  try_decode(frame, foretoken::decode_worker_message);
  try_decode(frame, foretoken::decode_coordinator_message);
  return 0;
}
