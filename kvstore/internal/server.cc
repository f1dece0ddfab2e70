#include "kvstore/internal/server.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "common/available_memory.h"
#include "common/check.h"
#include "common/log.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kMaxPeers = 1'024;

constexpr std::uint64_t kFirstPeerTag = 16;  // of epoll events: two a peer, for socket and process
std::uint64_t socket_tag(std::uint64_t peer) { return kFirstPeerTag + 2 * peer; }
std::uint64_t process_tag(std::uint64_t peer) { return kFirstPeerTag + 2 * peer + 1; }

Error invalid(std::string message) { return {ErrorCode::kInvalidArgument, std::move(message)}; }

bool hung_up(int socket) {
  pollfd state{socket, 0, 0};
  return poll(&state, 1, 0) > 0 && (state.revents & (POLLHUP | POLLERR)) != 0;
}

std::string describe(const ModelIdentity& model) {
  return "model " + model.model_hash + " (" + std::to_string(model.num_layers) + " layers, " +
         std::to_string(model.total_kv_heads) + " KV heads of " + std::to_string(model.head_dim) +
         ", " + (model.kv_type == kernels::DataType::kFp16 ? "fp16" : "bf16") + ")";
}

std::optional<NvmeFile> open_file(const std::optional<NvmeConfig>& nvme) {
  if (!nvme) return std::nullopt;
  return NvmeFile(nvme->folder);
}

}  // namespace

Server::Server(const ServerConfig& config)
    : config_(config),
      listener_(config.socket_path),
      nvme_file_(open_file(config.nvme)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      choice_(config.nvme ? config.nvme->reads : ReadChoice::Mode::kAuto) {
  if (!epoll_) throw Exception(ErrorCode::kIo, std::string("epoll: ") + std::strerror(errno));
  watch(listener_.fd(), kListener);
}

Server::~Server() = default;

void Server::watch(int fd, std::uint64_t tag) const {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = tag;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    throw Exception(ErrorCode::kIo, std::string("epoll_ctl: ") + std::strerror(errno));
  }
}

Status Server::open_arena(const ModelIdentity& model) {
  const auto layout =
      ArenaLayout::fit(config_.arena_bytes, model.total_kv_heads, model.slab_bytes());
  if (layout.slabs_per_head == 0) {
    return Error{ErrorCode::kConfig,
                 "an arena of " + std::to_string(config_.arena_bytes) + " bytes holds no slab of " +
                     std::to_string(model.slab_bytes()) + " bytes for each of " +
                     std::to_string(model.total_kv_heads) + " KV heads"};
  }
  const std::uint64_t buffers = nvme_file_ ? NvmeTier::memory_bytes(model) : 0;
  if (const std::uint64_t available = available_host_memory();
      layout.arena_bytes() + buffers > available) {
    const std::string beside =
        nvme_file_ ? " beside " + std::to_string(buffers) + " of NVMe's buffers" : "";
    return Error{ErrorCode::kConfig, "an arena of " + std::to_string(layout.arena_bytes()) +
                                         " bytes is asked for" + beside + ", and the machine has " +
                                         std::to_string(available) +
                                         " to give; ask for a smaller one"};
  }
  try {
    arena_ = std::make_unique<Arena>(layout, config_.placement, config_.populate);
  } catch (const Exception& failure) {
    return failure.error();
  }
  book_ = std::make_unique<StoreBook>(model.total_kv_heads, layout.slabs_per_head);
  model_ = model;
  watch(arena_->progress_fd(), kProgress);
  log().info("arena of {} bytes: {} slabs of {} bytes for each of {} KV heads",
             layout.arena_bytes(), layout.slabs_per_head, layout.slab_bytes, layout.num_kv_heads);
  return Ok{};
}

