// KV that goes bad in the arena under a running sequence: whichever op reads it, the sequence is
// reported lost with the token of that step, and nothing of it serves anybody afterwards.
#include <gtest/gtest.h>

#include "kvstore/internal/arena_layout.h"
#include "tests/worker/local_group.h"
#include "tests/worker/small_model.h"

namespace foretoken::worker {
namespace {

constexpr std::int64_t kArenaBytes = std::int64_t{64} << 20;
constexpr int kPromptLength = 700;  // 43 blocks and 12 tokens
const kernels::KvShape kShape{3, 2, 64, kernels::DataType::kBf16};

struct Place {
  int layer = 0;
  int head = 0;
  int block = 0;
};

class ArenaFaultsTest : public ::testing::Test {
 protected:
  // A bit of the block of the first sequence that the store gave slabs to: they are its first ones.
  void flip(const Place& place) const {
    const auto layout =
        kvstore::ArenaLayout::fit(kArenaBytes, kShape.num_kv_heads, kShape.slab_bytes());
    const auto slab = static_cast<std::size_t>(place.block / kSegmentBlocks);
    store_.damage(layout.stripe_offset(place.head) + slab * kShape.slab_bytes() +
                      kernels::slab_block_offset(kShape, place.layer, place.block) + 77,
                  std::byte{4});
  }

  // Admission and prefill; what the step of the first token says.
  StepResult begin(LocalGroup& group, SequenceId id, const std::vector<TokenId>& prompt) {
    StepPlan plan;
    plan.admits = {LocalGroup::admission(id, prompt, {.max_tokens = 64})};
    reused_ = group.run(plan).admits.at(0).reusable_tokens;
    plan = {};
    plan.starts = {{id, reused_}};
    group.run(plan);
    plan = {};
    plan.prefills = {{id, 0, kShape.num_layers, reused_, static_cast<int>(prompt.size())}};
    return group.run(plan);
  }
  static StepPlan decodes(std::vector<SequenceId> ids) {
    StepPlan plan;
    plan.decodes = std::move(ids);
    return plan;
  }
  static KvReport release(LocalGroup& group, SequenceId id) {
    StepPlan plan;
    plan.releases = {id};
    return group.run(plan).stats.at(0).kv;
  }
  static std::int64_t failures(const StepResult& result, SequenceId id) {
    for (const LostSequence& lost : result.lost) {
      EXPECT_EQ(lost.error.code, ErrorCode::kCorrupt);
      if (lost.sequence == id) return lost.checksum_failures;
    }
    return 0;
  }
  // Of the first decode step after `place` went bad.
  std::int64_t failures_in_a_step(const ServiceConfig& config, const Place& place) {
    LocalGroup group(config, small_model(), store_);
    EXPECT_TRUE(begin(group, SequenceId{1}, prompt_).lost.empty());
    flip(place);
    return failures(group.run(decodes({SequenceId{1}})), SequenceId{1});
  }

