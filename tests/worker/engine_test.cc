// The rank's engine over a real store process: every path that keeps KV somewhere else must give
// the tokens of dense attention, wherever the two best logits are not all but equal.
#include "worker/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "predictor/weights.h"
#include "tests/worker/local_group.h"
#include "tests/worker/small_model.h"

namespace foretoken::worker {
namespace {

constexpr int kBudgetSlots =
    17;  // blocks of a budget of 256, the local window's spare one included
constexpr std::int64_t kArenaBytes = std::int64_t{64} << 20;

class EngineTest : public ::testing::Test {
 protected:
  Answer answer(const ServiceConfig& config, const std::vector<TokenId>& prompt,
                const LocalGroup::Options& options) {
    return LocalGroup(config, small_model(), store_).generate(prompt, options);
  }
  // Device memory for `bytes` beside what a group takes before its first request.
  ServiceConfig with_room(const std::string& policy, std::size_t bytes) {
    ServiceConfig config = service(policy);
    LocalGroup group(config, small_model(), store_);
    for (int use = 0; use < static_cast<int>(kernels::MemoryUse::kCount); ++use) {
      bytes += group.device().memory_in_use(static_cast<kernels::MemoryUse>(use));
    }
    config.device_memory_gib = static_cast<double>(bytes) / (1 << 30);
    return config;
  }
  StoreProcess store_{kArenaBytes};
};

TEST_F(EngineTest, BudgetAsLargeAsTheContextIsDense) {
  const auto prompt = random_prompt(700, 1);
  const LocalGroup::Options options{.max_tokens = 40};
  const Answer dense = answer(service("full"), prompt, options);
  for (const char* per : {"kv-head", "query-head"}) {
    ServiceConfig config = service("attention-predictor", 2048);
    config.predict_per = per;
    expect_same(dense, answer(config, prompt, options));
  }
}

TEST_F(EngineTest, DenseThatDoesNotFitTheDeviceIsStreamed) {
  const auto prompt = random_prompt(1500, 2);
  const LocalGroup::Options options{.max_tokens = 40};
  const Answer dense = answer(service("full"), prompt, options);
  // Room for the least slots and the tables, but not for the 2.3 MiB of all blocks.
  const Answer streamed = answer(with_room("full", 1 << 20), prompt, options);
  EXPECT_LT(streamed.report.device_bytes, dense.report.device_bytes / 2);
  expect_same(dense, streamed);
}

TEST_F(EngineTest, DenseWhoseTablesDoNotFitIsStreamed) {
  const auto prompt = random_prompt(1500, 2);
  const LocalGroup::Options options{.max_tokens = 40};
  const Answer dense = answer(service("full"), prompt, options);
  constexpr std::size_t kBlocks = 97 * 3 * 2;  // of all layers and KV heads
  constexpr std::size_t kBlockBytes = sizeof(std::uint16_t) * 2 * kBlockTokens * 64;
  const Answer streamed = answer(with_room("full", kBlocks * kBlockBytes + 1024), prompt, options);
  EXPECT_LT(streamed.report.device_bytes, dense.report.device_bytes / 2);
  expect_same(dense, streamed);
}

// Of several ranks one alone would stream it, and record other steps than the rest. A CPU records
// none.
TEST_F(EngineTest, DenseThatDoesNotFitOneOfSeveralRanksIsTurnedAwayWhereStepsAreRecorded) {
  ServiceConfig config = with_room("full", 1 << 20);
  config.tensor_parallel_size = 2;
  LocalGroup group(config, small_model(), store_);
  StepPlan plan;
  plan.admits = {LocalGroup::admission(SequenceId{77}, random_prompt(1500, 2), {})};
  const AdmitResult refused = group.run(plan).admits.at(0);
  ASSERT_EQ(refused.error.has_value(), config.device == "cuda");
  if (!refused.error) return;
  EXPECT_EQ(refused.error->code, ErrorCode::kExhausted);
  EXPECT_THAT(refused.error->message, testing::HasSubstr("--kv-resident never"));
  EXPECT_TRUE(refused.device_is_full);
}

TEST_F(EngineTest, DenseIsStreamedWhereThatIsAskedFor) {
  const auto prompt = random_prompt(1500, 2);
  const LocalGroup::Options options{.max_tokens = 40};
  ServiceConfig config = service("full");
  const Answer dense = answer(config, prompt, options);
  config.kv_resident = "never";
  const Answer streamed = answer(config, prompt, options);
  EXPECT_LT(streamed.report.device_bytes, dense.report.device_bytes / 2);
  expect_same(dense, streamed);
}

TEST_F(EngineTest, AutoIsDenseWhileAllFits) {
  const auto prompt = random_prompt(700, 15);
  const LocalGroup::Options options{.max_tokens = 40};
  const Answer dense = answer(service("full"), prompt, options);
  const Answer automatic = answer(service("auto", 256), prompt, options);
  EXPECT_EQ(dense.tokens, automatic.tokens);
  EXPECT_EQ(automatic.report.blocks_predicted, 0);
}

// A budget that holds all blocks so far, if not all that there may be: what is attended after the
// spill is what was attended before, from other slots.
TEST_F(EngineTest, ASpillWithinTheBudgetChangesNothing) {
  const auto prompt = random_prompt(700, 16);
  LocalGroup::Options options{
      .max_tokens = 200, .spare_tokens = 600, .forced_ids = random_prompt(200, 17)};
  const Answer dense = answer(service("full"), prompt, options);
  for (const int step : {1, 2, 7, 150}) {
    options.spill_at = step;
    const Answer spilled = answer(service("auto"), prompt, options);
    for (std::size_t i = 0; i < 200; ++i) {
      EXPECT_NEAR(spilled.infos[i].logprob, dense.infos[i].logprob, 0.02) << step << ", " << i;
    }
    EXPECT_GT(spilled.report.blocks_predicted, 0);
    EXPECT_LT(spilled.report.device_bytes, dense.report.device_bytes);
  }
}

TEST_F(EngineTest, ASequenceMaySpillBeforeItDecodes) {
  const auto prompt = random_prompt(700, 19);
  const LocalGroup::Options options{.max_tokens = 40, .spare_tokens = 600};
  const Answer dense = answer(service("full"), prompt, options);
  for (const int before_layer : {0, 1, 2}) {
    LocalGroup group(service("auto"), small_model(), store_);
    const SequenceId id{200};
    StepPlan plan;
    plan.admits = {LocalGroup::admission(id, prompt, options)};
    ASSERT_FALSE(group.run(plan).admits.at(0).error);
    plan = {};
    plan.starts = {{id, 0}};
    Answer spilled;
    for (int layer = 0; layer < 3; ++layer) {
      if (layer == before_layer) plan.spills = {id};
      plan.prefills = {{id, layer, layer + 1, 0, 700}};
      const StepResult result = group.run(plan);
      if (layer == 2) spilled.infos.push_back(result.tokens.at(0).token);
      plan = {};
    }
    plan.decodes = {id};
    for (int i = 1; i < 40; ++i) spilled.infos.push_back(group.run(plan).tokens.at(0).token);
    for (const TokenInfo& info : spilled.infos) spilled.tokens.push_back(info.id);
    expect_same(dense, spilled);
  }
}

TEST_F(EngineTest, ASpilledSequenceDecodesBesideADenseOne) {
  const std::vector prompts{random_prompt(700, 21), random_prompt(500, 22)};
  const LocalGroup::Options options{.max_tokens = 40, .spare_tokens = 600, .spill_at = 10};
  const auto together =
      LocalGroup(service("auto"), small_model(), store_).generate_batch(prompts, options);
  expect_same(answer(service("full"), prompts[0], options), together[0]);
  expect_same(answer(service("full"), prompts[1], options), together[1]);
  EXPECT_GT(together[0].report.blocks_predicted, 0);
  EXPECT_EQ(together[1].report.blocks_predicted, 0);
  EXPECT_LT(together[0].report.device_bytes, together[1].report.device_bytes);
}

// The reference has the dense tokens in its prompt, so that its history starts with the rows of the
// last 64 queries, as the spilled one's does. Rounding may swap blocks that are all but equal.
TEST_F(EngineTest, ASpilledSequenceIsPredictedAsIfItsDenseTokensWereItsPrompt) {
  const auto tokens = random_prompt(1000 + 30, 18);
  const auto part = [&](int begin, int end) {
    return std::vector(tokens.begin() + begin, tokens.begin() + end);
  };
  ServiceConfig config = service("auto", 384);
  config.calibrate_with = "none";
  config.audit_every = 1;
  const Answer spilled = answer(
      config, part(0, 900), {.max_tokens = 130, .forced_ids = part(900, 1030), .spill_at = 101});
  config.kv_policy = "attention-predictor";
  const Answer reference =
      answer(config, part(0, 1000), {.max_tokens = 30, .forced_ids = part(1000, 1030)});
  double difference = 0;
  for (std::size_t i = 0; i < 30; ++i) {
    difference += std::abs(spilled.infos[100 + i].logprob - reference.infos[i].logprob) / 30;
  }
  EXPECT_LT(difference, 0.02);
  // The dense steps keep all attention.
  const auto lost = [](const KvReport& kv) {
    return static_cast<double>(kv.recall_count) - kv.recall_sum;
  };
  EXPECT_GT(lost(reference.report), 0);
  EXPECT_NEAR(lost(spilled.report), lost(reference.report), 0.02 * lost(reference.report));
}

TEST_F(EngineTest, PrefillInPiecesIsThePrefill) {
  const auto prompt = random_prompt(700, 3);
  const Answer whole = answer(service("full"), prompt, {.max_tokens = 20});
  for (const int tokens : {700, 256, 100, 37}) {
    expect_same(whole,
                answer(service("full"), prompt, {.max_tokens = 20, .tokens_per_item = tokens}));
  }
}

TEST_F(EngineTest, WarmingUpLeavesNothingBehind) {
  const auto prompt = random_prompt(700, 3);
  LocalGroup group(service("attention-predictor", 512), small_model(), store_);
  const Answer cold = group.generate(prompt, {.max_tokens = 20});
  group.warm_up();
  expect_same(cold, group.generate(prompt, {.max_tokens = 20}));
}

TEST_F(EngineTest, AReusedPrefixGivesTheSameTokens) {
  const auto prompt = random_prompt(900, 4);
  for (const char* policy : {"full", "attention-predictor"}) {
    const StoreProcess store(kArenaBytes);
    LocalGroup group(service(policy, 512), small_model(), store);
    const Answer first = group.generate(prompt, {.max_tokens = 30, .publish = true});
    EXPECT_EQ(first.reused_tokens, 0);
    const Answer second = group.generate(prompt, {.max_tokens = 30});
    EXPECT_EQ(second.reused_tokens, 768);
    expect_same(first, second);
    EXPECT_EQ(group.store_stat().slabs_used, 0);
  }
}

// What the sketches of a cached prefix are made of comes from the arena.
TEST_F(EngineTest, AReusedPrefixHasItsSketches) {
  const auto prompt = random_prompt(900, 4);
  ServiceConfig config = service("attention-predictor", 256);
  config.calibrate_with = "sketch";
  config.calibrate_every = 1;
  LocalGroup group(config, small_model(), store_);
  const LocalGroup::Options options{
      .max_tokens = 40, .publish = true, .forced_ids = random_prompt(40, 15)};
  const Answer first = group.generate(prompt, options);
  const Answer second = group.generate(prompt, options);
  EXPECT_EQ(second.reused_tokens, 768);
  for (std::size_t i = 0; i < first.infos.size(); ++i) {
    EXPECT_NEAR(first.infos[i].logprob, second.infos[i].logprob, 0.02) << i;
  }
  EXPECT_EQ(group.device().memory_in_use(kernels::MemoryUse::kSketches), 0);
}

TEST_F(EngineTest, BatchedSequencesGetTheTokensTheyGetAlone) {
  std::vector<std::vector<TokenId>> prompts;
  for (unsigned i = 0; i < 4; ++i) prompts.push_back(random_prompt(200 + 333 * i, 10 + i));
  for (const char* policy : {"full", "streaming-llm"}) {
    LocalGroup group(service(policy, 512), small_model(), store_);
    const auto together = group.generate_batch(prompts, {.max_tokens = 24});
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      expect_same(group.generate(prompts[i], {.max_tokens = 24}), together[i]);
    }
  }
}

// A random model's attention is flat, so rounding (a batch's products are summed in another order
// than one row's) may swap blocks that are all but equal: forced tokens, and what they are worth.
TEST_F(EngineTest, BatchedChoicesAreWorthTheSame) {
  std::vector<std::vector<TokenId>> prompts;
  for (unsigned i = 0; i < 3; ++i) prompts.push_back(random_prompt(500 + 333 * i, 20 + i));
  const LocalGroup::Options options{.max_tokens = 24, .forced_ids = random_prompt(24, 23)};
  for (const char* policy : {"attention-predictor", "oracle"}) {
    LocalGroup group(service(policy, 512), small_model(), store_);
    const auto together = group.generate_batch(prompts, options);
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const Answer alone = group.generate(prompts[i], options);
      double difference = 0;
      for (std::size_t t = 0; t < 24; ++t) {
        difference += std::abs(alone.infos[t].logprob - together[i].infos[t].logprob) / 24;
      }
      EXPECT_LT(difference, 0.1) << policy;
    }
  }
}

