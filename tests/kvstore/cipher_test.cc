// What lies on the disk of an encrypted tier: nothing that can be read, and nothing that opens
// anywhere else, with another key, or when a bit of it was changed.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <optional>
#include <set>
#include <string>

#include "kvstore/internal/kv_cipher.h"
#include "kvstore/internal/nvme_tier.h"
#include "kvstore/internal/sealed_slab.h"
#include "kvstore/internal/slot_table.h"
#include "kvstore/internal/store_tools.h"
#include "tests/kvstore/memory_device.h"
#include "tests/kvstore/running_server.h"
#include "tests/kvstore/tier_on_file.h"

namespace foretoken::kvstore {
namespace {

const NvmeGeometry kSealed{slot_bytes(kTestModel.slab_shape(), true), 4};

constexpr CipherKind kKinds[] = {CipherKind::kAes256Gcm, CipherKind::kXChaCha20Poly1305};

std::span<const std::byte> bytes_of(const std::uint64_t& place) {
  return std::as_bytes(std::span(&place, 1));
}

class CipherTest : public testing::TestWithParam<CipherKind> {
 protected:
  void SetUp() override {
    if (KvCipher::best_kind() != CipherKind::kAes256Gcm && GetParam() == CipherKind::kAes256Gcm) {
      GTEST_SKIP() << "no AES here";
    }
    cipher = KvCipher::random(GetParam());
  }
  TierOnFile open(NvmeReuse reuse = NvmeReuse::kKeepSlabs) {
    return {file, 4, reuse, kTestModel, cipher};
  }
  std::string why_not(const std::shared_ptr<const KvCipher>& with) {
    const FileBytes before = file;
    try {
      TierOnFile(file, 4, NvmeReuse::kKeepSlabs, kTestModel, with);
    } catch (const Exception& refusal) {
      EXPECT_EQ(refusal.error().code, ErrorCode::kConfig);
      EXPECT_EQ(file, before) << "it is left as it is";
      return refusal.what();
    }
    return "it opens";
  }

