#include "kvstore/internal/slot_table.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>

#include "common/ids.h"

namespace foretoken::kvstore {

SlotTable::SlotTable(const kernels::KvShape& shape, bool is_sealed)
    : checksums(static_cast<std::size_t>(shape.num_layers) * kSegmentBlocks),
      seals(is_sealed ? static_cast<std::size_t>(shape.num_layers) : 0),
      seals_at(shape.slab_bytes() - shape.slab_payload_bytes()) {}

std::span<std::uint64_t> SlotTable::checksums_of(int layer) {
  return std::span(checksums).subspan(static_cast<std::size_t>(layer) * kSegmentBlocks,
                                      kSegmentBlocks);
}
std::span<const std::uint64_t> SlotTable::checksums_of(int layer) const {
  return std::span(checksums).subspan(static_cast<std::size_t>(layer) * kSegmentBlocks,
                                      kSegmentBlocks);
}

std::uint64_t SlotTable::digest() const { return slab_digest(std::as_bytes(std::span(checksums))); }

std::size_t SlotTable::bytes(const kernels::KvShape& shape, bool is_sealed) {
  return slot_bytes(shape, is_sealed) - shape.slab_payload_bytes();
}

void SlotTable::encode(std::span<std::byte> to) const {
  std::ranges::fill(to, std::byte{0});
  std::ranges::copy(std::as_bytes(std::span(checksums)), to.begin());
  std::ranges::copy(std::as_bytes(std::span(seals)), to.subspan(seals_at).begin());
}

void SlotTable::decode(std::span<const std::byte> from) {
  std::memcpy(checksums.data(), from.data(), checksums.size() * sizeof(std::uint64_t));
  const auto sealed = std::as_writable_bytes(std::span(seals));
  std::ranges::copy(from.subspan(seals_at, sealed.size()), sealed.begin());
}

std::uint64_t SlotFile::slab_offset(SlotIndex slot) const {
  return slots_offset + slot_bytes(shape, cipher != nullptr) * std::uint64_t{raw(slot)};
}

namespace {

// A slot's header is read first, as it says what its table must be.
class TableReader final : public RunIo::Owner {
 public:
  TableReader(RunIo& io, const SlotFile& file, std::span<const NamedSlot> slots)
      : io_(io),
        file_(file),
        slots_(slots),
        headers_(slots.size()),
        tables_(slots.size(), Error{ErrorCode::kUnavailable, "KV on NVMe: the disk has failed"}) {
    for (std::size_t i = 0; i < slots.size(); ++i) to_read_.push_back(i);
  }
  ~TableReader() override { io_.forget(*this); }
  TableReader(const TableReader&) = delete;
  TableReader& operator=(const TableReader&) = delete;

  std::vector<Result<SlotTable>> read() {
    while (num_left_ > 0) {
      while (!to_read_.empty() && io_.can_read()) {
        start(to_read_.front());
        to_read_.pop_front();
      }
      if (!io_.is_busy()) break;  // the disk has failed
      io_.wait();
    }
    return std::move(tables_);
  }

  void on_read(RunIndex run, const Result<std::span<const std::byte>>& bytes) override {
    const auto i = static_cast<std::size_t>(run);
    if (bytes && !headers_[i]) {
      headers_[i] = header_of(slots_[i], *bytes);
      if (headers_[i]) return to_read_.push_back(i);
    }
    tables_[i] = bytes ? table_of(i, *bytes) : bytes.error();
    if (bytes && !tables_[i]) io_.count_corrupt();
    --num_left_;
  }
  void on_written(RunIndex /*run*/, const Result<Seal>& /*written*/) override {}

 private:
  void start(std::size_t i) {
    const RunIndex name{static_cast<std::uint32_t>(i)};
    const SlotIndex slot = slots_[i].slot;
    if (!headers_[i]) {
      return io_.read(*this, name, {NvmeGeometry{}.header_offset(slot), kSectorBytes}, {});
    }
    io_.read(*this, name,
             {file_.slab_offset(slot) + file_.shape.slab_payload_bytes(),
              SlotTable::bytes(file_.shape, is_sealed())},
             headers_[i]->seal);
  }

  std::optional<SlotHeader> header_of(const NamedSlot& named,
                                      std::span<const std::byte> bytes) const {
    const auto header =
        decode_slot_header(bytes.first<kSectorBytes>(), named.slot, file_.file_id, file_.cipher);
    if (!header || !*header || (*header)->name != named.name) return std::nullopt;
    return **header;
  }

  Result<SlotTable> table_of(std::size_t i, std::span<const std::byte> bytes) const {
    SlotTable table(file_.shape, is_sealed());
    if (headers_[i]) table.decode(bytes);
    if (headers_[i] && table.digest() == headers_[i]->digest) return table;
    return Error{ErrorCode::kCorrupt, "KV on NVMe: a slot does not hold what it should"};
  }

  bool is_sealed() const { return file_.cipher != nullptr; }

  RunIo& io_;
  const SlotFile& file_;
  const std::span<const NamedSlot> slots_;
  std::vector<std::optional<SlotHeader>> headers_;
  std::vector<Result<SlotTable>> tables_;
  std::deque<std::size_t> to_read_;
  std::size_t num_left_ = slots_.size();
};

}  // namespace

std::vector<Result<SlotTable>> read_tables(RunIo& io, const SlotFile& file,
                                           std::span<const NamedSlot> slots) {
  return TableReader(io, file, slots).read();
}

bool refutes_slot(const Error& error) {
  return error.code == ErrorCode::kCorrupt || error.code == ErrorCode::kIo;
}

}  // namespace foretoken::kvstore
