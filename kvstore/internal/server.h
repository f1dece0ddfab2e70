// Server: the store process: one epoll loop on one thread over the listening socket, the ranks'
// connections, the exits of dead ones, the arena's progress and a stop signal. It decides nothing:
// who holds what is StoreBook's, where it lies is Arena's.
//
// The model's shape comes from the command line or with the first Hello; the arena is made then.
// A rank's lease ends when it says Goodbye, or when its socket is closed AND its process has
// exited (pidfd): a stopped process could wake up and write. A Hello of a newer epoch of the same
// (group, rank) waits for that.
//
// With an NVMe tier a Reserve whose prefix is partly in the file is refused as pending until that
// is back in the arena: nobody waits here for a disk. The tier never fails a request: a prefix that
// does not come, or not in time, is a shorter hit. The tier's side is server_nvme.cc. A sequence
// that is larger than the arena is given slots of the file beside slabs, and the file's descriptor:
// as with the arena, only who has what is decided here (server_outsized.cc).
//
// Beside KV it may hold a copy of the model's weights (weight_copy.h), which ranks ask for before
// they say Hello. Example: tests/kvstore/server_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvstore/internal/arena.h"
#include "kvstore/internal/nvme_file.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/promotions.h"
#include "kvstore/internal/protocol.h"
#include "kvstore/internal/read_choice.h"
#include "kvstore/internal/segment_keys.h"
#include "kvstore/internal/seqpacket.h"
#include "kvstore/internal/store_book.h"
#include "kvstore/internal/tier_mover.h"
#include "kvstore/internal/weight_copy.h"

namespace foretoken::kvstore {

struct NvmeConfig {
  std::string folder;
  // nullopt: what a kept file has, else nine tenths of what the file system has free.
  std::optional<std::uint64_t> capacity_bytes;
  NvmeReuse reuse = NvmeReuse::kStartAfresh;  // kKeepSlabs: of the last store, and for the next one
  std::shared_ptr<const KvCipher> cipher = nullptr;  // null: not encrypted
  ReadChoice::Mode reads = ReadChoice::Mode::kAuto;
};

struct ServerConfig {
  std::string socket_path;
  std::size_t arena_bytes = 0;
  NumaPlacement placement = NumaPlacement::kSpread;
  std::optional<NvmeConfig> nvme = std::nullopt;
  Arena::Populate populate = kvstore::populate;  // another one for tests: memory that runs out
};

class Server {
 public:
  // Listens at once. Throws as Listener and NvmeFile do.
  explicit Server(const ServerConfig& config);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Makes the arena for the model before anybody asks; its hash still comes with the first Hello.
  // Error: kConfig when the arena holds not one slab a head, or memory is short.
  Status open_arena(const ModelIdentity& model);

  // Serves until stop_fd is readable. Then writes what is to be kept on NVMe, for a few seconds at
  // most, or removes its file.
  void run(int stop_fd);

 private:
  struct Peer {
    FileDescriptor socket;
    FileDescriptor process;  // pidfd
    int pid = 0;
    std::optional<LeaseId> lease;
    LeaseOwner owner = {};         // of the lease
    std::optional<Hello> waiting;  // for the end of an older lease
  };
  using PeerId = std::uint64_t;
  using Group = std::map<LeaseId, LeaseOwner>;

  // Tags of epoll events that no peer has.
  enum Tag : std::uint64_t { kStop = 0, kListener = 1, kProgress = 2, kNvme = 3 };

  void watch(int fd, std::uint64_t tag) const;
  void on_event(std::uint64_t tag);
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
  static Status check_version(int version);
  Status check(const Hello& hello) const;
  Status adopt(const ModelIdentity& model);
  bool reply(const Peer& peer, const Reply& message, std::optional<int> passed_fd = {}) const;
  bool reply_grant(const Peer& peer, Result<Grant> grant) const;
  bool reserve(const Peer& peer, const Reserve& request);
  Status commit(const Peer& peer, const Commit& request);
  void note(const Peer& peer, const Status& status);
  bool hand_over_key(const Peer& peer) const;
  StoreStat stat() const;

  // The copy of the weights (server_weights.cc). nullopt: another kind of request.
  std::optional<Result<WeightCopy::Memory>> ask_weights(PeerId id, const Request& request);
  Status check_weights(int version, const std::string& model_hash) const;
  std::uint64_t memory_beside_arena() const;

  // Sequences that are larger than the arena (server_outsized.cc). What one has on all heads of its
  // lease: slots of tier_, the first of each head borrowed with the prefix that they hold, the
  // others lent; and so many slabs a head.
  struct Lent {
    std::vector<SlotIndex> slots;  // [num_heads, num_segments]
    SegmentKeys keys;
    int num_segments = 0;
    int hit_segments = 0;
    LeaseOwner owner = {};
    std::uint32_t num_slabs = 0;

    SlotIndex& slot(int head, int segment) {
      return slots[static_cast<std::size_t>(head * num_segments + segment)];
    }
    // Of all heads, segment by segment: in this order they are needed.
    std::vector<SlotIndex> by_segment();
  };
  bool is_outsized(const Reserve& request) const;
  Result<std::uint32_t> num_slabs_for(const Peer& peer, const Reserve& request) const;
  Result<Grant> reserve_outsized(const Peer& peer, const Reserve& request);
  Result<Grant> use_outsized(const Peer& peer, const Use& request);
  Grant grant_of(const Lent& lent) const;
  int num_hits(const Peer& peer, std::span<const PrefixKey> keys, TimePoint now) const;
  Result<Lent*> find_lent(const Peer& peer, SequenceId sequence);
  Status publish(const Peer& peer, const Publish& request);
  Status refute(const Peer& peer, const Refute& request);
  std::uint32_t num_slabs_lent(const Peer& peer, const Group& group, SequenceId sequence) const;
  std::uint32_t room_for(const Peer& peer, const Group& group, SequenceId sequence) const;
  void take_back_slots(LeaseId lease, std::optional<SequenceId> sequence);

  void open_tier();
  bool is_coming(const Peer& peer, const Reserve& request);
  bool reads_outsized(const Reserve& request, int hits);
  void count_passed_over(const Peer& peer, ReadChoice::Way way, std::span<const PrefixKey> keys,
                         std::span<const int> head_hits);
  void touch_prefix(const Peer& peer, std::span<const PrefixKey> keys);
  void note_prefill(const PrefillTimes& times);
  void advance_tier();
  void close_tier();
  int wait_ms() const;  // for the next event; -1: for ever

  ServerConfig config_;
  Listener listener_;  // ranks may knock while the file's lock is waited for
  std::optional<NvmeFile> nvme_file_;
  FileDescriptor epoll_;
  std::optional<ModelIdentity> model_;  // its hash is empty until the first Hello
  std::unique_ptr<Arena> arena_;        // with model_
  std::unique_ptr<StoreBook> book_;     // with model_
  std::unique_ptr<NvmeTier> tier_;      // with the model's hash; none where it couldn't be opened
  TimePoint next_opening_{};            // of tier_, after one that failed
  std::unique_ptr<TierMover> mover_;    // with tier_
  ReadChoice choice_;
  std::unique_ptr<Promotions> promotions_;  // with mover_
  std::int64_t tokens_passed_over_ = 0;
  std::map<std::pair<LeaseId, SequenceId>, Lent> lent_;
  NvmeFaults rank_faults_;  // of all ranks, so far
  WeightCopy weights_;
  std::map<PeerId, Peer> peers_;
  PeerId next_peer_ = 1;
  std::int64_t bad_requests_ = 0;
};

}  // namespace foretoken::kvstore
