// KeyFolder: the CURVE keys of a service, made at its first start, mode 0600:
//
//   server.key       {"public_key", "secret_key"}: the service's own
//   client.key       what the operator's clients connect with (read_client_keys); may drain
//   worker.key       what ranks connect with, where they come over tcp
//   authorized_keys  optional: public keys of further clients, one a line; '#' begins a comment
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "common/socket.h"

namespace foretoken::coordinator {

struct ServiceKeys {
  KeyPair server;
  ClientKeys client;
  ClientKeys worker;
  std::vector<std::string> authorized;  // public keys of further clients
};

// Reads what is there, and makes and writes what is not. Errors: kIo; kConfig for a file that
// others can read, or that holds no keys.
Result<ServiceKeys> open_key_folder(const std::filesystem::path& folder);

}  // namespace foretoken::coordinator
