#include "kvstore/kv_store.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "kvstore/internal/arena_guard.h"
#include "kvstore/internal/connection.h"
#include "kvstore/internal/run_io.h"
#include "kvstore/internal/sealing_device.h"
#include "kvstore/internal/seqpacket.h"
#include "kvstore/internal/slot_table.h"
#include "kvstore/internal/stripe_mapping.h"

namespace foretoken::kvstore {
namespace {

constexpr std::chrono::milliseconds kConnectPause{100};

ModelIdentity identity_of(const StoreClientConfig& config) {
  return {config.model_hash, config.total_kv_heads, config.shape.num_layers, config.shape.head_dim,
          config.shape.kv_type};
}

Hello hello_of(const StoreClientConfig& config) {
  Hello hello;
  hello.owner = {config.group, config.rank, config.epoch, config.first_head,
                 config.shape.num_kv_heads};
  hello.model = identity_of(config);
  return hello;
}

Error granted_otherwise() {
  return {ErrorCode::kCorrupt, "the KV store granted what was not asked for"};
}

}  // namespace

struct KvStore::Impl {
  StoreClientConfig config;
  kernels::Device& device;
  Connection connection;
  std::optional<StripeMapping> mapping;
  std::optional<ArenaGuard> guard;
  FileDescriptor nvme_file;  // the store's, once a sequence was outsized
  bool encrypts_nvme = false;
  std::shared_ptr<const KvCipher> cipher;  // the file's, likewise; null: not encrypted
  std::optional<RunIo> io;                 // on it
  std::vector<std::unique_ptr<kernels::Event>> fetched;  // by the layer that a fetch began with
  std::vector<std::optional<int>> fetched_with;  // the layer that a layer's last fetch began with

  Impl(const StoreClientConfig& client, kernels::Device& on, FileDescriptor socket)
      : config(client), device(on), connection(std::move(socket)) {}

  Status greet();
  std::uint32_t await_slabs(std::uint32_t wanted);
  Status have_key();
  Status tell_faults();
  void prepare_device();
  Result<Reservation> translate(SequenceId sequence, const Grant& grant, int num_segments) const;
  Result<Reservation> translate_outsized(SequenceId sequence, const Grant& grant, int num_segments,
                                         FileDescriptor file);
  std::vector<std::uint64_t> offsets_of(const Grant& grant) const;
  Status read_prefix(Reservation& kv, const Grant& grant, std::span<const PrefixKey> keys);

  SlotFile file_of(const Grant& grant) const {
    return {config.shape, grant.slots_offset, grant.file_id, cipher.get()};
  }
  bool is_no_slab(SlabIndex slab) const { return raw(slab) >= mapping->num_slabs(); }

