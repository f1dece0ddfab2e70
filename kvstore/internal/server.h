// Server: the store process: one epoll loop on one thread over the listening socket, the ranks'
// connections, the exits of dead ones, the arena's progress and a stop signal. It decides nothing:
// who holds what is StoreBook's, where it lies is Arena's.
//
// The model's shape comes from the command line or with the first Hello; the arena is made then.
// A rank's lease ends when it says Goodbye, or when its socket is closed AND its process has
// exited (pidfd): a stopped process could wake up and write. A Hello of a newer epoch of the same
// (group, rank) waits for that.
// Example: tests/kvstore/server_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "kvstore/internal/arena.h"
#include "kvstore/internal/protocol.h"
#include "kvstore/internal/seqpacket.h"
#include "kvstore/internal/store_book.h"

namespace foretoken::kvstore {

struct ServerConfig {
  std::string socket_path;
  std::size_t arena_bytes = 0;
  NumaPlacement placement = NumaPlacement::kSpread;
};

class Server {
 public:
  // Listens at once. Throws as Listener does.
  explicit Server(const ServerConfig& config);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Makes the arena for the model before anybody asks; its hash still comes with the first Hello.
  // Error: kConfig when the arena holds not one slab a head, or memory is short.
  Status open_arena(const ModelIdentity& model);

  // Serves until stop_fd is readable.
  void run(int stop_fd);

 private:
  struct Peer {
    FileDescriptor socket;
    FileDescriptor process;  // pidfd
    int pid = 0;
    std::optional<LeaseId> lease;
    int num_heads = 0;             // of the lease
    std::optional<Hello> waiting;  // for the end of an older lease
  };
  using PeerId = std::uint64_t;

  void watch(int fd, std::uint64_t tag) const;
  void accept_peers();
  void admit(FileDescriptor socket);
  void serve(PeerId id);
  void drop(PeerId id);       // closes the socket; the lease may live on
  void end_lease(PeerId id);  // and forgets the peer
  void welcome_waiting();
  void note_progress();

  // Answers a request. False: the peer is to be dropped.
  bool handle(PeerId id, Peer& peer, const Request& request);
  bool greet(Peer& peer, const Hello& hello);
  Status check(const Hello& hello) const;
  Status adopt(const ModelIdentity& model);
  bool reply(const Peer& peer, const Reply& message, std::optional<int> passed_fd = {}) const;
  bool reply_grant(const Peer& peer, Result<Grant> grant) const;
  Result<Grant> reserve(const Peer& peer, const Reserve& request);
  void note(const Peer& peer, const Status& status);
  StoreStat stat() const;

  ServerConfig config_;
  Listener listener_;
  FileDescriptor epoll_;
  std::optional<ModelIdentity> model_;  // its hash is empty until the first Hello
  std::unique_ptr<Arena> arena_;        // with model_
  std::unique_ptr<StoreBook> book_;     // with model_
  std::map<PeerId, Peer> peers_;
  PeerId next_peer_ = 1;
  std::int64_t bad_requests_ = 0;
};

}  // namespace foretoken::kvstore
