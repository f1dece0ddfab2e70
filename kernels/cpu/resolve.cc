// resolve: which blocks get which slots (device.h, ResolveArgs), one (layer, head) at a time.
#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/kept_blocks.h"

namespace foretoken::kernels {
namespace {

// The blocks a step needs, each once, the most wanted first. Reused from head to head: a block is
// a member if its stamp is the head's.
class NeededBlocks {
 public:
  explicit NeededBlocks(int max_blocks) : stamps_(static_cast<std::size_t>(max_blocks), 0) {}

  void begin(int limit) {
    ++stamp_;
    limit_ = static_cast<std::size_t>(limit);
    blocks_.clear();
  }
  void add(int block) {
    if (contains(block) || blocks_.size() == limit_) return;
    stamps_[static_cast<std::size_t>(block)] = stamp_;
    blocks_.push_back(block);
  }
  bool contains(int block) const { return stamps_[static_cast<std::size_t>(block)] == stamp_; }
  std::span<const int> blocks() const { return blocks_; }

 private:
  std::vector<std::uint32_t> stamps_;
  std::uint32_t stamp_ = 0;
  std::size_t limit_ = 0;
  std::vector<int> blocks_;
};

// The tables of one (layer, head).
struct HeadTables {
  std::span<std::int32_t> block_to_slot;
  std::span<std::int32_t> slot_to_block;
  FetchEntry* entries;
  std::int32_t* count;
  std::int32_t max_entries;

  HeadTables(const SequenceKv& kv, const FetchList& fetches, int layer, int head) {
    const auto row = static_cast<std::size_t>(layer * kv.shape.num_kv_heads + head);
    const auto num_blocks = static_cast<std::size_t>(kv.max_blocks);
    const auto num_slots = static_cast<std::size_t>(kv.num_slots);
    block_to_slot = {kv.block_to_slot + row * num_blocks, num_blocks};
    slot_to_block = {kv.slot_to_block + row * num_slots, num_slots};
    entries = fetches.entries + row * static_cast<std::size_t>(fetches.max_entries);
    count = fetches.counts + row;
    max_entries = fetches.max_entries;
  }
  std::int32_t& slot(int block) const { return block_to_slot[static_cast<std::size_t>(block)]; }
  std::int32_t& block(int slot) const { return slot_to_block[static_cast<std::size_t>(slot)]; }
};

// Hands out slots for absent blocks: free ones from the lowest up, then those of victims. Victims
// are looked up only when the free ones are gone, which in most steps of most heads is never.
class SlotSource {
 public:
  SlotSource(const HeadTables& tables, const NeededBlocks& needed, int usable_slots,
             std::vector<int>& victims)
      : tables_(tables), needed_(needed), usable_slots_(usable_slots), victims_(victims) {
    victims_.clear();
  }

  // REQUIRES: fewer blocks are needed than there are usable slots, so that one is left.
  int take() {
    for (; next_free_ < usable_slots_; ++next_free_) {
      if (tables_.block(next_free_) == kAbsent) return next_free_++;
    }
    if (victims_.empty()) find_victims();
    FT_CHECK(next_victim_ < victims_.size(), usable_slots_, victims_.size());
    const int victim = victims_[next_victim_++];
    return std::exchange(tables_.slot(victim), kAbsent);
  }

 private:
  void find_victims() {
    for (const int block : tables_.slot_to_block) {
      if (block != kAbsent && !needed_.contains(block)) victims_.push_back(block);
    }
    std::ranges::sort(victims_);
  }

  const HeadTables& tables_;
  const NeededBlocks& needed_;
  int usable_slots_;
  std::vector<int>& victims_;
  int next_free_ = 0;
  std::size_t next_victim_ = 0;
};

class Resolver {
 public:
  Resolver(const SequenceKv& kv, const Selection& selection, const FetchList& fetches)
      : kv_(kv),
        selection_(selection),
        fetches_(fetches),
        num_written_(blocks_for(*kv.length)),
        num_blocks_(blocks_for(*kv.length + 1)),
        usable_slots_(std::min(kv.num_slots, num_blocks_)),
        needed_(kv.max_blocks) {
    FT_CHECK(num_blocks_ <= kv.max_blocks, *kv.length, kv.max_blocks);
  }

  void resolve(int layer, int head) {
    collect_needed(layer, head);
    const HeadTables tables(kv_, fetches_, layer, head);
    *tables.count = 0;
    SlotSource slots(tables, needed_, usable_slots_, victims_);
    for (const int block : needed_.blocks()) {
      if (tables.slot(block) != kAbsent) continue;
      const bool has_bytes = block < num_written_;
      if (has_bytes && *tables.count == tables.max_entries) continue;  // next step's resolve
      const int slot = slots.take();
      tables.slot(block) = slot;
      tables.block(slot) = block;
      if (has_bytes) tables.entries[(*tables.count)++] = {block, slot};
    }
    if (fetches_.totals == nullptr) return;
    fetches_.totals[0] += selected(layer, head).size();
    fetches_.totals[1] += static_cast<std::uint64_t>(*tables.count);
  }

 private:
  // Sink and local come first, so that a selection that is too large loses only its own tail.
  void collect_needed(int layer, int head) {
    needed_.begin(usable_slots_);
    if (kv_.num_slots >= kv_.max_blocks) {
      for (int block = 0; block < num_blocks_; ++block) needed_.add(block);
      return;
    }
    const int sink_end = std::min(kSinkBlocks, num_blocks_);
    for (int block = 0; block < sink_end; ++block) needed_.add(block);
    const int local_begin = first_local_block(*kv_.length);
    for (int block = num_blocks_ - 1; block >= local_begin; --block) needed_.add(block);
    for (const int block : selected(layer, head)) {
      if (block >= 0 && block < num_blocks_) needed_.add(block);
    }
  }

  std::span<const std::int32_t> selected(int layer, int head) const {
    const auto row = static_cast<std::size_t>(layer * kv_.shape.num_kv_heads + head);
    const int count = std::clamp(selection_.counts[row], 0, selection_.max_selected);
    return {selection_.blocks + row * static_cast<std::size_t>(selection_.max_selected),
            static_cast<std::size_t>(count)};
  }

  const SequenceKv& kv_;
  const Selection& selection_;
  const FetchList& fetches_;
  int num_written_;  // blocks that have bytes
  int num_blocks_;   // ... and the coming token's
  int usable_slots_;
  NeededBlocks needed_;
  std::vector<int> victims_;
};

}  // namespace

void CpuDevice::resolve(const ResolveArgs& args, Stream& stream) {
  enqueue(stream, [args] {
    for (int row = 0; row < args.rows; ++row) {
      const SequenceKv& kv = args.sequences[row];
      Resolver resolver(kv, args.selections[row], args.fetches[row]);
      for (int layer = args.first_layer; layer < args.first_layer + args.num_layers; ++layer) {
        for (int head = 0; head < kv.shape.num_kv_heads; ++head) resolver.resolve(layer, head);
      }
    }
  });
}

}  // namespace foretoken::kernels
