#include "kvstore/internal/nvme_tier.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "common/check.h"
#include "common/ids.h"
#include "common/log.h"
#include "kernels/checksum.h"
#include "kvstore/internal/sealing_device.h"

namespace foretoken::kvstore {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{64} << 20;  // in flight at most (guessed) ...
constexpr std::size_t kMinBuffers = 4;                       // ... but for large slabs
constexpr std::size_t kMaxBuffers = 32;                      // more add no speed (guessed)
constexpr std::chrono::seconds kStallLimit{1};       // without any end, of what is under way
constexpr std::chrono::milliseconds kLateLook{100};  // who looks at that is later than this

// From one slab's check to the next: of 4 MiB slabs 100 GiB in two hours, for a thousandth of a
// core.
constexpr std::chrono::milliseconds kScrubPause{250};

// A slot of either kind of file, and a header.
std::size_t buffer_stride(const kernels::KvShape& slab) {
  return slot_bytes(slab, /*is_sealed=*/true) + kSectorBytes;
}

std::size_t num_buffers(const kernels::KvShape& slab) {
  return std::clamp(kBufferBytes / buffer_stride(slab), kMinBuffers, kMaxBuffers);
}

std::size_t checksum_bytes(const kernels::KvShape& shape) {
  return std::size_t{8} * kSegmentBlocks * static_cast<std::size_t>(shape.num_layers);
}

}  // namespace

Result<std::unique_ptr<NvmeTier>> NvmeTier::open(const NvmeFile& file,
                                                 const NvmeOpening& opening) try {
  const TimePoint begin = std::chrono::steady_clock::now();
  IoMemory memory = make_memory(opening.model);
  auto device = make_sealing_device(make_block_device(file.fd(), memory, depth(opening.model)),
                                    opening.cipher);
  FT_ASSIGN_OR_RETURN(const NvmeContents contents, open_contents(*device, memory.bytes(), opening));
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
  log().info("NVMe tier: {} slabs kept, room for {}; {}; opened in {:.0f} ms",
             contents.slabs.size(), contents.superblock.geometry.num_slots,
             opening.cipher ? cipher_name(opening.cipher->kind()) : "not encrypted", took.count());
  if (!contents.unreadable.empty()) {
    log().warn(
        "NVMe tier: {} slots are left out, the first of them {}: the disk can't read their "
        "headers; `foretoken kv gc` gives them back",
        contents.unreadable.size(), raw(contents.unreadable.front()));
  }
  return std::make_unique<NvmeTier>(std::move(memory), std::move(device), contents, opening.cipher);
} catch (const Exception& failure) {
  return failure.error();
} catch (const std::exception& failure) {
  return Error{ErrorCode::kExhausted,
               std::string("no memory or thread for the NVMe tier: ") + failure.what()};
}

IoMemory NvmeTier::make_memory(const ModelIdentity& model) { return IoMemory(memory_bytes(model)); }

std::size_t NvmeTier::memory_bytes(const ModelIdentity& model) {
  const kernels::KvShape slab = model.slab_shape();
  return num_buffers(slab) * buffer_stride(slab);
}

int NvmeTier::depth(const ModelIdentity& model) {
  return static_cast<int>(num_buffers(model.slab_shape()));
}

NvmeTier::NvmeTier(IoMemory memory, std::unique_ptr<BlockDevice> device,
                   const NvmeContents& contents, std::shared_ptr<const KvCipher> cipher)
    : superblock_(contents.superblock),
      shape_(superblock_.model.slab_shape()),
      memory_(std::move(memory)),
      transfers_(num_buffers(shape_)),
      device_(std::move(device)),
      cipher_(std::move(cipher)),
      index_(superblock_.geometry.num_slots, contents.slabs, contents.unreadable),
      is_blank_(superblock_.geometry.num_slots,
                contents.slabs.empty() && contents.bad_headers == 0),
      next_number_(contents.last_number + 1) {
  FT_CHECK(memory_.bytes().size() >= transfers_.size() * buffer_stride(shape_));
  stat_.checksum_failures = contents.bad_headers;
  stat_.io_errors = static_cast<std::int64_t>(contents.unreadable.size());
}