  // Runs an op that touches the arena. Under the guard the arena is open until the op is through.
  template <typename Op>
  void touch_arena(kernels::Stream& stream, const Op& op) {
    if (!guard) return op();
    const ArenaGuard::Scope open(*guard);
    op();
    stream.synchronize();
  }
};

Status KvStore::Impl::greet() {
  FT_ASSIGN_OR_RETURN(Connection::Answer answer, connection.ask(hello_of(config)));
  const auto* welcome = std::get_if<Welcome>(&answer.reply);
  if (welcome == nullptr || !answer.passed) return out_of_step("did not hand over its arena");
  if (welcome->slab_bytes != config.shape.slab_bytes()) {
    return Error{ErrorCode::kInvalidArgument, "the KV store lays slabs out otherwise"};
  }
  encrypts_nvme = welcome->encrypts_nvme;
  const ArenaLayout layout{config.total_kv_heads, welcome->slab_bytes, welcome->slabs_per_head};
  try {
    mapping.emplace(answer.passed.get(), layout, config.first_head, config.shape.num_kv_heads,
                    device, [this](std::uint32_t wanted) { return await_slabs(wanted); });
  } catch (const Exception& failure) {
    return failure.error();
  }
  if (config.guard_arena) guard.emplace(mapping->memory());
  return Ok{};
}

// A device that pins memory would itself back what the store hasn't yet, with one thread and small
// pages, and fail where there is no more; so it pins behind the store. To others it makes no
// difference.
std::uint32_t KvStore::Impl::await_slabs(std::uint32_t wanted) {
  constexpr std::chrono::milliseconds kPoll{5};
  constexpr std::chrono::seconds kPatience{60};  // while nothing becomes ready
  const bool pins = !device.info().shares_host_memory;
  std::int64_t ready = 0;
  for (auto end = std::chrono::steady_clock::now() + kPatience;;) {
    const auto stat = connection.ask_for<StoreStat>(StatRequest{}).value_or_throw();
    const std::int64_t enough = std::min<std::int64_t>(wanted, stat.slabs_total);
    if (!pins || stat.slabs_ready >= enough) return static_cast<std::uint32_t>(enough);
    const auto now = std::chrono::steady_clock::now();
    if (stat.slabs_ready > ready) end = now + kPatience;
    ready = stat.slabs_ready;
    if (now > end) {
      throw Exception(ErrorCode::kTimeout, "the KV arena is backed no further than slab " +
                                               std::to_string(ready) + " of " +
                                               std::to_string(stat.slabs_total));
    }
    std::this_thread::sleep_for(kPoll);
  }
}

// Of an encrypted file, before this rank has its first runs there.
Status KvStore::Impl::have_key() {
  if (!encrypts_nvme || cipher) return Ok{};
  FileDescriptor pipe;
  FT_ASSIGN_OR_RETURN(const FileKey key, connection.ask_for<FileKey>(FindKey{}, &pipe));
  FT_ASSIGN_OR_RETURN(cipher, KvCipher::from_pipe(pipe.get(), key.cipher));
  return Ok{};
}

// The store counts for the node.
Status KvStore::Impl::tell_faults() {
  if (!io) return Ok{};
  const NvmeFaults faults = io->take_faults();
  if (faults.io_errors + faults.checksum_failures == 0) return Ok{};
  return connection.tell(faults);
}

void KvStore::Impl::prepare_device() {
  for (int layer = 0; layer < config.shape.num_layers; ++layer) {
    fetched.push_back(device.make_event());
    fetched_with.emplace_back();
  }
}

// Slab numbers to device addresses. The store is trusted no further than a peer.
Result<Reservation> KvStore::Impl::translate(SequenceId sequence, const Grant& grant,
                                             int num_segments) const {
  const auto num_heads = static_cast<std::size_t>(config.shape.num_kv_heads);
  const auto segments = static_cast<std::size_t>(num_segments);
  const auto out_of_range = [&](int hits) { return hits < 0 || hits > num_segments; };
  const auto no_slab = [this](SlabIndex slab) { return is_no_slab(slab); };
  if (grant.head_hits.size() != num_heads || grant.slabs.size() != num_heads * segments ||
      std::ranges::any_of(grant.head_hits, out_of_range) ||
      std::ranges::any_of(grant.slabs, no_slab)) {
    return granted_otherwise();
  }
  Reservation kv;
  kv.sequence = sequence;
  kv.num_segments = num_segments;
  kv.hit_segments = std::ranges::min(grant.head_hits);
  kv.head_hits = grant.head_hits;
  for (std::size_t i = 0; i < grant.slabs.size(); ++i) {
    kv.slabs.push_back(mapping->slab(static_cast<int>(i / segments), grant.slabs[i]));
  }
  return kv;
}

// The slabs' runs are the frames.
Result<Reservation> KvStore::Impl::translate_outsized(SequenceId sequence, const Grant& grant,
                                                      int num_segments, FileDescriptor file) {
  const kernels::KvShape& shape = config.shape;
  const auto heads = static_cast<std::size_t>(shape.num_kv_heads);
  const auto layers = static_cast<std::size_t>(shape.num_layers);
  const std::size_t slabs_a_head = grant.slabs.size() / heads;
  if (grant.slabs.size() != heads * slabs_a_head || !file ||
      grant.slots.size() != heads * static_cast<std::size_t>(num_segments) ||
      grant.slabs.size() * layers < OutsizedKv::least_frames(shape, num_segments) ||
      grant.head_hits.size() != heads || std::ranges::min(grant.head_hits) < 0 ||
      std::ranges::max(grant.head_hits) > num_segments ||
      std::ranges::any_of(grant.slabs, [this](SlabIndex slab) { return is_no_slab(slab); })) {
    return granted_otherwise();
  }
  if (!io) {
    nvme_file = std::move(file);
    const std::size_t buffer =
        std::max({shape.run_bytes(), SlotTable::bytes(shape, cipher != nullptr), kSectorBytes});
    IoMemory memory(buffer * RunIo::kDepth);
    auto disk =
        make_sealing_device(make_block_device(nvme_file.get(), memory, RunIo::kDepth), cipher);
    io.emplace(std::move(memory), std::move(disk), buffer);
  }
  OutsizedKv::Parts parts{shape, num_segments, {}, offsets_of(grant), cipher != nullptr};
  for (std::size_t i = 0; i < grant.slabs.size(); ++i) {
    const int head = static_cast<int>(i / slabs_a_head);
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const std::size_t offset = layer * shape.run_bytes();
      parts.frames.push_back({mapping->host_slab(head, grant.slabs[i]) + offset,
                              mapping->slab(head, grant.slabs[i]) + offset});
    }
  }
  Reservation kv;
  kv.sequence = sequence;
  kv.num_segments = num_segments;
  kv.head_hits = grant.head_hits;
  kv.outsized =
      std::make_unique<OutsizedKv>(device, *io, guard ? &*guard : nullptr, std::move(parts));
  return kv;
}

