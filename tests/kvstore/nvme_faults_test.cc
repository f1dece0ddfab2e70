// Whatever happens to the file, the tier gives the slab that was stored under a name, or nothing
// (docs/formats.md, "NVMe file"): damage to the bytes, crashes at any operation, faults of any
// kind.
//
// FORETOKEN_FAULTS sets how many injections each test makes (400).
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <random>

#include "tests/kvstore/tier_on_file.h"

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261124;
constexpr std::uint32_t kSlots = 6;

int num_faults() {
  const char* asked = std::getenv("FORETOKEN_FAULTS");
  return asked != nullptr ? std::atoi(asked) : 400;
}

const NvmeGeometry& geometry() {
  static const NvmeGeometry kGeometry{kTestModel.slab_bytes(), kSlots};
  return kGeometry;
}

// ---- damage -----------------------------------------------------------------------------------

using Random = std::mt19937_64;

// A stretch of the file: a slot's header or its slab.
struct Place {
  std::size_t offset;
  std::size_t bytes;
};
Place header_of(std::uint64_t slot) {
  return {geometry().header_offset(SlotIndex{static_cast<std::uint32_t>(slot)}), kSectorBytes};
}
Place slab_of(std::uint64_t slot) {
  return {geometry().slab_offset(SlotIndex{static_cast<std::uint32_t>(slot)}),
          geometry().slot_bytes};
}
Place any_place(Random& random) {
  return random() % 4 == 0 ? header_of(random() % kSlots) : slab_of(random() % kSlots);
}
void copy_place(FileBytes& to, Place where, const FileBytes& from, Place what) {
  std::memcpy(to.data() + where.offset, from.data() + what.offset, what.bytes);
}

void flip_bits(FileBytes& file, Random& random) {
  const Place place = any_place(random);
  for (std::uint64_t count = 1 + random() % 64; count > 0; --count) {
    file[place.offset + random() % place.bytes] ^= std::byte{1} << (random() % 8);
  }
}
void flip_superblock(FileBytes& file, Random& random) {
  file[random() % (2 * kSectorBytes)] ^= std::byte{1} << (random() % 8);
}
void swap_places(FileBytes& file, Random& random) {
  const FileBytes before = file;
  const std::uint64_t a = random() % kSlots;
  const std::uint64_t b = random() % kSlots;
  const std::uint64_t what = random() % 3;
  if (what != 0) {
    copy_place(file, slab_of(a), before, slab_of(b));
    copy_place(file, slab_of(b), before, slab_of(a));
  }
  if (what != 1) {
    copy_place(file, header_of(a), before, header_of(b));
    copy_place(file, header_of(b), before, header_of(a));
  }
}
void swap_blocks(FileBytes& file, Random& random) {
  const Place slab = slab_of(random() % kSlots);
  const std::size_t block = kTestModel.slab_shape().block_bytes();
  const std::size_t count = kTestModel.slab_shape().slab_payload_bytes() / block;
  const auto at = [&](std::uint64_t i) {
    return file.begin() + static_cast<std::ptrdiff_t>(slab.offset + i * block);
  };
  const std::uint64_t a = random() % count;
  const std::uint64_t b = random() % count;
  std::swap_ranges(at(a), at(a) + static_cast<std::ptrdiff_t>(block), at(b));
}
void truncate(FileBytes& file, Random& random) { file.resize(random() % file.size()); }
void zero_sectors(FileBytes& file, Random& random) {
  const std::size_t begin = random() % (file.size() / kSectorBytes);
  const std::size_t end = std::min(file.size() / kSectorBytes, begin + 1 + random() % 8);
  std::fill(file.begin() + static_cast<std::ptrdiff_t>(begin * kSectorBytes),
            file.begin() + static_cast<std::ptrdiff_t>(end * kSectorBytes), std::byte{0});
}
// Parts of an earlier state of this file, or of another model's file with slots of the same size.
void mix_in(FileBytes& file, const FileBytes& other, Random& random) {
  for (std::uint64_t count = 1 + random() % 4; count > 0; --count) {
    const Place place = any_place(random);
    copy_place(file, place, other, place);
  }
}

// ---- files ------------------------------------------------------------------------------------

// Slabs 0..5, then 4..9 over the older ones.
struct Files {
  FileBytes earlier;
  FileBytes now;
  FileBytes foreign;

  std::shared_ptr<const KvCipher> cipher;  // of all three