// ---- what there is ----------------------------------------------------------------------------

bool NvmeTier::has(const SlabName& name, TimePoint now) const {
  return health_.may_read(now) && index_.find(name).has_value();
}

NvmeStat NvmeTier::stat() const {
  NvmeStat stat = stat_;
  stat.state = health_.state();
  stat.slabs_total = index_.num_usable();
  stat.slabs_held = index_.num_held();
  stat.evictions = index_.num_evictions();
  return stat;
}

std::optional<TimePoint> NvmeTier::deadline() const {
  if (const auto stalled = stalled_at()) return stalled;
  if (!is_idle() || health_.state() == NvmeState::kOffline || index_.num_held() == 0) {
    return std::nullopt;
  }
  return next_scrub_;
}

// A load that waits while all buffers are out with what was given up is as stalled as they are.
std::optional<TimePoint> NvmeTier::stalled_at() const {
  if (num_in_flight_ == num_given_up_ && waiting_.empty()) return std::nullopt;
  return last_progress_ + kStallLimit;
}

// ---- buffers ----------------------------------------------------------------------------------

std::span<std::byte> NvmeTier::buffer(std::size_t index) const {
  const std::size_t stride = buffer_stride(shape_);
  return memory_.bytes().subspan(index * stride, stride);
}

std::optional<std::size_t> NvmeTier::free_buffer() const {
  const auto found =
      std::ranges::find_if(transfers_, [](const auto& transfer) { return !transfer.has_value(); });
  if (found == transfers_.end()) return std::nullopt;
  return static_cast<std::size_t>(found - transfers_.begin());
}

void NvmeTier::occupy(std::size_t index, const Transfer& transfer, TimePoint now) {
  if (num_in_flight_++ == num_given_up_) last_progress_ = now;
  transfers_[index] = transfer;
  transfers_[index]->slab.bytes = buffer(index).first(slot_size());
  transfers_[index]->slab.slab = &shape_;
}

void NvmeTier::start(std::size_t index, const Transfer& transfer, TimePoint now) {
  occupy(index, transfer, now);
  submit(index);
}

// What its transfer still has to move.
void NvmeTier::submit(std::size_t index) {
  Transfer& transfer = *transfers_[index];
  const bool is_header = NvmeTier::is_header(transfer.kind);
  const NvmeGeometry& geometry = superblock_.geometry;
  const std::uint64_t offset =
      is_header ? geometry.header_offset(transfer.slot) : geometry.slab_offset(transfer.slot);
  const std::size_t begin = (is_header ? slot_size() : 0) + transfer.moved;
  device_->submit({reads(transfer.kind) ? IoDirection::kRead : IoDirection::kWrite,
                   offset + transfer.moved, buffer(index).data() + begin,
                   bytes_of(transfer) - transfer.moved, index,
                   is_header ? nullptr : &transfer.slab});
}

std::size_t NvmeTier::bytes_of(const Transfer& transfer) const {
  return is_header(transfer.kind) ? kSectorBytes : slot_size();
}

void NvmeTier::end(std::size_t index) {
  if (transfers_[index]->is_given_up) --num_given_up_;
  --num_in_flight_;
  transfers_[index].reset();
}

// The copy and its proof in one pass. Padding is neither checked nor copied.
bool NvmeTier::copy_verified(std::byte* to, const std::byte* from) const {
  const std::size_t table = shape_.slab_payload_bytes();
  std::memcpy(to + table, from + table, checksum_bytes(shape_));
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    for (int block = 0; block < kSegmentBlocks; ++block) {
      const std::size_t offset = kernels::slab_block_offset(shape_, layer, block);
      std::uint64_t due = 0;
      std::memcpy(&due, to + kernels::slab_checksum_offset(shape_, layer, block), sizeof due);
      if (kernels::copy_with_checksum(to + offset, from + offset, shape_.block_bytes(), layer,
                                      block) != due) {
        return false;
      }
    }
  }
  return true;
}