std::vector<std::uint64_t> KvStore::Impl::offsets_of(const Grant& grant) const {
  std::vector<std::uint64_t> offsets;
  for (const SlotIndex slot : grant.slots) {
    offsets.push_back(file_of(grant).slab_offset(slot));
  }
  return offsets;
}

// The checksums of the hits, from NVMe. A slot that does not hold what it should is a miss, and so
// is what is behind it; what a disk does not give now stays for the next one.
Status KvStore::Impl::read_prefix(Reservation& kv, const Grant& grant,
                                  std::span<const PrefixKey> keys) {
  const int hits = std::min(std::ranges::min(grant.head_hits), static_cast<int>(std::ssize(keys)));
  const int heads = config.shape.num_kv_heads;
  std::vector<NamedSlot> slots;
  for (int segment = 0; segment < hits; ++segment) {
    for (int head = 0; head < heads; ++head) {
      slots.push_back({grant.slots[static_cast<std::size_t>(head * kv.num_segments + segment)],
                       {config.first_head + head, keys[static_cast<std::size_t>(segment)]}});
    }
  }
  const auto tables = read_tables(*io, file_of(grant), slots);
  const auto bad = std::ranges::find_if(tables, [](const auto& table) { return !table; });
  const auto at = [heads](auto place) {
    return HeadSegment{static_cast<int>(place) % heads, static_cast<int>(place) / heads};
  };
  kv.hit_segments = at(bad - tables.begin()).segment;
  for (int i = 0; i < kv.hit_segments * heads; ++i) {
    kv.outsized->reuse(at(i), *tables[static_cast<std::size_t>(i)]);
  }
  if (bad == tables.end() || !refutes_slot(bad->error())) return Ok{};
  const HeadSegment refuted = at(bad - tables.begin());
  return connection.tell(Refute{kv.sequence, refuted.head, refuted.segment});
}

std::string_view nvme_state_name(NvmeState state) {
  constexpr std::array<std::string_view, 4> kNames = {"off", "online", "read-only", "offline"};
  return kNames[static_cast<std::size_t>(state)];
}

// ---- requests ---------------------------------------------------------------------------------

KvStore::KvStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<KvStore>> KvStore::connect(const StoreClientConfig& config,
                                                  kernels::Device& device) {
  FT_CHECK(config.shape.num_kv_heads > 0 && config.first_head >= 0, config.first_head,
           config.shape.num_kv_heads);
  FT_CHECK(config.first_head + config.shape.num_kv_heads <= config.total_kv_heads,
           config.first_head, config.shape.num_kv_heads, config.total_kv_heads);
  const auto connect_once = [&]() -> Result<std::unique_ptr<Impl>> {
    FT_ASSIGN_OR_RETURN(FileDescriptor socket, connect_to(config.socket_path, config.timeout));
    auto impl = std::make_unique<Impl>(config, device, std::move(socket));
    FT_RETURN_IF_ERROR(impl->greet());
    return impl;
  };
  const auto deadline = std::chrono::steady_clock::now() + config.patience;
  auto impl = connect_once();
  const auto is_absent = [&] { return !impl && impl.error().code == ErrorCode::kUnavailable; };
  if (is_absent() && config.patience.count() > 0) {
    log().info("{}: asking again for up to {} ms", impl.error().message, config.patience.count());
  }
  while (is_absent() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(kConnectPause);
    impl = connect_once();
  }
  if (!impl) return impl.error();
  (*impl)->prepare_device();
  return std::unique_ptr<KvStore>(new KvStore(std::move(*impl)));
}

KvStore::~KvStore() {
  impl_->guard.reset();
  impl_->mapping.reset();  // before the goodbye: it says that this is done
  if (auto told = impl_->connection.tell(Goodbye{}); !told) {
    log().debug("goodbye to the KV store: {}", told.error().message);
  }
}

Result<Reservation> KvStore::reserve(SequenceId sequence, std::span<const PrefixKey> keys,
                                     int num_segments) {
  if (num_segments > kMaxSegments) {  // the store would take it for a broken message
    return Error{ErrorCode::kInvalidArgument, std::to_string(num_segments) +
                                                  " segments can never fit: a sequence has " +
                                                  std::to_string(kMaxSegments) + " at most, of " +
                                                  std::to_string(kSegmentTokens) + " tokens"};
  }
  FileDescriptor file;
  FT_ASSIGN_OR_RETURN(const Grant grant,
                      impl_->connection.ask_for<Grant>(
                          Reserve{sequence, num_segments, {keys.begin(), keys.end()}}, &file));
  if (grant.slots.empty()) return impl_->translate(sequence, grant, num_segments);
  if (Status status = impl_->have_key(); !status) {
    FT_RETURN_IF_ERROR(release(sequence));
    return status.error();
  }
  try {
    FT_ASSIGN_OR_RETURN(Reservation kv,
                        impl_->translate_outsized(sequence, grant, num_segments, std::move(file)));
    FT_RETURN_IF_ERROR(impl_->read_prefix(kv, grant, keys));
    return kv;
  } catch (const std::exception& failure) {
    FT_RETURN_IF_ERROR(release(sequence));
    return Error{ErrorCode::kExhausted,
                 std::string("no memory or file descriptor for what a sequence on NVMe needs: ") +
                     failure.what()};
  }
}