// On a GPU also: recorded steps (guarded ones are not) are the steps.
TEST_F(EngineTest, DecodesWithTheArenaUnmappedOutsideGatherAndWrite) {
  const auto prompt = random_prompt(1000, 5);
  for (const std::string calibration : {"none", "sketch", "exact"}) {
    ServiceConfig config = service("attention-predictor", 256);
    config.calibrate_with = calibration;
    config.calibrate_every = 2;
    const Answer plain = answer(config, prompt, {.max_tokens = 200});
    config.guard_arena = true;
    const Answer guarded = answer(config, prompt, {.max_tokens = 200});
    EXPECT_EQ(plain.tokens, guarded.tokens) << calibration;
    EXPECT_GT(guarded.report.blocks_fetched, 0);
    const std::int64_t fetched = guarded.report.blocks_fetched * 4096;
    EXPECT_EQ(guarded.report.bytes_host > fetched, calibration == "exact");
  }
}

// With as many layers as steps between calibrations, each step calibrates one layer.
TEST_F(EngineTest, NoStepCalibratesAllLayers) {
  ServiceConfig config = service("attention-predictor", 256);
  config.calibrate_with = "exact";
  config.calibrate_every = 3;
  const auto prompt = random_prompt(1009, 16);  // 64 blocks to the end
  for (const int steps : {1, 2, 3, 7}) {
    const KvReport report = answer(config, prompt, {.max_tokens = steps + 1}).report;
    const std::int64_t layers = (report.bytes_host - report.blocks_fetched * 4096) /
                                ((64 - kBudgetSlots) * std::int64_t{2 * 4096});
    EXPECT_EQ(layers, steps);
  }
}