std::uint64_t NvmeTier::digest_of(const std::byte* slab) const {
  return slab_digest({slab + shape_.slab_payload_bytes(), checksum_bytes(shape_)});
}

// ---- writing ----------------------------------------------------------------------------------

// Three quarters of the buffers at most: the others are there for reads.
bool NvmeTier::can_store(TimePoint now) const {
  return waiting_.empty() && health_.may_write(now) &&
         index_.num_promised() < transfers_.size() * 3 / 4 && index_.num_available() > 0 &&
         free_buffer().has_value();
}

bool NvmeTier::store(const SlabName& name, const std::byte* slab, TimePoint now,
                     const std::optional<PrefixKey>& previous) {
  FT_CHECK(can_store(now) && !knows(name));
  const std::size_t index = *free_buffer();
  std::byte* copy = buffer(index).data();
  if (!copy_verified(copy, slab)) {
    ++stat_.host_checksum_failures;
    return false;
  }
  const SlotIndex slot = index_.claim(1).front();
  index_.promise(slot, name);
  place(name, previous);
  start(index,
        {.kind = Kind::kStoreSlab,
         .name = name,
         .slot = slot,
         .digest = digest_of(copy),
         .previous = previous},
        now);
  return true;
}

// The slab is in the file; its header makes it count. Or no slab is: no header.
void NvmeTier::write_header(std::size_t index) {
  Transfer& transfer = *transfers_[index];
  const Sector header = buffer(index).subspan(slot_size()).first<kSectorBytes>();
  if (transfer.kind == Kind::kBlankHeader) {
    std::ranges::fill(header, std::byte{0});
    return submit(index);
  }
  transfer.kind = Kind::kStoreHeader;
  transfer.moved = 0;
  is_blank_[raw(transfer.slot)] = false;
  const std::uint64_t number = transfer.number ? *transfer.number : next_number_++;
  encode(SlotHeader{transfer.slot, superblock_.file_id, superblock_.generation, number,
                    transfer.digest, transfer.name, transfer.slab.seal, transfer.previous},
         header, cipher_.get());
  submit(index);
}

void NvmeTier::finish_store(std::size_t index) {
  const Transfer& transfer = *transfers_[index];
  if (index_.is_promised(transfer.slot, transfer.name)) {  // else it was refuted meanwhile
    index_.hold(transfer.slot, transfer.digest, transfer.slab.seal, transfer.previous);
    ++stat_.slabs_written;
  }
  index_.unpin(transfer.slot);
  end(index);
}

void NvmeTier::note_use(std::span<const PrefixKey> keys) {
  const auto is_here = [this](const PrefixKey& key) { return index_.find({0, key}).has_value(); };
  const auto end = std::ranges::find_if_not(keys, is_here);
  if (end != keys.begin()) index_.note_use({0, *std::prev(end)}, next_number_++);
}

// Their headers as they are, but for the number and the generation.
void NvmeTier::save_uses(TimePoint now) {
  for (const auto& [slab, number] : index_.take_uses()) {
    index_.pin(slab.entry.slot);
    headers_.push_back({.kind = Kind::kStoreHeader,
                        .name = slab.name,
                        .slot = slab.entry.slot,
                        .digest = slab.entry.digest,
                        .previous = slab.entry.previous,
                        .number = number,
                        .slab = {{}, slab.entry.seal}});
  }
  start_headers(now);
}

// All heads of a segment stand together, before those of the segment that comes before it. Ranks
// begin in any order: where head 0 stands, the others do.
void NvmeTier::place(const SlabName& name, const std::optional<PrefixKey>& previous) {
  if (previous) index_.place_before(name, {0, *previous});
  if (name.head > 0) return index_.place_behind(name, {0, name.key});
  for (int other = 1; other < superblock_.model.total_kv_heads; ++other) {
    index_.place_behind({other, name.key}, name);
  }
}