  explicit Files(std::shared_ptr<const KvCipher> with = nullptr) : cipher(std::move(with)) {
    {
      TierOnFile disk = open(now);
      for (std::uint32_t i = 0; i < kSlots; ++i) disk.store(test_name(0, i));
    }
    earlier = now;
    {
      TierOnFile disk = open(now);
      for (std::uint32_t i = 4; i < 10; ++i) disk.store(test_name(0, i));
    }
    ModelIdentity other = kTestModel;
    other.model_hash = "another";
    TierOnFile disk(foreign, kSlots, NvmeReuse::kKeepSlabs, other, cipher);
    for (std::uint32_t i = 2; i < 8; ++i) disk.store(test_name(0, i + 100));
  }
  TierOnFile open(FileBytes& file) const {
    return {file, kSlots, NvmeReuse::kKeepSlabs, kTestModel, cipher};
  }
};

// Each name is given right or not at all; how many are given.
int expect_right_or_absent(TierOnFile& disk) {
  int given = 0;
  for (std::uint32_t i = 0; i < 120; ++i) {
    const SlabName name = test_name(0, i);
    const auto slab = disk.load(name);
    if (!slab) continue;
    EXPECT_TRUE(same_slab(slab->data(), name)) << "wrong KV was given for slab " << i;
    EXPECT_LT(i, 100U) << "another model's slab was given";
    ++given;
  }
  return given;
}

void expect_that_damage_is_a_miss(const Files& files, int num_injections) {
  Random random(kSeed);
  const std::int64_t whole = kSlots;
  std::int64_t detected = 0;
  for (int i = 0; i < num_injections; ++i) {
    FileBytes file = files.now;
    // The store runs while it happens, or finds it at its start.
    std::unique_ptr<TierOnFile> running;
    const auto open = [&] { running.reset(new TierOnFile(files.open(file))); };
    if (random() % 2 == 0) open();
    switch (random() % 8) {
      case 0:
        flip_superblock(file, random);
        break;
      case 1:
        swap_places(file, random);
        break;
      case 2:
        swap_blocks(file, random);
        break;
      case 3:
        truncate(file, random);
        break;
      case 4:
        zero_sectors(file, random);
        break;
      case 5:
        mix_in(file, files.earlier, random);
        break;
      case 6:
        mix_in(file, files.foreign, random);
        break;
      default:
        flip_bits(file, random);
    }
    if (!running) open();
    const int given = expect_right_or_absent(*running);
    if (given < whole) ++detected;
    const NvmeStat stat = running->tier->stat();
    EXPECT_LE(stat.slabs_held, whole);
    if (testing::Test::HasFailure()) FAIL() << "injection " << i << ", seed " << kSeed;
  }
  testing::Test::RecordProperty("detected", static_cast<int>(detected));
}

TEST(NvmeFaults, DamageIsAMiss) { expect_that_damage_is_a_miss(Files(), num_faults()); }

TEST(NvmeFaults, DamageOfAnEncryptedFileIsAMiss) {
  for (const auto kind : {CipherKind::kAes256Gcm, CipherKind::kXChaCha20Poly1305}) {
    expect_that_damage_is_a_miss(Files(KvCipher::random(kind)), num_faults() / 2);
  }
}

// Every bit of a header of either kind, and every word of a slab, counts.
TEST(NvmeFaults, EachBitOfAHeaderAndEachWordOfASlabCounts) {
  FileBytes file;
  const SlabName name = test_name(1, 7);
  const std::size_t header = NvmeGeometry{geometry().slot_bytes, 1}.header_offset(SlotIndex{0});
  for (const std::size_t bytes : {96, 128}) {
    const auto previous = bytes == 128 ? std::optional(test_name(1, 6).key) : std::nullopt;
    file.clear();
    { ASSERT_TRUE(TierOnFile(file, 1).store(name, previous)); }
    for (std::size_t bit = 0; bit < bytes * 8; ++bit) {
      FileBytes damaged = file;
      damaged[header + bit / 8] ^= std::byte{1} << (bit % 8);
      TierOnFile disk(damaged, 1);
      EXPECT_FALSE(disk.load(name)) << "bit " << bit << " of " << bytes << " bytes";
      EXPECT_EQ(disk.tier->stat().checksum_failures, 1);
    }
  }
  const std::size_t slab = NvmeGeometry{geometry().slot_bytes, 1}.slab_offset(SlotIndex{0});
  const kernels::KvShape shape = kTestModel.slab_shape();
  const std::size_t used = kernels::slab_checksum_offset(shape, shape.num_layers, 0);
  for (std::size_t at = 0; at < used; at += 8 * 13) {
    FileBytes damaged = file;
    damaged[slab + at + at % 8] ^= std::byte{0x10};
    TierOnFile disk(damaged, 1);
    EXPECT_FALSE(disk.load(name)) << "byte " << at;
    EXPECT_EQ(disk.tier->stat().checksum_failures, 1);
  }
}

