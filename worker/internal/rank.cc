#include "worker/rank.h"

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "common/log.h"
#include "common/program.h"
#include "kernels/cuda_machine.h"
#include "kernels/prefill_plans.h"
#include "worker/engine.h"
#include "worker/internal/failure.h"
#include "worker/internal/gpu_choice.h"
#include "worker/internal/heart.h"
#include "worker/internal/line.h"
#include "worker/internal/make_device.h"
#include "worker/internal/node_ranks.h"
#include "worker/weight_keeper.h"

namespace foretoken::worker {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kWelcomeTimeout{30'000};
constexpr milliseconds kStorePatience{25'000};  // more than a store waits for one that is ending
constexpr milliseconds kIdlePoll{1'000};
constexpr milliseconds kStepPoll{1};  // while the device works; a plan that comes ends it at once
constexpr milliseconds kMostPolled{1'000};  // of a plan, before it is waited for (guessed)

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

// Where MPI has put this rank.
struct Place {
  Place() {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
  }
  int rank = 0;
  int world_size = 1;
  NodeRanks node;
};

Welcome join(Line& line, const RankConfig& config, const Place& place) {
  line.send(Hello{config.group, place.rank, place.world_size, getpid(), host_name(), config.life});
  const auto answer = line.receive(kWelcomeTimeout);
  if (!answer) {
    throw Exception(ErrorCode::kUnavailable,
                    "no answer from the coordinator at " + config.coordinator + " within 30 s");
  }
  const auto* welcome = std::get_if<Welcome>(&*answer);
  if (welcome == nullptr) {
    throw Exception(ErrorCode::kUnavailable,
                    "the coordinator at " + config.coordinator + " turned this rank away: rank " +
                        std::to_string(place.rank) + " of " + std::to_string(place.world_size) +
                        " in group " + std::to_string(config.group) +
                        " is none of its groups' (--tensor-parallel-size, --num-groups), or was "
                        "started again meanwhile; its log says which");
  }
  return *welcome;
}

predictor::PolicyConfig policy_config(const ServiceConfig& config, const kernels::Device& device) {
  predictor::PolicyConfig policy;
  const auto kind = predictor::policy_from_name(config.kv_policy);
  if (!kind) throw Exception(ErrorCode::kConfig, "--kv-policy " + config.kv_policy + " is unknown");
  policy.kind = *kind;
  policy.budget_tokens = config.kv_budget;
  policy.predict_per = config.predict_per == "query-head" ? predictor::PredictPer::kQueryHead
                                                          : predictor::PredictPer::kKvHead;
  policy.budget_per = config.kv_budget_per == "query-head" ? predictor::BudgetPer::kQueryHead
                                                           : predictor::BudgetPer::kKvHead;
  policy.history_type = config.history_type == "fp32"   ? kernels::HistoryType::kFp32
                        : config.history_type == "e5m3" ? kernels::HistoryType::kE5m3
                                                        : kernels::HistoryType::kBf16;
  policy.history_fill =
      config.history_fill == "hold" ? predictor::HistoryFill::kHold : predictor::HistoryFill::kZero;
  policy.residency = residency_of(config, device);
  policy.calibration = *predictor::calibration_from_name(config.calibrate_with, device);
  policy.trace_churn = trace_churn(config.trace);
  policy.weights = config.predictor_weights;
  return policy;
}

// What tells the KV of this model from that of others; random weights are all alike.
std::string identity_of(const ServiceConfig& config) {
  if (config.load_format == "dummy") return "dummy";
  return model_hash(config.model).value_or_throw();
}

// The number of this rank's own GPU; 0 where none is wanted.
int own_gpu(const ServiceConfig& config, int group, const Place& place) {
  if (!wants_cuda(config)) {
    const bool has_driver = kernels::cuda_versions().driver > 0;
    if (config.device == "auto" && has_driver && place.rank == 0) {
      log().warn("this runs on the CPU: {}", kernels::why_no_cuda_device());
    }
    return 0;
  }
  const int devices = kernels::num_cuda_devices();
  if (devices == 0) throw Exception(ErrorCode::kDevice, kernels::why_no_cuda_device());
  const int index = choose_gpu({.group = group,
                                .rank_on_node = place.node.rank(),
                                .ranks_on_node = place.node.count(),
                                .num_devices = devices})
                        .value_or_throw();
  const Status own =
      check_own_gpu(place.node.gather(kernels::cuda_device_id(index)), place.node.rank());
  if (!own) throw Exception(own.error());
  return index;
}

std::unique_ptr<Collective> make_collective(const ServiceConfig& config, const ModelConfig& model,
                                            const Place& place, kernels::Device& device) {
  if (place.world_size == 1) return make_single_collective();
  if (!wants_cuda(config)) return make_mpi_collective();
  if (place.node.count() == place.world_size) {
    const std::int64_t longest =
        config.max_model_len > 0 ? config.max_model_len : model.max_position;
    const std::size_t most_begun = Model::most_begun_bytes(
        model, static_cast<int>(std::min<std::int64_t>(config.max_batched_tokens, longest)));
    return make_nccl_collective(
        device, Sums::kByPeers,
        {.most_bytes = most_begun, .chain_columns = static_cast<int>(model.hidden_size)});
  }
  if (place.rank == 0) {
    log().warn("sums go over NCCL, which is slower: the ranks are on several nodes");
  }
  return make_nccl_collective(device, Sums::kByNccl, {});
}

// `foretoken serve` says by the environment whether its own stderr, where mpirun takes ours, is a
// terminal. One bar is enough there.
LoadProgress::Style progress_style(const RankConfig& config, const Place& place) {
  if (place.rank != 0) return LoadProgress::Style::kNone;
  const char* said = std::getenv("FORETOKEN_PROGRESS");
  const bool bar = config.group == 0 && said != nullptr && std::string_view(said) == "bar";
  return bar ? LoadProgress::Style::kBar : LoadProgress::Style::kLog;
}

// The configuration that this rank was given, with what it leaves to the device decided.
ServiceConfig read_config(const std::string& json) {
  ServiceConfig config = service_config_from_json(json).value_or_throw();
  config.max_batched_tokens =
      batched_tokens(config, wants_cuda(config) ? DeviceKind::kGpu : DeviceKind::kCpu);
  return config;
}

// At the start, unlike later, device memory that is full stays full.
template <typename Make>
auto at_start(const ServiceConfig& config, const Make& make) {
  try {
    return make();
  } catch (const Exception& failure) {
    if (failure.error().code != ErrorCode::kExhausted) throw;
    throw Exception(ErrorCode::kDevice, failure.error().message + "; " + how_to_make_room(config));
  }
}

// Everything a rank is made of, in the order it is built.
class Worker {
 public:
  Worker(const RankConfig& config, const Welcome& welcome, const Place& place)
      : config_(read_config(welcome.config_json)),
        model_config_(read_model_config(config_.model).value_or_throw()),
        model_hash_(identity_of(config_)),
        device_(make_device(config_, model_config_, own_gpu(config_, config.group, place))),
        collective_(at_start(
            config_, [&] { return make_collective(config_, model_config_, place, *device_); })) {
    if (config_.kv_encrypt) forbid_core_dumps();
    const int max_model_len = static_cast<int>(
        config_.max_model_len > 0 ? config_.max_model_len : model_config_.max_position);
    const Partition part =
        make_partition(model_config_, place.rank, place.world_size).value_or_throw();
    // Beside the loading, so that no prompt waits for it. What plans take of the device comes out
    // of what its memory limit leaves for the driver.
    std::jthread plans = kernels::prepare_prefill(
        *device_, Prefill::attention_shape(model_config_, part,
                                           std::min(config_.max_batched_tokens, max_model_len),
                                           max_model_len));
    load_model(welcome.store_socket, part, progress_style(config, place));
    policy_ = at_start(config_, [&] {
      return predictor::make_policy(policy_config(config_, *device_),
                                    {.kv = model_->kv_shape(), .num_heads = part.heads.count},
                                    *device_)
          .value_or_throw();
    });
    store_ =
        kvstore::KvStore::connect({.socket_path = welcome.store_socket,
                                   .group = config.group,
                                   .rank = place.rank,
                                   .epoch = welcome.epoch,
                                   .model_hash = model_hash_,
                                   .total_kv_heads = static_cast<int>(model_config_.num_kv_heads),
                                   .first_head = part.kv_heads.begin,
                                   .shape = model_->kv_shape(),
                                   .guard_arena = config_.guard_arena,
                                   .patience = kStorePatience},
                                  *device_)
            .value_or_throw();
    if (plans.joinable()) plans.join();
    engine_ = at_start(config_, [&] {
      auto engine = std::make_unique<Engine>(config_, max_model_len,
                                             Engine::Parts{*device_, *store_, *policy_, *model_});
      engine->warm_up();
      return engine;
    });
  }
  Engine& engine() { return *engine_; }
  const std::string& hash() const { return model_hash_; }
  // Under --keep-weights, and on the rank whose task it is: see WeightKeeper::keep.
  std::jthread keep_weights() { return keeper_ ? keeper_->keep() : std::jthread(); }

 private:
  std::unique_ptr<WeightSource> open_weights() const {
    if (config_.load_format == "dummy") return make_dummy_source(model_config_);
    return make_file_source(ModelWeights::open(config_.model).value_or_throw());
  }

  void load_model(const std::string& store_socket, const Partition& part,
                  LoadProgress::Style style) {
    std::unique_ptr<WeightSource> plain;
    if (config_.keep_weights) {
      keeper_ = std::make_unique<WeightKeeper>(store_socket, model_hash_,
                                               [this] { return open_weights(); });
    } else {
      plain = open_weights();
    }
    const WeightSource& weights = keeper_ ? keeper_->source() : *plain;
    LoadProgress progress(style);
    model_ = at_start(config_, [&] {
      return Model::load(model_config_, weights, part, *device_, *collective_, progress)
          .value_or_throw();
    });
    if (part.rank != 0) keeper_.reset();  // others are not asked for every tensor
  }

  ServiceConfig config_;
  ModelConfig model_config_;
  std::string model_hash_;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<Collective> collective_;
  std::unique_ptr<WeightKeeper> keeper_;  // null: the weights are not kept, or not by this rank
  std::unique_ptr<Model> model_;
  std::unique_ptr<predictor::Policy> policy_;
  std::unique_ptr<kvstore::KvStore> store_;
  std::unique_ptr<Engine> engine_;
};

void serve_plans(Line& line, const Heart& heart, Engine& engine, Epoch epoch,
                 const RankConfig& config) {
  const auto finish_one = [&] {
    StepResult result = engine.collect();
    result.group = config.group;
    line.send(result);
  };
  auto launched = steady_clock::now();
  for (;; heart.check()) {
    // The next plan comes while this one runs, but not at once: who waits for the device first
    // launches it too late, and the device stands idle in between.
    const auto message = line.receive(!engine.has_launched() ? kIdlePoll
                                      : engine.has_ended()   ? milliseconds{0}
                                                             : kStepPoll);
    if (!message) {
      // Polling has no deadline, and does not ask the ranks' links; collect() has and does both.
      const bool is_late = engine.has_launched() && steady_clock::now() - launched > kMostPolled;
      if (engine.has_ended() || is_late) finish_one();
      continue;
    }
    if (std::holds_alternative<Shutdown>(*message)) return;
    const auto* plan = std::get_if<StepPlan>(&*message);    // else a probe
    if (plan == nullptr || plan->epoch != epoch) continue;  // of a life before this one
    // The next step is on the device before the last one's tokens are read.
    if (engine.has_launched() && !engine.only_computes(*plan)) finish_one();
    const bool behind_another = engine.has_launched();
    engine.launch(*plan);
    if (behind_another || !engine.runs_ahead()) finish_one();
    launched = steady_clock::now();
  }
}

// All but MPI's part of a rank's life.
void join_and_serve(const RankConfig& config, const Place& place) {
  Line line(config);
  const Welcome welcome = join(line, config, place);
  Heart heart(config, welcome.epoch, place.rank);
  std::unique_ptr<Worker> worker;
  std::jthread keeping;  // uses the worker, so it ends before that
  try {
    worker = std::make_unique<Worker>(config, welcome, place);
    if (place.rank == 0) log().info("{}", worker->engine().memory_plan());
    Ready ready = worker->engine().capacity();
    ready.epoch = welcome.epoch;
    ready.group = config.group;
    ready.rank = place.rank;
    ready.model_hash = worker->hash();
    line.send(ready);
    keeping = worker->keep_weights();
    serve_plans(line, heart, worker->engine(), welcome.epoch, config);
  } catch (const std::exception& failure) {
    // Its parts would wait for the device before they end, and that may be what failed. The
    // process, which is about to end, gives all back.
    static_cast<void>(worker.release());
    line.send(WorkerFailed{welcome.epoch, config.group, place.rank, error_of(failure)});
    throw;
  }
}

}  // namespace

void run_rank(const RankConfig& config) {
  const Place place;
  log_init("rank " + std::to_string(place.rank));
  try {
    join_and_serve(config, place);
  } catch (const std::exception& failure) {
    throw Exception(error_of(failure));
  }
}

}  // namespace foretoken::worker