// ---- lending ----------------------------------------------------------------------------------

std::optional<std::vector<SlotIndex>> NvmeTier::lend(std::size_t count, TimePoint now) {
  if (count > index_.num_available()) return std::nullopt;  // no slab is given up in vain
  std::vector<SlotIndex> slots = index_.claim(count);
  for (const SlotIndex slot : slots) blank(slot);
  start_headers(now);
  return slots;
}

SlotIndex NvmeTier::borrow(const SlabName& name) {
  const auto entry = index_.find(name);
  FT_CHECK(entry.has_value());
  index_.pin(entry->slot);
  return entry->slot;
}

void NvmeTier::take_back(std::span<const SlotIndex> slots) {
  for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) {
    if (const auto name = index_.name_of(*slot)) index_.touch(*name);
    index_.unpin(*slot);
  }
}

void NvmeTier::refute(SlotIndex slot, TimePoint now) {
  const auto name = index_.name_of(slot);
  if (!name) return;
  log().warn("NVMe tier: slot {} fails its checksum; its slab counts as absent", raw(slot));
  index_.erase(*name);
  std::erase_if(headers_, [&](const Transfer& header) {
    if (header.slot != slot || header.kind != Kind::kStoreHeader) return false;
    let_go(header);
    return true;
  });
  blank(slot);
  start_headers(now);
}

// A header that its slot's runs no longer bear out: who opens the file next would find it, and its
// table behind the runs, both whole.
void NvmeTier::blank(SlotIndex slot) {
  if (is_blank_[raw(slot)]) return;
  index_.pin(slot);
  headers_.push_back({.kind = Kind::kBlankHeader, .name = {}, .slot = slot});
}

void NvmeTier::finish_blank(std::size_t index) {
  const SlotIndex slot = transfers_[index]->slot;
  is_blank_[raw(slot)] = true;
  index_.unpin(slot);
  end(index);
}

// ---- publishing what was lent -------------------------------------------------------------------

void NvmeTier::publish(const SlabName& name, const Filled& filled, TimePoint now) {
  if (knows(name) || index_.name_of(filled.slot)) return;
  index_.promise(filled.slot, name);
  index_.pin(filled.slot);
  headers_.push_back({.kind = Kind::kStoreHeader,
                      .name = name,
                      .slot = filled.slot,
                      .digest = filled.digest,
                      .previous = filled.previous,
                      .slab = {{}, filled.seal}});
  start_headers(now);
}

// What a disk does not take now is not published: its holder keeps it, nobody else finds it. Of one
// slot a header is written after the other.
void NvmeTier::start_headers(TimePoint now) {
  if (!health_.may_write(now)) {
    for (const Transfer& transfer : headers_) let_go(transfer);
    headers_.clear();
  }
  while (waiting_.empty()) {
    const auto index = free_buffer();
    const auto next = std::ranges::find_if_not(
        headers_, [this](const Transfer& header) { return is_moving(header.slot); });
    if (!index || next == headers_.end()) return;
    occupy(*index, *next, now);
    headers_.erase(next);
    write_header(*index);
  }
}

bool NvmeTier::is_moving(SlotIndex slot) const {
  return std::ranges::any_of(
      transfers_, [slot](const auto& transfer) { return transfer && transfer->slot == slot; });
}

// ---- reading ----------------------------------------------------------------------------------

void NvmeTier::load(const SlabName& name, std::byte* to, TimePoint now) {
  const auto entry = index_.find(name);
  FT_CHECK(entry.has_value());
  index_.pin(entry->slot);
  waiting_.push_back({.kind = Kind::kLoad,
                      .name = name,
                      .slot = entry->slot,
                      .to = to,
                      .digest = entry->digest,
                      .slab = {{}, entry->seal}});
  start_loads(now);
}

void NvmeTier::start_loads(TimePoint now) {
  while (!waiting_.empty()) {
    const auto index = free_buffer();
    if (!index) return;
    start(*index, waiting_.front(), now);
    waiting_.pop_front();
  }
}