Status KvStore::use(Reservation& kv, int hit_segments) {
  FT_CHECK(hit_segments >= 0 && hit_segments <= kv.hit_segments, hit_segments, kv.hit_segments);
  kv.hit_segments = hit_segments;
  if (std::ranges::max(kv.head_hits) == hit_segments) return Ok{};
  FT_ASSIGN_OR_RETURN(const Grant grant,
                      impl_->connection.ask_for<Grant>(Use{kv.sequence, hit_segments}));
  if (kv.outsized) {
    if (grant.slots.size() != kv.head_hits.size() * static_cast<std::size_t>(kv.num_segments)) {
      return granted_otherwise();
    }
    kv.outsized->use(hit_segments, impl_->offsets_of(grant));
    return Ok{};
  }
  FT_ASSIGN_OR_RETURN(kv, impl_->translate(kv.sequence, grant, kv.num_segments));
  return Ok{};
}

Status KvStore::publish_written(Reservation& kv) {
  for (auto& [segment, key, digests, seals] : kv.outsized->take_published()) {
    FT_RETURN_IF_ERROR(impl_->connection.tell(
        Publish{kv.sequence, segment, key, std::move(digests), std::move(seals)}));
  }
  for (const auto& [head, segment] : kv.outsized->take_refuted()) {
    FT_RETURN_IF_ERROR(impl_->connection.tell(Refute{kv.sequence, head, segment}));
  }
  return Ok{};
}

Status KvStore::commit(SequenceId sequence, int segment, const PrefixKey& key) {
  return impl_->connection.tell(Commit{sequence, segment, key});
}

Status KvStore::note_prefill(const PrefillTimes& times) { return impl_->connection.tell(times); }

Status KvStore::distrust(SequenceId sequence) { return impl_->connection.tell(Distrust{sequence}); }

Status KvStore::release(SequenceId sequence) { return impl_->connection.tell(Release{sequence}); }

Result<StoreStat> KvStore::stat() {
  FT_RETURN_IF_ERROR(impl_->tell_faults());
  return impl_->connection.ask_for<StoreStat>(StatRequest{});
}

std::int64_t KvStore::slabs_per_head() const { return impl_->mapping->num_slabs(); }

// ---- ops --------------------------------------------------------------------------------------

void KvStore::fetch(int layer, int num_layers, const kernels::SequenceKv* sequences,
                    const kernels::FetchList* fetches, int rows, kernels::Stream& stream) {
  impl_->touch_arena(stream, [&] {
    impl_->device.gather({sequences, fetches, rows, layer, num_layers}, stream);
  });
  impl_->fetched[static_cast<std::size_t>(layer)]->record(stream);
  std::fill_n(impl_->fetched_with.begin() + layer, num_layers, layer);
}

void KvStore::wait(int layer, kernels::Stream& stream) {
  // A join that isn't needed would keep kernels of a recorded step from overlapping; and the event
  // may be of a step that was not recorded, where this one is.
  if (impl_->fetched_with[static_cast<std::size_t>(layer)] != layer) return;
  impl_->fetched[static_cast<std::size_t>(layer)]->wait(stream);
}

bool KvStore::fetched(int layer) const {
  return impl_->fetched[static_cast<std::size_t>(layer)]->done();
}

void KvStore::pack(const kernels::PackBlocksArgs& args, kernels::Stream& stream) {
  impl_->touch_arena(stream, [&] { impl_->device.pack_blocks(args, stream); });
}

void KvStore::unpack(const kernels::UnpackBlocksArgs& args, kernels::Stream& stream) {
  impl_->touch_arena(stream, [&] { impl_->device.unpack_blocks(args, stream); });
}

void KvStore::streamed_attention(const kernels::DecodeAttentionArgs& args,
                                 kernels::Stream& stream) {
  impl_->touch_arena(stream, [&] { impl_->device.streamed_attention(args, stream); });
}

void KvStore::write_through(const kernels::WriteThroughArgs& args, kernels::Stream& stream) {
  impl_->touch_arena(stream, [&] { impl_->device.write_through(args, stream); });
}

}  // namespace foretoken::kvstore
