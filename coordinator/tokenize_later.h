// TokenizeLater: where the service has long texts turned into tokens. The server's is a thread
// (tokenize_thread.h), a test's a list.
#pragma once

#include <string>

#include "common/ids.h"
#include "common/tokenizer.h"

namespace foretoken::coordinator {

class TokenizeLater {
 public:
  virtual ~TokenizeLater() = default;
  // The tokens are handed to Service::on_tokenized() later. Tenants take turns.
  virtual void submit(RequestId id, const std::string& tenant, std::string text,
                      EncodeOptions options) = 0;
  // Nobody wants its tokens any more: it is not begun, and its text not kept. They may come all the
  // same, if it was begun already.
  virtual void cancel(RequestId id) = 0;
  // Of the texts that are not begun: all, and this tenant's.
  struct WaitingBytes {
    std::size_t all = 0;
    std::size_t of_tenant = 0;
  };
  virtual WaitingBytes waiting_bytes(const std::string& tenant) = 0;
};

}  // namespace foretoken::coordinator