TEST_F(EngineTest, SketchesAreCountedInTheDevicesMemory) {
  const auto prompt = random_prompt(700, 17);
  ServiceConfig config = service("attention-predictor", 256);
  config.calibrate_with = "none";
  const Answer without = answer(config, prompt, {.max_tokens = 4});
  config.calibrate_with = "sketch";
  const Answer with = answer(config, prompt, {.max_tokens = 4});
  // 44 blocks of 3 layers and 2 heads, 7 bytes a dim.
  EXPECT_EQ(with.report.device_bytes - without.report.device_bytes, 44 * 3 * 2 * 7 * 64);
  // A policy that has no history calibrates by nothing.
  config.kv_policy = "streaming-llm";
  EXPECT_EQ(answer(config, prompt, {.max_tokens = 20}).tokens.size(), 20U);
}

// 704 tokens are 44 blocks. A slot has, in each of 3 layers, a block of 4096 bytes for each of 2 KV
// heads, and where attention is observed a block maximum for each of 6 query heads.
TEST_F(EngineTest, BlockMaximaAreTheSequencesOwn) {
  const SequenceId id{200};
  StepPlan admit;
  admit.admits = {LocalGroup::admission(id, random_prompt(700, 18), {.max_tokens = 4})};
  StepPlan spill;
  spill.starts = {{id, 0}};
  spill.spills = {id};
  const auto in_use = [&](const char* policy, const std::vector<StepPlan>& plans,
                          kernels::MemoryUse use) {
    LocalGroup group(service(policy, 256), small_model(), store_);
    for (const StepPlan& plan : plans) group.run(plan);
    return group.device().memory_in_use(use);
  };
  constexpr std::size_t kSlot = std::size_t{3} * 2 * 4096;
  constexpr std::size_t kObservedSlot = kSlot + 3 * 6 * sizeof(float);
  using enum kernels::MemoryUse;
  EXPECT_EQ(in_use("auto", {admit}, kKvSlots), 44 * kObservedSlot);
  EXPECT_EQ(in_use("auto", {admit, spill}, kKvSlots), kBudgetSlots * kObservedSlot);
  EXPECT_EQ(in_use("streaming-llm", {admit}, kKvSlots), kBudgetSlots * kSlot);
  EXPECT_EQ(in_use("attention-predictor", {}, kActivations),
            in_use("streaming-llm", {}, kActivations));
}