  std::shared_ptr<const KvCipher> cipher;
  FileBytes file;
};

TEST_P(CipherTest, OpensWhatItSealedAndNothingElse) {
  const std::uint64_t place = 4096;
  const std::uint64_t elsewhere = 8192;
  for (const std::size_t size : {0, 4, 15, 16, 17, 4096, 100'003}) {
    std::vector<std::byte> text(size, std::byte{'k'});
    auto sealed = text;
    const Seal seal = cipher->seal(sealed, bytes_of(place));
    EXPECT_EQ(sealed == text, size == 0);
    auto copy = sealed;
    ASSERT_TRUE(cipher->open(copy, bytes_of(place), seal));
    EXPECT_EQ(copy, text);

    EXPECT_FALSE(cipher->open(copy = sealed, bytes_of(elsewhere), seal));
    EXPECT_FALSE(KvCipher::random(GetParam())->open(copy = sealed, bytes_of(place), seal));
    for (std::size_t bit = 0; bit < 8 * (24 + 16); bit += 7) {
      Seal other = seal;
      (bit < 192 ? other.nonce[bit / 8] : other.tag[bit / 8 - 24]) ^= 1U << bit % 8;
      EXPECT_FALSE(cipher->open(copy = sealed, bytes_of(place), other)) << bit;
    }
    for (std::size_t at = 0; at < size; at += 1 + size / 50) {
      copy = sealed;
      copy[at] ^= std::byte{1};
      EXPECT_FALSE(cipher->open(copy, bytes_of(place), seal)) << at;
    }
  }
}

TEST_P(CipherTest, NoTwoSealsAreAlike) {
  std::set<std::array<std::uint8_t, 24>> nonces;
  std::set<std::vector<std::byte>> texts;
  for (int i = 0; i < 1000; ++i) {
    std::vector<std::byte> text(32);
    nonces.insert(cipher->seal(text, {}).nonce);
    texts.insert(text);
  }
  EXPECT_EQ(nonces.size(), 1000U);
  EXPECT_EQ(texts.size(), 1000U) << "the same text never gives the same bytes";
}

TEST_P(CipherTest, AKeyIsHandedOverOnce) {
  const FileDescriptor pipe = cipher->hand_over().value_or_throw();
  const auto rank = KvCipher::from_pipe(pipe.get(), GetParam()).value_or_throw();
  const std::vector<std::byte> text(100, std::byte{3});
  for (const auto& [from, to] : {std::pair(cipher, rank), std::pair(rank, cipher)}) {
    auto copy = text;
    const Seal seal = from->seal(copy, {});
    EXPECT_TRUE(to->open(copy, {}, seal));
    EXPECT_EQ(copy, text);
  }
  for (const int gone : {pipe.get(), -1}) {
    const auto again = KvCipher::from_pipe(gone, GetParam());
    ASSERT_FALSE(again);
    EXPECT_EQ(again.error().code, ErrorCode::kUnavailable);
  }
}

// The rule that a key in many hands rests on: 24 bytes, all of them random, whoever seals. (Of as
// many nonces of 12 bytes two would be alike after 2^48.)
TEST_P(CipherTest, HoldersOfOneKeySealUnderNoncesOfTheirOwn) {
  std::vector holders{cipher};
  for (int i = 0; i < 3; ++i) {
    const FileDescriptor pipe = cipher->hand_over().value_or_throw();
    holders.push_back(KvCipher::from_pipe(pipe.get(), GetParam()).value_or_throw());
  }
  constexpr int kSeals = 2000;
  std::set<std::array<std::uint8_t, 24>> nonces;
  std::set<std::array<std::byte, 32>> texts;
  std::array<std::set<std::uint8_t>, 24> values;
  for (int i = 0; i < kSeals; ++i) {
    for (const auto& holder : holders) {
      std::array<std::byte, 32> text{};
      const Seal seal = holder->seal(text, {});
      nonces.insert(seal.nonce);
      texts.insert(text);
      for (std::size_t at = 0; at < values.size(); ++at) values[at].insert(seal.nonce[at]);
    }
  }
  EXPECT_EQ(nonces.size(), kSeals * holders.size());
  EXPECT_EQ(texts.size(), kSeals * holders.size());
  for (const auto& of_a_byte : values) EXPECT_EQ(of_a_byte.size(), 256U);
}

// Of an encrypted file, no 16 bytes of what went in can be found: KV, checksums, prefix keys.
TEST_P(CipherTest, NothingOnTheDiskCanBeRead) {
  const auto pieces_found = [this](const std::shared_ptr<const KvCipher>& with) {
    file.clear();
    int found = 0;
    TierOnFile disk(file, 4, NvmeReuse::kStartAfresh, kTestModel, with);
    for (std::uint32_t i = 1; i <= 4; ++i) {
      SlabName name = test_name(0, i);
      name.key.bytes.fill(static_cast<std::uint8_t>(0xA0 + i));  // as a hash, it has no zeros
      disk.tier->store(name, test_slab(name).data(), disk.now);
      disk.finish();
      const auto is_there = [&](const std::byte* piece) {
        return std::string_view(reinterpret_cast<const char*>(file.data()), file.size())
                   .find({reinterpret_cast<const char*>(piece), 16}) != std::string_view::npos;
      };
      const auto slab = test_slab(name);
      const kernels::KvShape shape = kTestModel.slab_shape();
      for (std::size_t at = 0; at < kernels::slab_checksum_offset(shape, shape.num_layers, 0);
           at += 16) {
        if (is_there(slab.data() + at)) ++found;
      }
      if (is_there(reinterpret_cast<const std::byte*>(name.key.bytes.data()))) ++found;
    }
    EXPECT_EQ(disk.tier->stat().slabs_held, 4);
    return found;
  };
  EXPECT_EQ(pieces_found(cipher), 0);
  EXPECT_GT(pieces_found(nullptr), 1000) << "the search would find them";
}

TEST_P(CipherTest, AKeptFileOpensWithItsKeyAlone) {
  const auto key = cipher;
  ASSERT_TRUE(open().store(test_name(0, 1)));
  {
    TierOnFile disk = open();
    const auto slab = disk.load(test_name(0, 1));
    ASSERT_TRUE(slab);
    EXPECT_TRUE(same_slab(slab->data(), test_name(0, 1)));
  }
  EXPECT_NE(why_not(KvCipher::random(GetParam())).find("another key"), std::string::npos);
  EXPECT_NE(why_not(nullptr).find("--kv-key-file"), std::string::npos);
  const auto other_kind = kKinds[GetParam() == kKinds[0] ? 1 : 0];
  EXPECT_NE(why_not(KvCipher::random(other_kind)).find("otherwise"), std::string::npos);
  EXPECT_TRUE(open().load(test_name(0, 1))) << "and nothing of that has harmed it";
}

TEST_P(CipherTest, AFileThatIsNotEncryptedStartsAfresh) {
  const SlabName name = test_name(0, 1);
  ASSERT_TRUE(TierOnFile(file, 4).store(name));
  TierOnFile disk = open();
  EXPECT_EQ(disk.tier->stat().slabs_held, 0);
  const auto slab = test_slab(name);
  EXPECT_EQ(std::search(file.begin(), file.end(), slab.begin(), slab.begin() + 64), file.end());
}

// A slab that was there before, in its own place and under its own header's eyes, and one from
// another slot.
TEST_P(CipherTest, AStaleOrSwappedSlabDoesNotOpen) {
  const NvmeGeometry geometry = kSealed;
  const auto at = [&](std::uint32_t slot) {
    return file.begin() + static_cast<std::ptrdiff_t>(geometry.slab_offset(SlotIndex{slot}));
  };
  const auto size = static_cast<std::ptrdiff_t>(geometry.slot_bytes);
  TierOnFile disk = open(NvmeReuse::kStartAfresh);
  for (std::uint32_t i = 0; i < 4; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));
  const FileBytes before(at(0), at(0) + size);
  std::swap_ranges(at(2), at(2) + size, at(3));
  EXPECT_FALSE(disk.load(test_name(0, 2)) || disk.load(test_name(0, 3)));
  ASSERT_TRUE(disk.store(test_name(0, 4)) && disk.store(test_name(0, 5)));  // in 2 and 3
  ASSERT_TRUE(disk.load(test_name(0, 1)));
  ASSERT_TRUE(disk.store(test_name(0, 0 + 6)));  // over 0
  std::ranges::copy(before, at(0));
  EXPECT_FALSE(disk.load(test_name(0, 6)));
  EXPECT_EQ(disk.tier->stat().checksum_failures, 3);
  EXPECT_EQ(disk.tier->stat().io_errors, 0);
  EXPECT_EQ(disk.tier->stat().state, NvmeState::kOnline);
}

// Runs, checksums, seals, and the zeros between them.
TEST_P(CipherTest, AnyFlippedBitOfASlotIsAMiss) {
  for (std::size_t at = 0; at < kSealed.slot_bytes; at += 193) {
    TierOnFile disk = open(NvmeReuse::kStartAfresh);
    ASSERT_TRUE(disk.store(test_name(0, 1)));
    file[kSealed.slab_offset(SlotIndex{0}) + at] ^= std::byte{1} << (at % 8);
    EXPECT_FALSE(disk.load(test_name(0, 1))) << at;
    EXPECT_EQ(disk.tier->stat().checksum_failures, 1);
  }
}

// As a rank reads them, and no run opens in another one's place, nor in its own once it is stale.
TEST_P(CipherTest, ARunOpensAloneAndInItsPlace) {
  TierOnFile disk = open(NvmeReuse::kStartAfresh);
  ASSERT_TRUE(disk.store(test_name(0, 1)));
  const kernels::KvShape shape = kTestModel.slab_shape();
  const std::uint64_t slot = kSealed.slab_offset(SlotIndex{0});
  const auto run_at = [&](std::uint64_t layer) { return slot + layer * shape.run_bytes(); };
  const auto bytes_at = [&](std::uint64_t at, std::size_t count) {
    return std::vector(file.begin() + static_cast<std::ptrdiff_t>(at),
                       file.begin() + static_cast<std::ptrdiff_t>(at + count));
  };
  const auto sector = bytes_at(kSealed.header_offset(SlotIndex{0}), kSectorBytes);
  const auto header = decode_slot_header(ConstSector(sector.data(), kSectorBytes), SlotIndex{0},
                                         disk.contents.superblock.file_id, cipher.get())
                          .value_or_throw();
  ASSERT_TRUE(header);
  auto bytes = bytes_at(slot + shape.slab_payload_bytes(), SlotTable::bytes(shape, true));
  ASSERT_TRUE(cipher->open(bytes, place_at(slot + shape.slab_payload_bytes()), header->seal));
  SlotTable table(shape, true);
  table.decode(bytes);
  EXPECT_EQ(table.digest(), header->digest);
  const auto slab = test_slab(test_name(0, 1));
  for (const std::uint64_t layer : {0, 1}) {
    auto run = bytes_at(run_at(layer), shape.run_bytes());
    ASSERT_TRUE(cipher->open(run, place_at(run_at(layer)), table.seals[layer]));
    EXPECT_TRUE(std::ranges::equal(run, std::span(slab).subspan(layer * run.size(), run.size())));
    run = bytes_at(run_at(layer), shape.run_bytes());
    EXPECT_FALSE(cipher->open(run, place_at(run_at(1 - layer)), table.seals[layer]));
  }

  const auto stale = bytes_at(run_at(1), shape.run_bytes());
  for (std::uint32_t i = 2; i <= 5; ++i) ASSERT_TRUE(disk.store(test_name(0, i)));  // 5 over 1
  std::ranges::copy(stale, file.begin() + static_cast<std::ptrdiff_t>(run_at(1)));
  EXPECT_FALSE(disk.load(test_name(0, 5)));
}

// Slabs that were sealed as a whole are given up, but for the key's owner alone.
TEST_P(CipherTest, AFileOfVersion2StartsAfreshWithItsKey) {
  const NvmeGeometry old{kTestModel.slab_bytes(), 4};
  file.assign(old.file_bytes(), std::byte{0});
  const Superblock superblock{3, 7, kTestModel, old, GetParam(), /*is_old=*/true};
  for (const int copy : {0, 1}) {
    encode(superblock, Sector(file.data() + NvmeGeometry::superblock_offset(copy), kSectorBytes),
           cipher.get());
  }
  EXPECT_NE(why_not(KvCipher::random(GetParam())).find("another key"), std::string::npos);
  EXPECT_NE(why_not(nullptr).find("--kv-key-file"), std::string::npos);
  ASSERT_TRUE(open().store(test_name(0, 1)));
  TierOnFile disk = open();
  EXPECT_FALSE(disk.contents.superblock.is_old);
  EXPECT_TRUE(disk.load(test_name(0, 1)));
}

TEST_P(CipherTest, TheToolsRefuseAFileOfVersion2) {
  const TestFolder folder;
  const std::filesystem::path path = folder.path() / "kv";
  { const NvmeFile made(path); }
  const NvmeGeometry old{kTestModel.slab_bytes(), 4};
  std::array<std::byte, kSectorBytes> sector{};
  encode(Superblock{3, 7, kTestModel, old, GetParam(), /*is_old=*/true}, sector, cipher.get());
  {
    std::ofstream out(path / "kv-slabs", std::ios::binary);
    for (const int copy [[maybe_unused]] : {0, 1}) {
      out.write(reinterpret_cast<const char*>(sector.data()), kSectorBytes);
    }
  }
  std::filesystem::resize_file(path / "kv-slabs", old.file_bytes());
  ToolTarget target;
  target.folder = path;
  target.cipher = cipher;
  try {
    stat_file(target);
    ADD_FAILURE() << "it is read";
  } catch (const Exception& refusal) {
    EXPECT_EQ(refusal.error().code, ErrorCode::kConfig);
    EXPECT_NE(std::string(refusal.what()).find("as of version 2"), std::string::npos)
        << refusal.what();
  }
}

INSTANTIATE_TEST_SUITE_P(, CipherTest, testing::ValuesIn(kKinds));

// ---- the key's file -----------------------------------------------------------------------------

class KeyFileTest : public testing::Test {
 protected:
  std::string why(const std::string& text, mode_t mode = 0600) {
    const auto path = folder.path() / "key";
    std::filesystem::remove(path);
    std::ofstream(path) << text;
    chmod(path.c_str(), mode);
    return why_path(path);
  }
  static std::string why_path(const std::filesystem::path& path) {
    try {
      KvCipher::from_file(path);
    } catch (const Exception& refusal) {
      EXPECT_EQ(refusal.error().code, ErrorCode::kConfig);
      return refusal.what();
    }
    return "";
  }
  TestFolder folder;
  const std::string digits = std::string(60, '7') + "aBcD";
};

TEST_F(KeyFileTest, IsPrivateAndHas64Digits) {
  EXPECT_EQ(why(digits), "");
  EXPECT_EQ(why(digits + "\n"), "");
  for (const auto& text : {std::string(), digits.substr(1), digits + "0", digits + "\n\n",
                           digits.substr(1).append("x"), digits.substr(2) + "  "}) {
    EXPECT_NE(why(text).find("64 hexadecimal digits"), std::string::npos) << text;
  }
  EXPECT_NE(why(digits, 0640).find("chmod 600"), std::string::npos);
  EXPECT_EQ(why(digits), "");
  std::filesystem::create_symlink(folder.path() / "key", folder.path() / "link");
  EXPECT_NE(why_path(folder.path() / "link").find("can't be opened"), std::string::npos);
  EXPECT_NE(why_path(folder.path() / "none").find("can't be opened"), std::string::npos);
  EXPECT_NE(why_path(folder.path()).find("not a regular file"), std::string::npos);
}

TEST_F(KeyFileTest, IsTheSameKeyEachTime) {
  why(digits);
  std::vector<std::byte> text(100, std::byte{3});
  const Seal seal = KvCipher::from_file(folder.path() / "key")->seal(text, {});
  EXPECT_TRUE(KvCipher::from_file(folder.path() / "key")->open(text, {}, seal));
  EXPECT_EQ(text, std::vector<std::byte>(100, std::byte{3}));
}

// ---- without a cipher ---------------------------------------------------------------------------

// Not a byte of a file that is not encrypted has changed: the numbers are of the code before.
TEST(WithoutEncryption, TheFormatIsVersion1) {
  std::array<std::byte, kSectorBytes> sector{};
  encode(Superblock{3, 0x1122334455667788, kTestModel, {kTestModel.slab_bytes(), 5}, {}}, sector);
  EXPECT_EQ(XXH3_64bits(sector.data(), sector.size()), 3585080542676398398U);
  encode(SlotHeader{SlotIndex{2}, 7, 8, 9, 10, test_name(1, 11), {}}, sector);
  EXPECT_EQ(XXH3_64bits(sector.data(), sector.size()), 4030884665948362894U);
}

}  // namespace
}  // namespace foretoken::kvstore
