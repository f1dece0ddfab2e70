#include "tests/worker/local_group.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <random>
#include <thread>
#include <utility>

#include "common/check.h"
#include "kvstore/internal/seqpacket.h"

extern char** environ;

namespace foretoken::worker {
namespace {

constexpr Epoch kEpoch{1};

predictor::PolicyConfig policy_config(const ServiceConfig& config, kernels::HistoryType history,
                                      const kernels::Device& device) {
  return {.kind = *predictor::policy_from_name(config.kv_policy),
          .budget_tokens = config.kv_budget,
          .predict_per = config.predict_per == "query-head" ? predictor::PredictPer::kQueryHead
                                                            : predictor::PredictPer::kKvHead,
          .budget_per = config.kv_budget_per == "query-head" ? predictor::BudgetPer::kQueryHead
                                                             : predictor::BudgetPer::kKvHead,
          .history_type = history,
          .history_fill = predictor::HistoryFill::kZero,
          .residency = residency_of(config, device),
          .calibration = *predictor::calibration_from_name(config.calibrate_with, device),
          .weights = config.predictor_weights};
}

std::unique_ptr<kernels::Device> device_for(const ServiceConfig& config) {
  const auto bytes = static_cast<std::size_t>(config.device_memory_gib * (1 << 30));
  if (config.device == "cuda") return kernels::make_cuda_device({.memory_bytes = bytes});
  return kernels::make_cpu_device({.num_threads = config.threads_per_rank, .memory_bytes = bytes});
}

}  // namespace

StoreProcess::StoreProcess(std::int64_t arena_bytes, std::int64_t nvme_bytes) {
  std::string pattern = (std::filesystem::temp_directory_path() / "foretoken-test-XXXXXX").string();
  FT_CHECK(mkdtemp(pattern.data()) != nullptr, pattern);
  folder_ = pattern;
  const std::string path = socket();
  std::string bytes = std::to_string(arena_bytes);
  const char* elsewhere = std::getenv("FORETOKEN_KVSTORE");  // where the build tree isn't
  std::vector<std::string> words{elsewhere != nullptr ? elsewhere : FORETOKEN_KVSTORE,
                                 "--socket",
                                 path,
                                 "--arena-bytes",
                                 bytes,
                                 "--die-with-parent"};
  if (nvme_bytes > 0) {
    words.insert(words.end(), {"--nvme-path", (folder_ / "kv").string(), "--nvme-bytes",
                               std::to_string(nvme_bytes)});
  }
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const int status = posix_spawn(&pid_, argv[0], nullptr, nullptr, argv.data(), environ);
  FT_CHECK(status == 0, argv[0], status);
  // The socket is there before anybody listens to it.
  constexpr std::chrono::seconds kTimeout{1};
  for (int i = 0; i < 1000 && !kvstore::connect_to(path, kTimeout); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

StoreProcess::~StoreProcess() {
  kill(pid_, SIGTERM);
  waitpid(pid_, nullptr, 0);
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void StoreProcess::damage(std::size_t offset, std::byte flipped) const {
  const auto descriptors = std::filesystem::path("/proc") / std::to_string(pid_) / "fd";
  for (const auto& entry : std::filesystem::directory_iterator(descriptors)) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (!target.starts_with("/memfd:")) continue;
    std::fstream arena(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    const auto at = static_cast<std::streamoff>(offset);
    const auto byte = static_cast<std::byte>(arena.seekg(at).get());
    arena.seekp(at).put(static_cast<char>(byte ^ flipped)).flush();
    FT_CHECK(arena.good(), offset);
    return;
  }
  FT_CHECK(false, pid_);
}

LocalGroup::LocalGroup(const ServiceConfig& config, const ModelConfig& model,
                       const StoreProcess& store, kernels::HistoryType history,
                       std::unique_ptr<Collective> collective,
                       std::unique_ptr<WeightSource> weights)
    : model_config_(model), device_(device_for(config)), collective_(std::move(collective)) {
  const Partition part = make_partition(model, 0, 1).value_or_throw();
  if (weights == nullptr) weights = make_dummy_source(model);
  LoadProgress progress(LoadProgress::Style::kNone);
  model_ = Model::load(model, *weights, part, *device_, *collective_, progress).value_or_throw();
  policy_ =
      predictor::make_policy(policy_config(config, history, *device_),
                             {.kv = model_->kv_shape(), .num_heads = part.heads.count}, *device_)
          .value_or_throw();
  store_ = kvstore::KvStore::connect({.socket_path = store.socket(),
                                      .group = 0,
                                      .rank = 0,
                                      .epoch = kEpoch,
                                      .model_hash = "random",
                                      .total_kv_heads = static_cast<int>(model.num_kv_heads),
                                      .first_head = 0,
                                      .shape = model_->kv_shape(),
                                      .guard_arena = config.guard_arena},
                                     *device_)
               .value_or_throw();
  while (store_stat().slabs_ready < store_stat().slabs_total) {  // pre-faulted in the background
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  engine_ = std::make_unique<Engine>(config, static_cast<int>(model.max_position),
                                     Engine::Parts{*device_, *store_, *policy_, *model_});
}

LocalGroup::~LocalGroup() = default;

ServiceConfig service(const std::string& policy, int budget) {
  ServiceConfig config;
  config.kv_policy = policy;
  config.kv_budget = budget;
  config.threads_per_rank = 2;
  config.device_memory_gib = 0.5;
  config.max_batched_tokens = 128;
  config.max_num_seqs = 4;
  // The same tests on a GPU: FORETOKEN_TEST_DEVICE=cuda worker_test
  const char* device = std::getenv("FORETOKEN_TEST_DEVICE");
  config.device = device != nullptr ? device : "cpu";
  return config;
}

std::vector<TokenId> random_prompt(int length, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> prompt(static_cast<std::size_t>(length));
  for (TokenId& token : prompt) token = static_cast<TokenId>(random() % 512);
  return prompt;
}

void expect_same(const Answer& expected, const Answer& actual) {
  ASSERT_EQ(expected.infos.size(), actual.infos.size());
  for (std::size_t i = 0; i < expected.infos.size(); ++i) {
    const auto& top = expected.infos[i].top;
    if (top[0].logprob - top[1].logprob < 0.05F) return;
    ASSERT_EQ(expected.tokens[i], actual.tokens[i]) << "token " << i;
    ASSERT_NEAR(expected.infos[i].logprob, actual.infos[i].logprob, 0.05) << "token " << i;
  }
}

std::vector<PrefixKey> dense_keys(const std::vector<TokenId>& prompt) {
  std::vector<PrefixKey> keys;
  PrefixKey parent = root_key("", "random", "bf16");
  const std::size_t segments = prompt.size() < 64 ? 0 : (prompt.size() - 64) / kSegmentTokens;
  for (std::size_t i = 0; i < segments; ++i) {
    parent =
        prefix_key(parent, "dense", std::span(prompt).subspan(i * kSegmentTokens, kSegmentTokens));
    keys.push_back(parent);
  }
  return keys;
}

void LocalGroup::launch(StepPlan plan) {
  plan.epoch = kEpoch;
  plan.step = StepNumber{next_step_++};
  engine_->launch(plan);
}

StepResult LocalGroup::run(StepPlan plan) {
  launch(std::move(plan));
  return collect();
}

AdmitSequence LocalGroup::admission(SequenceId id, const std::vector<TokenId>& prompt,
                                    const Options& options) {
  AdmitSequence admit{.sequence = id,
                      .prompt = prompt,
                      .max_length = static_cast<std::int64_t>(prompt.size()) + options.max_tokens +
                                    options.spare_tokens,
                      .sampling = {},
                      .forced_ids = options.forced_ids,
                      .prefix_keys = dense_keys(prompt),
                      .dense = true};
  admit.sampling.temperature = 0;
  admit.sampling.num_logprobs = 2;
  return admit;
}

std::int64_t LocalGroup::admit(SequenceId id, const std::vector<TokenId>& prompt,
                               const Options& options) {
  StepPlan plan;
  plan.admits = {admission(id, prompt, options)};
  const StepResult result = run(plan);
  if (result.admits.at(0).error) throw Exception(*result.admits[0].error);
  StepPlan start;
  start.starts = {{id, result.admits[0].reusable_tokens}};
  run(start);
  return result.admits[0].reusable_tokens;
}

TokenInfo LocalGroup::prefill(SequenceId id, int length, std::int64_t reused,
                              const Options& options) {
  const int layers = model_->num_layers();
  StepPlan plan;
  if (options.tokens_per_item == 0) {
    plan.prefills = {{id, 0, layers, reused, length}};
    return run(plan).tokens.at(0).token;
  }
  StepResult result;
  for (int layer = 0; layer < layers; ++layer) {
    for (std::int64_t begin = reused; begin < length; begin += options.tokens_per_item) {
      plan.prefills = {{id, layer, layer + 1, begin,
                        std::min<std::int64_t>(length, begin + options.tokens_per_item)}};
      result = run(plan);
    }
  }
  return result.tokens.at(0).token;
}

Answer LocalGroup::generate(const std::vector<TokenId>& prompt, const Options& options) {
  return generate_batch({prompt}, options).at(0);
}

std::vector<Answer> LocalGroup::generate_batch(const std::vector<std::vector<TokenId>>& prompts,
                                               const Options& options) {
  std::vector<Answer> answers(prompts.size());
  std::vector<SequenceId> ids;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    ids.push_back(SequenceId{next_sequence_++});
    answers[i].reused_tokens = admit(ids[i], prompts[i], options);
    answers[i].infos.push_back(
        prefill(ids[i], static_cast<int>(prompts[i].size()), answers[i].reused_tokens, options));
  }
  for (int step = 1; step < options.max_tokens; ++step) {
    StepPlan plan;
    plan.decodes = ids;
    if (step == options.spill_at && policy_->spills()) plan.spills = {ids[0]};
    const StepResult result = run(plan);
    for (std::size_t i = 0; i < ids.size(); ++i) answers[i].infos.push_back(result.tokens[i].token);
  }
  StepPlan end;
  if (options.publish) {
    StepPlan publish;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto keys = dense_keys(prompts[i]);
      for (std::size_t s = 0; s < keys.size(); ++s) {
        publish.publishes.push_back({ids[i], static_cast<int>(s), keys[s]});
      }
    }
    run(publish);
  }
  end.releases = ids;
  const StepResult released = run(end);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    answers[i].report = released.stats[i].kv;
    for (const TokenInfo& info : answers[i].infos) answers[i].tokens.push_back(info.id);
  }
  return answers;
}

}  // namespace foretoken::worker