TEST_F(EngineTest, AuditOfDenseAttentionFindsNothingLost) {
  ServiceConfig config = service("full");
  config.audit_every = 3;
  const Answer dense = answer(config, random_prompt(400, 6), {.max_tokens = 20});
  ASSERT_GT(dense.report.recall_count, 0);
  EXPECT_NEAR(dense.report.recall_sum / static_cast<double>(dense.report.recall_count), 1, 1e-4);
  EXPECT_NEAR(dense.report.kl_sum / static_cast<double>(dense.report.kl_count), 0, 1e-4);
}

TEST_F(EngineTest, AuditDoesNotChangeTheAnswer) {
  ServiceConfig config = service("attention-predictor", 256);
  const auto prompt = random_prompt(1200, 7);
  const Answer plain = answer(config, prompt, {.max_tokens = 40});
  config.audit_every = 2;
  const Answer audited = answer(config, prompt, {.max_tokens = 40});
  EXPECT_EQ(plain.tokens, audited.tokens);
  const double recall =
      audited.report.recall_sum / static_cast<double>(audited.report.recall_count);
  EXPECT_GT(recall, 0.05);
  EXPECT_LT(recall, 1.0);
}

// It waits for its figures: the tokens of the step before go ahead.
TEST_F(EngineTest, LaunchingAnAuditIsMoreThanComputing) {
  ServiceConfig config = service("attention-predictor", 256);
  config.audit_every = 2;
  LocalGroup group(config, small_model(), store_);
  const SequenceId id{1};
  const auto prompt = random_prompt(300, 8);
  StepPlan admit, start, prefill, decode;
  admit.admits = {LocalGroup::admission(id, prompt, {.max_tokens = 9})};
  start.starts = {{id, 0}};
  prefill.prefills = {{id, 0, static_cast<int>(small_model().num_layers), 0, 300}};
  decode.decodes = {id};
  ASSERT_FALSE(group.run(admit).admits.at(0).error);
  group.run(start);
  EXPECT_TRUE(group.engine().only_computes(prefill));
  group.run(prefill);
  for (int step = 0; step < 4; ++step) {
    EXPECT_EQ(group.engine().only_computes(decode), step % 2 == 1) << step;
    group.run(decode);
  }
}

