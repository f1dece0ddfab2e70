// The files and sockets of one running service, in its runtime folder.
#pragma once

#include <filesystem>
#include <string>

namespace foretoken::launch {

struct ServiceFiles {
  std::filesystem::path folder;

  std::filesystem::path config() const { return folder / "config.json"; }
  std::filesystem::path store_socket() const { return folder / "store.sock"; }
  std::filesystem::path worker_socket() const { return folder / "worker.sock"; }
  std::filesystem::path client_key() const { return folder / "client.key"; }
  // The folder's mode guards it: no keys.
  std::string worker_endpoint() const { return "ipc://" + worker_socket().string(); }
};

}  // namespace foretoken::launch