NvmeTier::Loaded NvmeTier::finish_load(std::size_t index) {
  const Transfer transfer = *transfers_[index];
  const std::byte* slab = buffer(index).data();
  const bool is_whole = digest_of(slab) == transfer.digest && copy_verified(transfer.to, slab);
  if (is_whole) ++stat_.slabs_read;
  end_read(transfer, is_whole);
  end(index);
  return {transfer.name, is_whole};
}

// A slab that fails is forgotten: its slot is written anew.
void NvmeTier::end_read(const Transfer& transfer, bool is_whole) {
  index_.unpin(transfer.slot);
  if (is_whole) return;
  ++stat_.checksum_failures;
  forget(transfer);
  log().warn("NVMe tier: slot {} fails its checksum; its slab counts as absent",
             raw(transfer.slot));
}

// What the slot held may have been refuted meanwhile, and have come anew in another slot.
void NvmeTier::forget(const Transfer& read) {
  if (index_.name_of(read.slot) == read.name) index_.erase(read.name);
}

// ---- checking ---------------------------------------------------------------------------------

bool NvmeTier::may_scrub(TimePoint now) const {
  return is_idle() && now >= next_scrub_ && health_.state() != NvmeState::kOffline &&
         index_.num_held() > 0;
}

void NvmeTier::start_scrub(TimePoint now) {
  const auto held = index_.held_from(scrubbed_);
  index_.pin(held->entry.slot);
  scrubbed_ = SlotIndex{raw(held->entry.slot) + 1};
  next_scrub_ = now + kScrubPause;
  start(*free_buffer(),
        {.kind = Kind::kScrub,
         .name = held->name,
         .slot = held->entry.slot,
         .digest = held->entry.digest,
         .slab = {{}, held->entry.seal}},
        now);
}

void NvmeTier::finish_scrub(std::size_t index) {
  const Transfer transfer = *transfers_[index];
  end_read(transfer, is_whole(buffer(index).data(), transfer.digest));
  end(index);
}

bool NvmeTier::is_whole(const std::byte* slab, std::uint64_t digest) const {
  if (digest_of(slab) != digest) return false;
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    for (int block = 0; block < kSegmentBlocks; ++block) {
      std::uint64_t due = 0;
      std::memcpy(&due, slab + kernels::slab_checksum_offset(shape_, layer, block), sizeof due);
      const std::byte* data = slab + kernels::slab_block_offset(shape_, layer, block);
      if (kernels::block_checksum(data, shape_.block_bytes(), layer, block) != due) return false;
    }
  }
  return true;
}

// ---- giving up --------------------------------------------------------------------------------

// Loads end now, as failed, and their names stay; what is in flight keeps its buffer and its slot
// until it ends.
void NvmeTier::give_up_all(std::vector<Loaded>& loaded) {
  for (const Transfer& transfer : waiting_) {
    index_.unpin(transfer.slot);
    loaded.push_back({transfer.name, false});
  }
  waiting_.clear();
  for (const Transfer& transfer : headers_) let_go(transfer);
  headers_.clear();
  for (auto& transfer : transfers_) {
    if (!transfer || transfer->is_given_up) continue;
    if (transfer->kind == Kind::kLoad) loaded.push_back({transfer->name, false});
    transfer->is_given_up = true;
    ++num_given_up_;
  }
}

// The slot of a transfer that came to nothing.
void NvmeTier::let_go(const Transfer& transfer) {
  const bool is_store = !reads(transfer.kind) && transfer.kind != Kind::kBlankHeader;
  if (is_store && index_.is_promised(transfer.slot, transfer.name)) index_.erase(transfer.name);
  index_.unpin(transfer.slot);
}

// ---- events -----------------------------------------------------------------------------------