// Every head of a flat model is below the bound: found by the first step, which is an audit.
TEST_F(EngineTest, HeadsThatKeepTooLittleAttendAllBlocks) {
  const auto prompt = random_prompt(1200, 24);
  const LocalGroup::Options options{.max_tokens = 30, .forced_ids = random_prompt(30, 25)};
  const Answer dense = answer(service("full"), prompt, options);
  ServiceConfig config = service("attention-predictor", 256);
  config.audit_every = 10;
  config.min_recall = 0.999;
  const Answer rescued = answer(config, prompt, options);
  for (std::size_t i = 0; i < 30; ++i) {
    EXPECT_NEAR(rescued.infos[i].logprob, dense.infos[i].logprob, 0.02) << i;
  }
  EXPECT_EQ(rescued.report.dense_fallbacks, 29 * 3 * 2);  // steps, layers, KV heads
  EXPECT_EQ(rescued.report.dense_capped, 0);
  EXPECT_EQ(rescued.report.recall_sum, static_cast<double>(rescued.report.recall_count));
}

TEST_F(EngineTest, TheHeadsThatAttendAllBlocksAreCappedAStep) {
  ServiceConfig config = service("attention-predictor", 256);
  config.audit_every = 1;
  config.min_recall = 0.999;
  config.max_dense_heads = 2;
  LocalGroup group(config, small_model(), store_);
  const auto answers =
      group.generate_batch({random_prompt(1200, 26), random_prompt(1000, 27)}, {.max_tokens = 11});
  EXPECT_EQ(answers[0].report.dense_fallbacks + answers[1].report.dense_fallbacks, 10 * 2);
  EXPECT_EQ(answers[0].report.dense_capped + answers[1].report.dense_capped, 10 * (2 * 6 - 2));
}

