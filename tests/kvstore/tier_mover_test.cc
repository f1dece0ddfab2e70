// Slabs on their way from an arena to a file in memory.
#include "kvstore/internal/tier_mover.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <vector>

#include "tests/kvstore/tier_on_file.h"

namespace foretoken::kvstore {
namespace {

constexpr std::uint32_t kSlabs = 4;

class TierMoverTest : public testing::Test {
 protected:
  TierMoverTest() { book.set_ready(kSlabs); }
  std::byte* memory(SlabIndex slab) { return arena.data() + raw(slab) * kTestModel.slab_bytes(); }
  // Its turn to be written comes with advance().
  void publish(const SlabName& name) {
    const SlabIndex slab = book.take_slab(0).value();
    std::memcpy(memory(slab), test_slab(name).data(), kTestModel.slab_bytes());
    book.publish_slab(0, slab, name.key);
    book.return_slab(0, slab);
    mover.write_behind(name);
  }
  std::uint64_t header_of(std::uint32_t slot) const {
    return disk.contents.superblock.geometry.header_offset(SlotIndex{slot});
  }

  FileBytes file;
  TierOnFile disk{file, 8};
  std::vector<std::byte> arena = std::vector<std::byte>(kSlabs * kTestModel.slab_bytes());
  StoreBook book{1, kSlabs};
  TierMover mover{book, *disk.tier, [this](int, SlabIndex slab) { return memory(slab); }, 8};
};

// The time for it may be short, and a use without its slab is none.
TEST_F(TierMoverTest, AtTheEndSlabsComeBeforeUses) {
  for (std::uint32_t i = 0; i < 2; ++i) {
    ASSERT_TRUE(disk.store(test_name(0, i)));
    disk.tier->note_use(std::array{test_name(0, i).key});
  }
  publish(test_name(0, 2));
  publish(test_name(0, 3));
  std::vector<std::uint64_t> headers;  // as they are written
  disk.device->fault = [&](const IoOperation& operation) {
    const bool is_header = operation.bytes == kSectorBytes;
    if (operation.direction == IoDirection::kWrite && is_header) {
      headers.push_back(operation.offset);
    }
    return IoFault::kNone;
  };
  while (!mover.finish(disk.now)) {
  }
  EXPECT_EQ(headers, (std::vector{header_of(2), header_of(3), header_of(1), header_of(0)}))
      << "slabs, then the latest use";
}

}  // namespace
}  // namespace foretoken::kvstore