std::vector<NvmeTier::Loaded> NvmeTier::advance(TimePoint now) {
  std::vector<Loaded> loaded;
  note_look(now);
  for (IoDone& done : device_->completed()) {
    last_progress_ = now;
    ended_.push_back(std::move(done));
  }
  if (!ended_.empty()) {
    const IoDone done = std::move(ended_.front());
    ended_.pop_front();
    on_ended(done, now, loaded);
  } else if (const auto due = stalled_at(); due && now >= *due) {
    on_stalled(now, loaded);
  }
  start_loads(now);
  start_headers(now);
  if (may_scrub(now)) start_scrub(now);
  return loaded;
}

// Time in which nobody looked is not the disk's: what is sealed or opened on its way moves on when
// somebody does.
void NvmeTier::note_look(TimePoint now) {
  const bool was_away = now - std::exchange(last_look_, now) > kStallLimit + kLateLook;
  if (was_away && num_in_flight_ > num_given_up_) last_progress_ = now;
}

void NvmeTier::on_stalled(TimePoint now, std::vector<Loaded>& loaded) {
  log().warn("NVMe tier: the disk has not answered for {} ms",
             std::chrono::milliseconds(kStallLimit).count());
  ++stat_.io_errors;
  health_.on_stalled(now);
  give_up_all(loaded);
}

void NvmeTier::on_ended(const IoDone& done, TimePoint now, std::vector<Loaded>& loaded) {
  Transfer& transfer = *transfers_[done.tag];
  if (transfer.is_given_up) {
    let_go(transfer);
    return end(done.tag);
  }
  if (!done.bytes && done.bytes.error().code == ErrorCode::kCorrupt) {
    return on_sealed_otherwise(done.tag, loaded);
  }
  if (!done.bytes) return on_failed(done.tag, done.bytes.error(), now, loaded);
  const std::size_t moved = *done.bytes;
  if (transfer.kind == Kind::kLoad) stat_.bytes_read += static_cast<std::int64_t>(moved);
  if (transfer.kind == Kind::kStoreSlab) stat_.bytes_written += static_cast<std::int64_t>(moved);
  transfer.moved += moved;
  if (transfer.moved == bytes_of(transfer)) return on_moved(done.tag, now, loaded);
  transfer.moved = transfer.moved / kSectorBytes * kSectorBytes;
  if (moved >= kSectorBytes) return submit(done.tag);  // the rest of it
  on_failed(done.tag, {ErrorCode::kIo, "the file ends early"}, now, loaded);
}

void NvmeTier::on_moved(std::size_t index, TimePoint now, std::vector<Loaded>& loaded) {
  switch (transfers_[index]->kind) {
    case Kind::kLoad:
      health_.on_read(now);
      return loaded.push_back(finish_load(index));
    case Kind::kScrub:
      health_.on_read(now);
      return finish_scrub(index);
    case Kind::kStoreSlab:
      return write_header(index);
    case Kind::kStoreHeader:
      health_.on_written(now);
      return finish_store(index);
    case Kind::kBlankHeader:
      health_.on_written(now);
      return finish_blank(index);
  }
}

// The disk works; what it holds is not what was written.
void NvmeTier::on_sealed_otherwise(std::size_t index, std::vector<Loaded>& loaded) {
  const Transfer transfer = *transfers_[index];
  end_read(transfer, /*is_whole=*/false);
  end(index);
  if (transfer.kind == Kind::kLoad) loaded.push_back({transfer.name, false});
}

void NvmeTier::on_failed(std::size_t index, const Error& error, TimePoint now,
                         std::vector<Loaded>& loaded) {
  const Transfer transfer = *transfers_[index];
  end(index);
  let_go(transfer);
  if (error.code == ErrorCode::kExhausted) {
    health_.on_full(now);
  } else {
    ++stat_.io_errors;
    log().warn("NVMe tier: slot {}: {}", raw(transfer.slot), error.message);
    health_.on_failed(now);
  }
  if (reads(transfer.kind)) forget(transfer);
  if (transfer.kind == Kind::kLoad) loaded.push_back({transfer.name, false});
  if (health_.state() == NvmeState::kOffline) give_up_all(loaded);
}

}  // namespace foretoken::kvstore