TEST_F(EngineTest, ABoundThatAllHeadsKeepChangesNothing) {
  ServiceConfig config = service("attention-predictor", 256);
  config.audit_every = 4;
  const auto prompt = random_prompt(1200, 28);
  const Answer plain = answer(config, prompt, {.max_tokens = 20});
  config.min_recall = 0.001;
  const Answer bounded = answer(config, prompt, {.max_tokens = 20});
  EXPECT_EQ(plain.tokens, bounded.tokens);
  EXPECT_EQ(bounded.report.dense_fallbacks, 0);
}

// The oracle keeps the most attention there is to keep, block for block; a sliding window less.
TEST_F(EngineTest, RecallOrdersThePolicies) {
  const auto prompt = random_prompt(1500, 8);
  const auto recall = [&](const char* policy) {
    ServiceConfig config = service(policy, 384);
    config.audit_every = 1;
    config.calibrate_every = 5;
    const Answer full = answer(config, prompt, {.max_tokens = 40});
    return full.report.recall_sum / static_cast<double>(full.report.recall_count);
  };
  const double oracle = recall("oracle");
  const double window = recall("streaming-llm");
  EXPECT_GT(oracle, window);
}

// Weights that overflow float in the second layer: no map ever has finite scores.
std::filesystem::path overflowing_weights() {
  std::ifstream in(predictor::published_weights(), std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(in), {});
  std::uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  constexpr float kHuge = 1e38F;
  for (std::size_t at = sizeof header + header; at < bytes.size(); at += sizeof kHuge) {
    std::memcpy(&bytes[at], &kHuge, sizeof kHuge);
  }
  const auto path = std::filesystem::path(testing::TempDir()) / "overflowing_weights.safetensors";
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

TEST_F(EngineTest, TheReportCountsMapsThatHadNoFiniteScores) {
  ServiceConfig config = service("attention-predictor", 256);
  if (config.device == "cuda") GTEST_SKIP() << "the CUDA predictor refuses such weights";
  const auto prompt = random_prompt(1000, 12);
  EXPECT_EQ(answer(config, prompt, {.max_tokens = 5}).report.predictor_fallbacks, 0);
  config.predictor_weights = overflowing_weights();
  const Answer blind = answer(config, prompt, {.max_tokens = 5});
  // 3 layers x 2 maps, chosen for after the prompt and after each of the 4 steps.
  EXPECT_EQ(blind.report.predictor_fallbacks, 5 * 6);
  EXPECT_EQ(blind.tokens.size(), 5U);
}

// Random weights, but for the embedding of one token, which is infinite.
class OverflowingToken final : public WeightSource {
 public:
  explicit OverflowingToken(TokenId token) : token_(token) {}
  std::string_view name() const override { return others_->name(); }
  Result<TensorView> tensor(const std::string& name,
                            std::span<const std::int64_t> shape) const override {
    TensorView view = others_->tensor(name, shape).value_or_throw();
    if (name != "model.embed_tokens.weight") return view;
    constexpr std::uint16_t kInfinity = 0x7F80;  // bf16
    const auto width = static_cast<std::size_t>(shape[1]);
    embeddings_.resize(view.bytes.size() / sizeof kInfinity);
    std::memcpy(embeddings_.data(), view.bytes.data(), view.bytes.size());
    std::fill_n(embeddings_.begin() + static_cast<std::ptrdiff_t>(width) * token_, width,
                kInfinity);
    view.bytes = std::as_bytes(std::span(embeddings_));
    return view;
  }

 private:
  const TokenId token_;
  const std::unique_ptr<WeightSource> others_ = make_dummy_source(small_model());
  mutable std::vector<std::uint16_t> embeddings_;
};

TEST_F(EngineTest, LogitsThatAreNotFiniteFailTheirRequestAlone) {
  const TokenId overflows{511};
  const auto good = random_prompt(100, 30);
  ASSERT_EQ(std::ranges::count(good, overflows), 0);
  const LocalGroup::Options options{.max_tokens = 4, .forced_ids = {1, 2, overflows, 4}};
  LocalGroup group(service("full"), small_model(), store_, kernels::HistoryType::kBf16,
                   make_single_collective(), std::make_unique<OverflowingToken>(overflows));
  const SequenceId ids[] = {SequenceId{1}, SequenceId{2}};
  StepPlan plan;
  for (const SequenceId id : ids) {
    plan.admits.push_back(LocalGroup::admission(id, good, options));
    plan.starts.push_back({id, 0});
    plan.prefills.push_back({id, 0, 3, 0, 100});
  }
  plan.admits[1].forced_ids.clear();
  EXPECT_TRUE(group.run(plan).lost.empty());
  plan = {};
  plan.decodes = {ids[0], ids[1]};
  for (int i = 1; i < 3; ++i) EXPECT_TRUE(group.run(plan).lost.empty());
  // The third token is read by the step that draws the fourth.
  const StepResult result = group.run(plan);
  ASSERT_EQ(result.lost.size(), 1U);
  EXPECT_EQ(result.lost[0].sequence, ids[0]);
  EXPECT_EQ(result.lost[0].error.code, ErrorCode::kDevice);
  EXPECT_THAT(result.lost[0].error.message, testing::HasSubstr("not finite"));
  plan.decodes = {ids[1]};
  plan.releases = {ids[0]};
  EXPECT_TRUE(group.run(plan).lost.empty());
}

TEST_F(EngineTest, ForcedTokensAreTakenAndScored) {
  const auto forced = random_prompt(10, 9);
  const Answer forced_answer =
      answer(service("full"), random_prompt(100, 10), {.max_tokens = 10, .forced_ids = forced});
  EXPECT_EQ(forced_answer.tokens, forced);
  EXPECT_LT(forced_answer.infos[0].logprob, 0);
}

// Logits over such a temperature would not be finite.
TEST_F(EngineTest, ATinyTemperatureIsGreedy) {
  LocalGroup group(service("full"), small_model(), store_);
  const auto first_token = [&](int id, const SamplingParams& sampling) {
    StepPlan plan;
    plan.admits = {LocalGroup::admission(SequenceId(id), random_prompt(100, 29), {})};
    plan.admits[0].sampling = sampling;
    plan.starts = {{SequenceId(id), 0}};
    plan.prefills = {{SequenceId(id), 0, 3, 0, 100}};
    return group.run(plan).tokens.at(0).token;
  };
  const TokenInfo greedy = first_token(1, {.temperature = 0});
  EXPECT_EQ(first_token(2, {.temperature = 1e-40F}), greedy);
  EXPECT_EQ(first_token(3, {.temperature = 1e-40F, .top_p = 0.9F}), greedy);
  EXPECT_EQ(first_token(4, {.temperature = 1e-6F, .top_k = 3}), greedy);
}

TEST_F(EngineTest, ASequenceThatDoesNotFitIsTurnedAwayAndLeavesNothing) {
  LocalGroup group(with_room("attention-predictor", 1 << 19), small_model(), store_);
  const std::size_t before = group.device().memory_in_use(kernels::MemoryUse::kKvSlots);
  try {
    group.generate(random_prompt(1900, 11), {.max_tokens = 10});
    FAIL() << "it fitted";
  } catch (const Exception& failure) {
    EXPECT_EQ(failure.error().code, ErrorCode::kExhausted) << failure.what();
    EXPECT_THAT(failure.what(),
                testing::HasSubstr("lower --max-model-len or --max-batched-tokens"));
  }
  EXPECT_EQ(group.device().memory_in_use(kernels::MemoryUse::kKvSlots), before);
  EXPECT_EQ(group.store_stat().slabs_used, 0);
}

// Two sequences read a cached prefix; the group then agrees on none of it for the second one, and
// nobody has slabs to swap for the shared ones.
TEST_F(EngineTest, AStartWithoutRoomToSwapFailsThatSequenceAlone) {
  const StoreProcess scarce(std::int64_t{4} << 20);  // 10 slabs a head
  LocalGroup group(service("full"), small_model(), scarce);
  const auto prompt = random_prompt(600, 13);
  const LocalGroup::Options options{.max_tokens = 10, .publish = true};
  const Answer before = group.generate(prompt, options);  // two segments stay cached
  const auto admit = [&](int id, const std::vector<TokenId>& tokens) {
    StepPlan plan;
    plan.admits = {LocalGroup::admission(SequenceId(id), tokens, options)};
    const AdmitResult result = group.run(plan).admits.at(0);
    EXPECT_FALSE(result.error);
    return result.reusable_tokens;
  };
  EXPECT_EQ(admit(101, prompt), 512);
  EXPECT_EQ(admit(102, prompt), 512);
  admit(103, random_prompt(1500, 14));  // takes the rest
  StepPlan starts;
  starts.starts = {{SequenceId{101}, 512}, {SequenceId{102}, 0}};
  const StepResult started = group.run(starts);
  ASSERT_EQ(started.admits.size(), 2U);
  EXPECT_FALSE(started.admits[0].error);
  ASSERT_TRUE(started.admits[1].error);
  EXPECT_EQ(started.admits[1].error->code, ErrorCode::kExhausted);

  StepPlan goes_on;
  goes_on.releases = {SequenceId{102}};
  goes_on.prefills = {{SequenceId{101}, 0, 3, 512, 600}};
  EXPECT_EQ(group.run(goes_on).tokens.at(0).token.id, before.tokens[0]);
}

TEST_F(EngineTest, SaysHowManyTokensAStepMayPrefill) {
  LocalGroup group(service("full"), small_model(), store_);
  EXPECT_EQ(group.engine().capacity().max_batched_tokens, 128);
}

// An arena whose memory was short counts in the store's answer too; what it was planned for does
// not.
TEST_F(EngineTest, SaysWhatTheStoreHoldsNow) {
  {
    LocalGroup before(service("full"), small_model(), store_);
    before.generate(random_prompt(600, 18), {.max_tokens = 1, .publish = true});
  }
  LocalGroup group(service("full"), small_model(), store_);
  const kvstore::StoreStat stat = group.store_stat();
  const KvSlabs slabs = group.engine().capacity().kv_slabs;
  EXPECT_GE(slabs.cached, 2);
  EXPECT_EQ(slabs.total, stat.slabs_total);
  EXPECT_EQ(slabs.free, stat.slabs_total - stat.slabs_used - stat.slabs_cached);
  EXPECT_GT(slabs.ready, 0);
}

TEST_F(EngineTest, MemoryPlanNamesEachUseAndTheLongestSequence) {
  LocalGroup group(service("attention-predictor"), small_model(), store_);
  const std::string plan = group.engine().memory_plan();
  for (const char* row :
       {"\n  weights ", "\n  prefill scratch ", "\n  sums over ranks ", "\n  free, for sequences ",
        "\n  a sequence of 2048 tokens ", "\n    KV slots ", "\n    key sketches "}) {
    EXPECT_NE(plan.find(row), std::string::npos) << row << "in\n" << plan;
  }
}

}  // namespace
}  // namespace foretoken::worker