void Server::run(int stop_fd) {
  watch(stop_fd, kStop);
  std::array<epoll_event, 64> events;
  for (;;) {
    const int count =
        epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), wait_ms());
    if (count < 0 && errno == EINTR) continue;
    FT_CHECK(count >= 0, errno);
    for (int i = 0; i < count; ++i) {
      const std::uint64_t tag = events[static_cast<std::size_t>(i)].data.u64;
      if (tag == kStop) return close_tier();
      on_event(tag);
    }
    if (mover_) advance_tier();
  }
}

void Server::on_event(std::uint64_t tag) {
  if (tag == kListener) {
    accept_peers();
  } else if (tag == kProgress) {
    note_progress();
  } else if (tag >= kFirstPeerTag && (tag - kFirstPeerTag) % 2 == 0) {
    serve((tag - kFirstPeerTag) / 2);
  } else if (tag >= kFirstPeerTag) {
    end_lease((tag - kFirstPeerTag) / 2);
  }
}

void Server::note_progress() {
  arena_->clear_progress();
  const bool is_settled = arena_->is_settled();  // before what it says is read
  const std::uint32_t ready = arena_->num_ready();
  book_->set_ready(ready);
  if (is_settled) book_->settle();
  log().log(is_settled ? spdlog::level::info : spdlog::level::debug,
            "arena: {} of {} slabs a head are ready", ready, arena_->layout().slabs_per_head);
}

// ---- peers ------------------------------------------------------------------------------------

void Server::accept_peers() {
  while (FileDescriptor socket = listener_.accept()) {
    if (peers_.size() >= kMaxPeers) {
      log().warn("a connection is refused: {} are open", peers_.size());
      continue;
    }
    admit(std::move(socket));
  }
  if (const int count = listener_.take_turned_away(); count > 0) {
    log().warn("{} connections are refused: no file descriptor is left", count);
  }
}

// Our own user's processes only. The pidfd is the peer's for sure if the socket, which only it
// holds, is still open after the pidfd was.
void Server::admit(FileDescriptor socket) {
  const auto credentials = credentials_of(socket.get());
  if (!credentials || (credentials->uid != geteuid() && credentials->uid != 0)) {
    log().warn("a connection of another user is refused");
    return;
  }
  FileDescriptor process(static_cast<int>(syscall(SYS_pidfd_open, credentials->pid, 0)));
  if (!process || hung_up(socket.get())) return;
  const PeerId id = next_peer_++;
  watch(socket.get(), socket_tag(id));
  peers_.emplace(id, Peer{.socket = std::move(socket),
                          .process = std::move(process),
                          .pid = credentials->pid,
                          .lease = {},
                          .waiting = {}});
}

void Server::serve(PeerId id) {
  const auto found = peers_.find(id);
  if (found == peers_.end() || !found->second.socket) return;
  Peer& peer = found->second;
  auto received = receive_message(peer.socket.get(), kMaxMessageBytes);
  if (!received && received.error().code == ErrorCode::kTimeout) return;
  if (!received || received->message.empty()) return drop(id);
  const auto request = decode_request(received->message);
  if (!request) {
    ++bad_requests_;
    log().warn("process {}: {}", peer.pid, request.error().message);
    return drop(id);
  }
  if (!handle(id, peer, *request)) drop(id);
}

void Server::drop(PeerId id) {
  weights_.forget(id);
  Peer& peer = peers_.at(id);
  peer.socket.reset();
  peer.waiting.reset();
  if (!peer.lease) {
    peers_.erase(id);
    return;
  }
  log().info("process {} has left; its KV is kept until its exit", peer.pid);
  watch(peer.process.get(), process_tag(id));
}

void Server::end_lease(PeerId id) {
  const auto found = peers_.find(id);
  if (found == peers_.end()) return;
  if (const auto lease = found->second.lease) {
    take_back_slots(*lease, std::nullopt);
    book_->close_lease(*lease);
  }
  weights_.forget(id);
  peers_.erase(found);
  welcome_waiting();
}