// The process dies at operation n: it and all later ones are torn or lost. Then the next one opens.
TEST(NvmeFaults, ACrashAtAnyOperationLosesAtMostWhatWasBeingWritten) {
  const Files files;
  Random random(kSeed);
  for (int crash = 0; crash < 60; ++crash) {
    FileBytes file = files.now;
    {
      TierOnFile disk(file, kSlots);
      int count = 0;
      disk.device->fault = [&](const IoOperation&) {
        ++count;
        if (count < crash) return IoFault::kNone;
        return count == crash && random() % 2 == 0 ? IoFault::kTorn : IoFault::kLost;
      };
      for (std::uint32_t i = 10; i < 30; ++i) disk.store(test_name(0, i));
    }
    TierOnFile disk(file, kSlots);
    EXPECT_GE(expect_right_or_absent(disk), static_cast<int>(kSlots) - 1) << "crash " << crash;
  }
}

// While it opens the file, too: one of the superblocks is whole.
TEST(NvmeFaults, ACrashDuringTheOpeningLosesNothing) {
  const Files files;
  for (int crash = 1; crash <= 6; ++crash) {
    for (const IoFault how : {IoFault::kTorn, IoFault::kLost}) {
      FileBytes file = files.now;
      MemoryDevice device(file);
      int count = 0;
      device.fault = [&](const IoOperation& operation) {
        const bool lost = operation.direction == IoDirection::kWrite && ++count >= crash;
        return lost ? how : IoFault::kNone;
      };
      IoMemory memory(1 << 20);
      const NvmeOpening opening{kTestModel, geometry().file_bytes(), 0, NvmeReuse::kKeepSlabs};
      ASSERT_TRUE(open_contents(device, memory.bytes(), opening));
      TierOnFile disk(file, kSlots);
      EXPECT_EQ(expect_right_or_absent(disk), static_cast<int>(kSlots)) << "crash " << crash;
    }
  }
}

// ---- random operations with faults, against a std::map ------------------------------------------

class Model {
 public:
  Model(Random& random, std::shared_ptr<const KvCipher> cipher)
      : random_(random), cipher_(std::move(cipher)) {
    reopen();
  }

  void step() {
    disk_->wait(std::chrono::milliseconds(random_() % 400));
    const SlabName name =
        test_name(static_cast<int>(random_() % 3), static_cast<std::uint32_t>(random_() % 8));
    switch (random_() % 12) {
      case 0:
        return reopen();
      case 1:
        return disk_->device->release_held();
      case 2:
        return disk_->tier->touch(name);
      case 3:
      case 4:
      case 5:
      case 6:
        return store(name);
      default:
        return load(name);
    }
  }
  std::int64_t num_given() const { return num_given_; }

 private:
  void reopen() {
    if (disk_) disk_->device->release_held();
    disk_.reset();
    disk_ = std::make_unique<TierOnFile>(file_, kSlots, NvmeReuse::kKeepSlabs, kTestModel, cipher_);
    disk_->device->fault = [this](const IoOperation& operation) { return fault(operation); };
  }
  IoFault fault(const IoOperation& operation) {
    if (random_() % 8 != 0) return IoFault::kNone;
    constexpr std::array kFaults = {IoFault::kShort, IoFault::kError, IoFault::kFull,
                                    IoFault::kTorn,  IoFault::kLost,  IoFault::kHeld};
    const IoFault what = kFaults[random_() % kFaults.size()];
    // A disk that says it has read and has not: the buffer holds what it held before.
    if (what == IoFault::kFull && operation.direction == IoDirection::kRead) return IoFault::kError;
    return what;
  }
  void store(const SlabName& name) {
    if (disk_->store(name)) stored_[name] = true;
  }
  void load(const SlabName& name) {
    const auto slab = disk_->load(name);
    if (!slab) return;
    ++num_given_;
    EXPECT_TRUE(stored_.contains(name)) << "a slab that was never stored";
    EXPECT_TRUE(same_slab(slab->data(), name)) << "wrong KV";
  }

  Random& random_;
  std::shared_ptr<const KvCipher> cipher_;
  FileBytes file_;
  std::unique_ptr<TierOnFile> disk_;
  std::map<SlabName, bool> stored_;  // whether it ever was
  std::int64_t num_given_ = 0;
};

void run_random_operations(std::shared_ptr<const KvCipher> cipher, int count) {
  Random random(kSeed);
  Model model(random, std::move(cipher));
  for (int i = 0; i < count; ++i) {
    model.step();
    if (testing::Test::HasFailure()) FAIL() << "operation " << i << ", seed " << kSeed;
  }
  EXPECT_GT(model.num_given(), count / 20) << "so much came through";
}

TEST(NvmeFaults, RandomOperationsWithFaultsNeverGiveWrongKv) {
  run_random_operations(nullptr, 10 * num_faults());
}

TEST(NvmeFaults, RandomOperationsWithFaultsNeverGiveWrongKvOfAnEncryptedFile) {
  run_random_operations(KvCipher::random(), num_faults());
}

}  // namespace
}  // namespace foretoken::kvstore
