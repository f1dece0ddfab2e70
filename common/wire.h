// Wire: messages <-> msgpack. A frame is a map {"v": kWireVersion, "type": name, fields...}.
//
// Decoding trusts nothing: bounded size, depth and counts, no extension types, every field's type
// and range checked, unknown fields ignored (a newer peer), missing ones default where the struct
// has a default. Never throws. Error: kCorrupt, naming the field.
// Example: tests/common/wire_test.cc; format: docs/formats.md
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "common/messages.h"
#include "common/result.h"

namespace foretoken {

inline constexpr std::size_t kMaxFrameBytes = std::size_t{4} << 20;   // from clients
inline constexpr std::size_t kMaxPlanBytes = std::size_t{256} << 20;  // inside the service

std::string encode(const ClientRequest& message);
std::string encode(const ServerMessage& message);
std::string encode(const WorkerMessage& message);
std::string encode(const CoordinatorMessage& message);

// most_elements: of a list. Longer ones cost their sender an error (kInvalidArgument), and this
// side no time.
Result<ClientRequest> decode_client_request(std::string_view frame,
                                            std::size_t most_elements = kMaxFrameBytes);
// Of a frame that couldn't be decoded, so that its sender can be told which it was; empty where not
// even that can be read. Views the frame.
std::string_view peek_request_id(std::string_view frame);
Result<ServerMessage> decode_server_message(std::string_view frame);
Result<WorkerMessage> decode_worker_message(std::string_view frame);
Result<CoordinatorMessage> decode_coordinator_message(std::string_view frame);

}  // namespace foretoken
