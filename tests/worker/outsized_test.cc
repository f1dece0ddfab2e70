// Sequences that are larger than the arena: what they draw is what they draw with all of their KV
// in host memory.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <array>

#include "tests/worker/local_group.h"
#include "tests/worker/small_model.h"

namespace foretoken::worker {
namespace {

constexpr int kPromptTokens = 2500;  // 10 segments; the answer ends in the 11th
constexpr int kAnswerTokens = 80;
constexpr std::int64_t kMiB = 1 << 20;
// Of 11 slabs a head: in the first a step's blocks mostly have room at once; in the second they
// come a layer at a time.
constexpr std::int64_t kTenSlabs = 16 * kMiB;
constexpr std::int64_t kFiveSlabs = 8 * kMiB;
constexpr std::array kArenas{kTenSlabs, kFiveSlabs};

// Deep, so that a layer is a small part of the KV.
ModelConfig deep_model() {
  ModelConfig config = small_model();
  config.hidden_size = 64;
  config.num_layers = 12;
  config.num_heads = 2;
  config.intermediate_size = 96;
  config.max_position = 2816;
  return config;
}

ServiceConfig predicted() {
  ServiceConfig config = service("attention-predictor", 384);
  config.calibrate_with = "none";
  return config;
}

// Forced tokens: their logprobs tell more than a greedy answer, whose ties may fall otherwise.
const LocalGroup::Options& options() {
  static const LocalGroup::Options options{.max_tokens = kAnswerTokens,
                                           .forced_ids = random_prompt(kAnswerTokens, 32)};
  return options;
}

void expect_equal_logprobs(const Answer& expected, const Answer& actual) {
  ASSERT_EQ(expected.infos.size(), actual.infos.size());
  for (std::size_t i = 0; i < expected.infos.size(); ++i) {
    ASSERT_EQ(expected.infos[i].logprob, actual.infos[i].logprob) << "token " << i;
  }
}

// What makes a step bring a layer at a time: exact calibration and an audit, attention without
// slots, a choice at the query.
std::vector<ServiceConfig> layer_by_layer() {
  ServiceConfig audited = predicted();
  audited.calibrate_with = "exact";
  audited.calibrate_every = 5;
  audited.audit_every = 7;
  ServiceConfig streamed = service("full");
  streamed.kv_resident = "never";
  return {audited, streamed, service("oracle", 384)};
}

class OutsizedTest : public ::testing::Test {
 protected:
  static Answer answer(const ServiceConfig& config, const StoreProcess& store) {
    return LocalGroup(config, deep_model(), store)
        .generate(random_prompt(kPromptTokens, 31), options());
  }
  static Answer in_memory(const ServiceConfig& config) {
    return answer(config, StoreProcess(64 * kMiB));
  }
  static Answer outsized(const ServiceConfig& config, std::int64_t arena) {
    return answer(config, StoreProcess(arena, 64 * kMiB));
  }
  static void expect_equal(const Answer& expected, const Answer& actual) {
    expect_equal_logprobs(expected, actual);
    EXPECT_EQ(expected.report.blocks_fetched, actual.report.blocks_fetched);
    EXPECT_EQ(expected.report.bytes_nvme, 0);
    EXPECT_GT(actual.report.bytes_nvme, 0);
  }
};

TEST_F(OutsizedTest, WaitingIsHavingItInMemory) {
  for (const char* calibration : {"none", "sketch"}) {
    ServiceConfig config = predicted();
    config.calibrate_with = calibration;
    const Answer kept = in_memory(config);
    for (const auto arena : kArenas) expect_equal(kept, outsized(config, arena));
  }
}

TEST_F(OutsizedTest, AttentionOverAllBlocksFindsThemAll) {
  for (const ServiceConfig& config : layer_by_layer()) {
    const Answer kept = in_memory(config);
    for (const auto arena : kArenas) {
      const Answer found = outsized(config, arena);
      expect_equal(kept, found);
      EXPECT_EQ(kept.report.recall_count, found.report.recall_count);
      EXPECT_EQ(kept.report.recall_sum, found.report.recall_sum);
    }
  }
}

TEST_F(OutsizedTest, OthersDecodeBesideIt) {
  const std::vector prompts{random_prompt(kPromptTokens, 33), random_prompt(200, 34)};
  const LocalGroup::Options both{
      .max_tokens = 40, .spare_tokens = 100, .forced_ids = random_prompt(40, 35)};
  const auto run = [&](const StoreProcess& store) {
    return LocalGroup(predicted(), deep_model(), store).generate_batch(prompts, both);
  };
  const auto kept = run(StoreProcess(64 * kMiB));
  for (const auto arena : kArenas) {
    const auto beside = run(StoreProcess(arena, 64 * kMiB));
    for (std::size_t row = 0; row < 2; ++row) expect_equal_logprobs(kept[row], beside[row]);
  }
}

class OutsizedArenaTest : public OutsizedTest, public ::testing::WithParamInterface<std::int64_t> {
 protected:
  static Answer outsized(const ServiceConfig& config) {
    return OutsizedTest::outsized(config, GetParam());
  }
};

INSTANTIATE_TEST_SUITE_P(Arenas, OutsizedArenaTest, ::testing::ValuesIn(kArenas));

TEST_P(OutsizedArenaTest, SkippingKeepsNearlyAllThatWaitingKeeps) {
  ServiceConfig config = predicted();
  config.audit_every = 4;
  const KvReport waited = outsized(config).report;
  config.on_late = "skip";
  const KvReport skipped = outsized(config).report;
  EXPECT_GT(skipped.late, 0);
  const auto recall = [](const KvReport& kv) {
    return kv.recall_sum / static_cast<double>(kv.recall_count);
  };
  EXPECT_NEAR(recall(skipped), recall(waited), 0.02);
  config.audit_every = 0;  // or all steps would come a layer at a time
  for (const TokenInfo& info : outsized(config).infos) EXPECT_LT(info.logprob, 0);
}

TEST_P(OutsizedArenaTest, TheGuardedArenaIsOnlyReadByGathers) {
  ServiceConfig config = predicted();
  const Answer plain = outsized(config);
  config.guard_arena = true;
  expect_equal_logprobs(plain, outsized(config));
}

// The first has seven of ten slabs a head, the second the three that it must have; they turn to a
// new segment at different steps.
TEST(TwoOutsized, DecodeInOneBatch) {
  const std::vector prompts{random_prompt(kPromptTokens, 36),
                            random_prompt(kPromptTokens + 50, 37)};
  std::vector<ServiceConfig> configs = layer_by_layer();
  configs.push_back(predicted());
  for (const ServiceConfig& config : configs) {
    const auto run = [&](const StoreProcess& store) {
      return LocalGroup(config, deep_model(), store).generate_batch(prompts, options());
    };
    const auto kept = run(StoreProcess(64 * kMiB));
    const auto outsized = run(StoreProcess(kTenSlabs, 64 * kMiB));
    for (std::size_t row = 0; row < 2; ++row) {
      expect_equal_logprobs(kept[row], outsized[row]);
      EXPECT_EQ(kept[row].report.bytes_nvme, 0);
      EXPECT_GT(outsized[row].report.bytes_nvme, 0);
    }
  }
}

// Its steps wait for the step before, and for the disk: the tokens of that one go ahead.
TEST(Outsized, LaunchingItsStepsIsMoreThanComputing) {
  const StoreProcess store(kFiveSlabs, 64 * kMiB);
  LocalGroup group(predicted(), deep_model(), store);
  const auto layers = static_cast<int>(deep_model().num_layers);
  const std::vector<int> lengths{200, kPromptTokens};
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const SequenceId id{70 + i};
    StepPlan admit, start, prefill, decode;
    admit.admits = {LocalGroup::admission(id, random_prompt(lengths[i], 31), options())};
    start.starts = {{id, 0}};
    prefill.prefills = {{id, 0, layers, 0, lengths[i]}};
    decode.decodes = {id};
    ASSERT_FALSE(group.run(admit).admits.at(0).error);
    group.run(start);
    const bool fits = i == 0;
    EXPECT_EQ(group.engine().only_computes(prefill), fits);
    EXPECT_EQ(group.engine().only_computes(decode), fits);
  }
}

// While it lives, this process's writes to a file fail from the second MiB on.
class FailingDisk {
 public:
  FailingDisk() {
    handler_ = signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    rlimit limit = before_;
    limit.rlim_cur = kMiB;
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FailingDisk() {
    setrlimit(RLIMIT_FSIZE, &before_);
    signal(SIGXFSZ, handler_);
  }
  FailingDisk(const FailingDisk&) = delete;
  FailingDisk& operator=(const FailingDisk&) = delete;

 private:
  rlimit before_{};
  void (*handler_)(int) = nullptr;
};

// The rank goes on: with the plan that is on its way already, and with whatever comes later.
TEST(OutsizedFaults, ADiskThatFailsInPrefillEndsItsSequenceAlone) {
  const StoreProcess store(kFiveSlabs, 64 * kMiB);
  for (const ServiceConfig& config : {predicted(), service("oracle", 384)}) {
    LocalGroup group(config, deep_model(), store);
    const auto errors_before = group.store_stat().nvme.io_errors;
    const SequenceId id{77};
    StepPlan admit, start, prefill, decode, release;
    admit.admits = {LocalGroup::admission(id, random_prompt(kPromptTokens, 31), options())};
    start.starts = {{id, 0}};
    prefill.prefills = {{id, 0, static_cast<int>(deep_model().num_layers), 0, kPromptTokens}};
    decode.decodes = {id};
    release.releases = {id};
    ASSERT_FALSE(group.run(admit).admits.at(0).error);
    group.run(start);
    {
      const FailingDisk failing;
      group.launch(prefill);
      for (int step = 0; step < 20; ++step) {  // past the end of a block
        group.launch(decode);
        const StepResult result = group.collect();
        ASSERT_EQ(result.lost.size(), 1);
        EXPECT_EQ(result.lost[0].sequence, id);
        EXPECT_EQ(result.lost[0].error.code, ErrorCode::kIo) << result.lost[0].error.message;
      }
      group.collect();
    }
    const StepResult released = group.run(release);
    EXPECT_GT(released.kv_slabs->nvme.io_errors, errors_before);
    EXPECT_EQ(released.stats.at(0).kv.checksum_failures, 0);  // the memory is good
    for (const TokenInfo& info : group.generate(random_prompt(200, 34), {}).infos) {
      EXPECT_LT(info.logprob, 0);
    }
  }
}

}  // namespace
}  // namespace foretoken::worker