// Hellos that waited are tried again; those that must wait on do so.
void Server::welcome_waiting() {
  std::vector<PeerId> waiting;
  for (const auto& [id, peer] : peers_) {
    if (peer.waiting) waiting.push_back(id);
  }
  for (const PeerId id : waiting) {
    Peer& peer = peers_.at(id);
    const Hello hello = *std::exchange(peer.waiting, std::nullopt);
    if (!greet(peer, hello)) drop(id);
  }
}

// ---- requests ---------------------------------------------------------------------------------

bool Server::handle(PeerId id, Peer& peer, const Request& request) {
  if (const auto* hello = std::get_if<Hello>(&request)) return greet(peer, *hello);
  if (std::holds_alternative<StatRequest>(request)) return reply(peer, stat());
  if (const auto weights = ask_weights(id, request)) {
    if (!*weights) return reply(peer, weights->error());
    return reply(peer, WeightMemory{(*weights)->bytes}, (*weights)->fd);
  }
  if (!peer.lease) {
    ++bad_requests_;
    return reply(peer, invalid("say hello first")), false;
  }
  if (const auto* reserve_request = std::get_if<Reserve>(&request)) {
    return reserve(peer, *reserve_request);
  }
  if (const auto* use = std::get_if<Use>(&request)) {
    if (lent_.contains({*peer.lease, use->sequence})) {
      return reply_grant(peer, use_outsized(peer, *use));
    }
    return reply_grant(peer, book_->use(*peer.lease, use->sequence, use->hit_segments));
  }
  if (std::holds_alternative<FindKey>(request)) return hand_over_key(peer);
  if (const auto* commit = std::get_if<Commit>(&request)) {
    note(peer, this->commit(peer, *commit));
  } else if (const auto* publish = std::get_if<Publish>(&request)) {
    note(peer, this->publish(peer, *publish));
  } else if (const auto* refute = std::get_if<Refute>(&request)) {
    note(peer, this->refute(peer, *refute));
  } else if (const auto* distrust = std::get_if<Distrust>(&request)) {
    note(peer, book_->distrust(*peer.lease, distrust->sequence));
  } else if (const auto* faults = std::get_if<NvmeFaults>(&request)) {
    rank_faults_.io_errors += faults->io_errors;
    rank_faults_.checksum_failures += faults->checksum_failures;
  } else if (const auto* times = std::get_if<PrefillTimes>(&request)) {
    note_prefill(*times);
  } else if (const auto* release = std::get_if<Release>(&request)) {
    take_back_slots(*peer.lease, release->sequence);
    note(peer, book_->release(*peer.lease, release->sequence));
  } else {  // Goodbye
    end_lease(id);
  }
  return true;
}

// A one-way request that was wrong has nobody to tell.
void Server::note(const Peer& peer, const Status& status) {
  if (status) return;
  ++bad_requests_;
  log().warn("process {}: {}", peer.pid, status.error().message);
}

bool Server::reserve(const Peer& peer, const Reserve& request) {
  if (request.num_segments > kMaxGrantSlabs / peer.owner.num_heads) {
    return reply(peer, invalid(std::to_string(request.num_segments) + " segments of " +
                               std::to_string(peer.owner.num_heads) +
                               " heads are more than one sequence may have"));
  }
  if (is_outsized(request)) {
    Result<Grant> grant = reserve_outsized(peer, request);
    if (!grant) return reply(peer, grant.error());
    touch_prefix(peer, request.keys);
    return reply(peer, *std::move(grant), nvme_file_->fd());
  }
  if (promotions_ && is_coming(peer, request)) {
    return reply(peer, Error{ErrorCode::kPending, "its prefix is on its way from NVMe"});
  }
  auto grant = book_->reserve(*peer.lease, request.sequence, request.keys, request.num_segments);
  if (grant && promotions_) {
    touch_prefix(peer, request.keys);
    count_passed_over(peer, ReadChoice::Way::kPromoted, request.keys, grant->head_hits);
  }
  return reply_grant(peer, std::move(grant));
}

