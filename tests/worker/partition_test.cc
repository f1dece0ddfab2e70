#include "worker/partition.h"

#include <gtest/gtest.h>

#include <vector>

namespace foretoken::worker {
namespace {

ModelConfig model(int heads, int kv_heads) {
  ModelConfig config;
  config.num_heads = heads;
  config.num_kv_heads = kv_heads;
  config.head_dim = 64;
  config.hidden_size = heads * 64;
  config.intermediate_size = 1536;
  config.vocab_size = 49152;
  return config;
}

std::vector<Partition> all(const ModelConfig& config, int world_size) {
  std::vector<Partition> parts;
  for (int rank = 0; rank < world_size; ++rank) {
    parts.push_back(make_partition(config, rank, world_size).value_or_throw());
  }
  return parts;
}

TEST(Partition, SplitsKvHeadsUnevenly) {
  const auto parts = all(model(9, 3), 2);
  EXPECT_EQ(parts[0].kv_heads.count, 2);
  EXPECT_EQ(parts[0].heads.count, 6);
  EXPECT_EQ(parts[1].kv_heads.begin, 2);
  EXPECT_EQ(parts[1].heads.begin, 6);
  EXPECT_EQ(parts[1].heads.count, 3);

  const auto three = all(model(32, 8), 3);
  EXPECT_EQ(three[0].kv_heads.count, 3);
  EXPECT_EQ(three[1].kv_heads.count, 3);
  EXPECT_EQ(three[2].kv_heads.count, 2);
}

TEST(Partition, SharesAHeadWhereRanksOutnumberThem) {
  const auto parts = all(model(9, 3), 4);
  EXPECT_EQ(parts[0].kv_heads.begin, 0);
  EXPECT_EQ(parts[1].kv_heads.begin, 0);
  EXPECT_EQ(parts[0].heads.count, 2);
  EXPECT_EQ(parts[1].heads.begin, 2);
  EXPECT_EQ(parts[1].heads.count, 1);
  EXPECT_TRUE(parts[0].writes_kv);
  EXPECT_FALSE(parts[1].writes_kv);
  EXPECT_EQ(parts[2].kv_heads.begin, 1);
  EXPECT_EQ(parts[3].heads.count, 3);
}

// Every head, column and word belongs to exactly one rank; every KV head has exactly one writer.
TEST(Partition, CoversTheModelOnce) {
  for (const auto& [heads, kv_heads] : {std::pair{9, 3}, {14, 2}, {32, 8}, {7, 1}, {16, 16}}) {
    for (int world_size = 1; world_size <= heads; ++world_size) {
      const ModelConfig config = model(heads, kv_heads);
      if (!make_partition(config, 0, world_size)) continue;
      std::vector<int> head_owners(static_cast<std::size_t>(heads));
      std::vector<int> writers(static_cast<std::size_t>(kv_heads));
      int columns = 0;
      int words = 0;
      for (const Partition& part : all(config, world_size)) {
        for (int h = part.heads.begin; h < part.heads.end(); ++h) {
          ++head_owners[static_cast<std::size_t>(h)];
          const int kv = h / (heads / kv_heads);
          EXPECT_GE(kv, part.kv_heads.begin);
          EXPECT_LT(kv, part.kv_heads.end());
        }
        EXPECT_EQ(part.heads.count % part.kv_heads.count, 0);
        for (int h = part.kv_heads.begin; h < part.kv_heads.end() && part.writes_kv; ++h) {
          ++writers[static_cast<std::size_t>(h)];
        }
        EXPECT_EQ(part.intermediate.begin, columns);
        columns = part.intermediate.end();
        EXPECT_EQ(part.vocab.begin, words);
        words = part.vocab.end();
      }
      EXPECT_EQ(head_owners, std::vector<int>(static_cast<std::size_t>(heads), 1));
      EXPECT_EQ(writers, std::vector<int>(static_cast<std::size_t>(kv_heads), 1));
      EXPECT_EQ(columns, 1536);
      EXPECT_EQ(words, 49152);
    }
  }
}

TEST(Partition, RefusesMoreRanksThanQueryHeads) {
  const auto part = make_partition(model(9, 3), 0, 10);
  ASSERT_FALSE(part);
  EXPECT_EQ(part.error().code, ErrorCode::kConfig);
  EXPECT_NE(part.error().message.find("--tensor-parallel-size 10"), std::string::npos);
  EXPECT_TRUE(make_partition(model(9, 3), 0, 9));
}

}  // namespace
}  // namespace foretoken::worker
