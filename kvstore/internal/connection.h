// Connection: requests to the store over its socket. After a failure of the socket itself no answer
// can be told from a late one, so all later requests fail too.
//
// For one thread.
#pragma once

#include <string>
#include <utility>
#include <variant>

#include "common/result.h"
#include "kvstore/internal/file_descriptor.h"
#include "kvstore/internal/protocol.h"
#include "kvstore/internal/seqpacket.h"

namespace foretoken::kvstore {

inline Error out_of_step(const char* why) {
  return {ErrorCode::kUnavailable, std::string("the KV store ") + why};
}

class Connection {
 public:
  explicit Connection(FileDescriptor socket) : socket_(std::move(socket)) {}

  struct Answer {
    Reply reply;
    FileDescriptor passed;
  };
  Result<Answer> ask(const Request& request) {
    FT_RETURN_IF_ERROR(tell(request));
    auto received = receive_message(socket_.get(), kMaxMessageBytes);
    if (!received) return broken(received.error());
    if (received->message.empty()) return broken(out_of_step("has closed the connection"));
    auto reply = decode_reply(received->message);
    if (!reply) return broken(reply.error());
    if (auto* refusal = std::get_if<Error>(&*reply)) return std::move(*refusal);
    return Answer{*std::move(reply), std::move(received->passed)};
  }

  template <typename Message>
  Result<Message> ask_for(const Request& request, FileDescriptor* passed = nullptr) {
    FT_ASSIGN_OR_RETURN(Answer answer, ask(request));
    auto* message = std::get_if<Message>(&answer.reply);
    if (message == nullptr) return broken(out_of_step("answered something else"));
    if (passed != nullptr) *passed = std::move(answer.passed);
    return std::move(*message);
  }

  Status tell(const Request& request) {
    if (!socket_) return out_of_step("connection has failed before");
    auto sent = send_message(socket_.get(), encode(request));
    if (!sent) return broken(sent.error());
    return Ok{};
  }

 private:
  Error broken(Error error) {
    socket_.reset();
    return error;
  }
  FileDescriptor socket_;
};

}  // namespace foretoken::kvstore