  const std::vector<TokenId> prompt_ = random_prompt(kPromptLength, 1);
  std::int64_t reused_ = 0;
  StoreProcess store_{kArenaBytes};
};

// The last blocks of a prompt that has no slots for all its blocks come back with the first step.
TEST_F(ArenaFaultsTest, AGatherFindsIt) {
  LocalGroup group(service("streaming-llm", 256), small_model(), store_);
  const SequenceId id{1};
  ASSERT_TRUE(begin(group, id, prompt_).lost.empty());
  flip({1, 1, 42});
  const StepResult result = group.run(decodes({id}));
  ASSERT_EQ(result.lost.size(), 1U);
  EXPECT_EQ(failures(result, id), 1);
  EXPECT_EQ(failures(group.run(decodes({id})), id), 2) << "it is asked for again";
  EXPECT_EQ(release(group, id).checksum_failures, 2);
}

// The step writes to the open block: no rank may end over it.
TEST_F(ArenaFaultsTest, AGatherFindsItInTheOpenBlock) {
  LocalGroup group(service("streaming-llm", 256), small_model(), store_);
  const SequenceId id{1};
  begin(group, id, prompt_);
  flip({2, 0, 43});
  for (int step = 0; step < 20; ++step) {  // past the block's end
    EXPECT_EQ(failures(group.run(decodes({id})), id), 1) << step;
  }
}

// A step is launched before the tokens of the one ahead are read.
TEST_F(ArenaFaultsTest, TheStepBehindSaysItToo) {
  LocalGroup group(service("streaming-llm", 256), small_model(), store_);
  const SequenceId id{1};
  begin(group, id, prompt_);
  group.run(decodes({id}));
  group.run(decodes({id}));  // a GPU has recorded the step now
  ASSERT_EQ(release(group, id).checksum_failures, 0);

  const SequenceId next{2};  // in the slabs that were given back
  begin(group, next, prompt_);
  for (int head = 0; head < 2; ++head) {
    for (int block = 0; block < 3 * kSegmentBlocks; ++block) flip({1, head, block});
  }
  group.launch(decodes({next}));
  group.launch(decodes({next}));
  EXPECT_GT(failures(group.collect(), next), 0);
  EXPECT_GT(failures(group.collect(), next), 0);
}

TEST_F(ArenaFaultsTest, StreamedAttentionFindsIt) {
  ServiceConfig config = service("full");
  config.kv_resident = "never";
  EXPECT_EQ(failures_in_a_step(config, {2, 1, 20}), 1);
}

// Its keys alone are wanted, of blocks that were not chosen too.
TEST_F(ArenaFaultsTest, CalibrationFindsIt) {
  ServiceConfig config = service("attention-predictor", 192);
  config.calibrate_with = "exact";
  config.calibrate_every = 1;
  EXPECT_GE(failures_in_a_step(config, {2, 1, 20}), 1);
}

TEST_F(ArenaFaultsTest, AnAuditFindsIt) {
  ServiceConfig config = service("attention-predictor", 192);
  config.calibrate_with = "none";
  config.audit_every = 1;
  EXPECT_GE(failures_in_a_step(config, {0, 0, 20}), 1);
}

TEST_F(ArenaFaultsTest, AChoiceAtTheQueryFindsIt) {
  EXPECT_GE(failures_in_a_step(service("oracle", 192), {0, 0, 20}), 1);
}

TEST_F(ArenaFaultsTest, WhatIsNotReadHarmsNobody) {
  ServiceConfig config = service("streaming-llm", 192);
  EXPECT_EQ(failures_in_a_step(config, {0, 0, 20}), 0);
}

TEST_F(ArenaFaultsTest, ASequenceBesideItGoesOn) {
  const auto other = random_prompt(600, 2);
  LocalGroup group(service("streaming-llm", 256), small_model(), store_);
  const SequenceId lost{11};
  const SequenceId kept{12};
  begin(group, lost, prompt_);
  std::vector<TokenId> tokens{begin(group, kept, other).tokens.at(0).token.id};
  flip({1, 1, 42});
  for (int step = 1; step < 10; ++step) {
    const StepResult result = group.run(decodes({lost, kept}));
    EXPECT_EQ(result.lost.size(), 1U);
    EXPECT_GT(failures(result, lost), 0);
    tokens.push_back(result.tokens.at(1).token.id);
  }
  EXPECT_EQ(release(group, kept).checksum_failures, 0);
  EXPECT_EQ(group.generate(other, {.max_tokens = 10}).tokens, tokens);
}

// The next life meets none of the slabs, and computes what the one before had.
TEST_F(ArenaFaultsTest, ALoadedPrefixThatIsBadServesNobodyAgain) {
  LocalGroup group(service("full"), small_model(), store_);
  const Answer clean = group.generate(prompt_, {.max_tokens = 10, .publish = true});
  const SequenceId id{11};
  flip({1, 0, 3});
  flip({0, 1, 30});
  EXPECT_EQ(failures(begin(group, id, prompt_), id), 2);
  EXPECT_EQ(reused_, 512);
  EXPECT_EQ(release(group, id).checksum_failures, 2);

  const SequenceId next{12};
  const StepResult first = begin(group, next, prompt_);
  EXPECT_EQ(reused_, 0);
  EXPECT_TRUE(first.lost.empty());
  EXPECT_EQ(first.tokens.at(0).token.id, clean.tokens[0]);
  EXPECT_EQ(group.run(decodes({next})).tokens.at(0).token.id, clean.tokens[1]);
  EXPECT_EQ(release(group, next).checksum_failures, 0);
  EXPECT_EQ(group.store_stat().slabs_used, 0);
}

}  // namespace
}  // namespace foretoken::worker