Status Server::commit(const Peer& peer, const Commit& request) {
  FT_RETURN_IF_ERROR(book_->commit(*peer.lease, request.sequence, request.segment, request.key));
  const auto previous = book_->key_before(*peer.lease, request.sequence, request.segment);
  for (int i = 0; mover_ && i < peer.owner.num_heads; ++i) {
    mover_->write_behind({peer.owner.first_head + i, request.key}, previous);
  }
  return Ok{};
}

bool Server::greet(Peer& peer, const Hello& hello) {
  if (peer.lease || peer.waiting) {
    ++bad_requests_;
    return reply(peer, invalid("hello was said already")), false;
  }
  Status fits = check(hello);
  if (fits) fits = adopt(hello.model);
  if (!fits) return reply(peer, fits.error()), false;
  if (const LeaseOwner* old = book_->find_lease(hello.owner.group, hello.owner.rank)) {
    if (raw(hello.owner.epoch) <= raw(old->epoch)) {
      return reply(peer, invalid("rank " + std::to_string(old->rank) + " of group " +
                                 std::to_string(old->group) + " is held by epoch " +
                                 std::to_string(raw(old->epoch)))),
             false;
    }
    peer.waiting = hello;
    return true;
  }
  peer.lease = book_->open_lease(hello.owner);
  peer.owner = hello.owner;
  const ArenaLayout& layout = arena_->layout();
  return reply(
      peer, Welcome{layout.slab_bytes, layout.slabs_per_head, config_.nvme && config_.nvme->cipher},
      arena_->memory_fd());
}

Status Server::check_version(int version) {
  if (version == kProtocolVersion) return Ok{};
  return invalid("store protocol " + std::to_string(kProtocolVersion) + " is spoken here, not " +
                 std::to_string(version));
}

Status Server::check(const Hello& hello) const {
  FT_RETURN_IF_ERROR(check_version(hello.version));
  if (hello.owner.first_head + hello.owner.num_heads > hello.model.total_kv_heads) {
    return invalid("heads past the model's " + std::to_string(hello.model.total_kv_heads));
  }
  return Ok{};
}

// The first model is the store's; all others must be it.
Status Server::adopt(const ModelIdentity& model) {
  if (!model_) FT_RETURN_IF_ERROR(open_arena(model));
  if (model_->model_hash.empty()) {
    ModelIdentity named = *model_;
    named.model_hash = model.model_hash;
    if (named == model) model_ = named;
  }
  if (*model_ == model) {
    if (nvme_file_ && !tier_ && std::chrono::steady_clock::now() >= next_opening_) open_tier();
    return Ok{};
  }
  return invalid("the store holds the KV of " + describe(*model_) + ", not of " + describe(model) +
                 "; start a store of its own for it");
}

bool Server::reply(const Peer& peer, const Reply& message, std::optional<int> passed_fd) const {
  const auto sent = send_message(peer.socket.get(), encode(message), passed_fd);
  if (!sent) log().warn("process {}: {}", peer.pid, sent.error().message);
  return sent.has_value();
}

bool Server::reply_grant(const Peer& peer, Result<Grant> grant) const {
  if (!grant) return reply(peer, grant.error());
  return reply(peer, *std::move(grant));
}

StoreStat Server::stat() const {
  StoreStat stat = book_ ? book_->stat() : StoreStat{};
  stat.bad_requests = bad_requests_;
  if (nvme_file_) stat.nvme.state = NvmeState::kOffline;  // until the tier is open
  if (mover_) stat.nvme = mover_->stat();
  stat.nvme.io_errors += rank_faults_.io_errors;
  stat.nvme.checksum_failures += rank_faults_.checksum_failures;
  stat.nvme.tokens_passed_over = tokens_passed_over_;
  return stat;
}

}  // namespace foretoken::kvstore
