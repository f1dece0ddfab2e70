#include "coordinator/service.h"

#include "common/log.h"
#include "common/model_config.h"
#include "common/wire.h"

namespace foretoken::coordinator {

namespace {

// Keys whose scores and values take as many operations as all products of a layer, a query.
double attention_tokens(const ModelConfig& shape) {
  const std::int64_t q_width = shape.num_heads * shape.head_dim;
  const std::int64_t kv_width = shape.num_kv_heads * shape.head_dim;
  const std::int64_t weights =
      shape.hidden_size * (2 * q_width + 2 * kv_width + 3 * shape.intermediate_size);
  return static_cast<double>(weights) / static_cast<double>(2 * q_width);
}

}  // namespace

Result<ServedModel> read_served_model(const ServiceConfig& config) {
  FT_ASSIGN_OR_RETURN(const auto shape, read_model_config(config.model));
  ServedModel model;
  const std::filesystem::path folder = config.model;
  model.name = !config.served_model_name.empty() ? config.served_model_name
               : folder.has_filename()           ? folder.filename().string()
                                                 : folder.parent_path().filename().string();
  model.num_layers = static_cast<int>(shape.num_layers);
  model.attention_tokens = attention_tokens(shape);
  model.vocab_size = shape.vocab_size;
  model.context = config.max_model_len > 0 ? config.max_model_len : shape.max_position;
  if (model.context > shape.max_position) {
    return Error{ErrorCode::kConfig, "--max-model-len " + std::to_string(config.max_model_len) +
                                         " is more than the model's context of " +
                                         std::to_string(shape.max_position) + " tokens"};
  }
  model.eos_ids.assign(shape.eos_ids.begin(), shape.eos_ids.end());
  model.kv_type = shape.dtype == ModelDtype::kF16 ? "fp16" : "bf16";
  const bool random_weights = config.load_format == "dummy";
  if (!random_weights || std::filesystem::exists(folder / "tokenizer.json")) {
    FT_ASSIGN_OR_RETURN(auto tokenizer, Tokenizer::load(folder));
    model.tokenizer = std::move(tokenizer);
  }
  return model;
}

Service::Service(Parts parts, Outbox& outbox, Metrics& metrics, TimePoint now)
    : parts_(std::move(parts)),
      outbox_(outbox),
      metrics_(metrics),
      started_at_(now),
      sessions_(outbox) {
  for (int number = 0; number < parts_.config.num_groups; ++number) {
    groups_.push_back(std::make_unique<Group>(number, parts_.config.tensor_parallel_size));
  }
}

void Service::on_time(TimePoint now) {
  for (const auto& peer : sessions_.on_time(now)) forget_client(peer);

  const auto patience = std::chrono::seconds(parts_.config.request_timeout_s);
  std::vector<Request*> late;
  for (auto& [id, request] : requests_) {
    if (request->report && sessions_.can_send(request->origin().peer)) {
      late.push_back(request.get());
    } else if (request->state() == RequestState::kRunning) {
      deliver(*request, now);
    }
    if (request->state() < RequestState::kFinishing && now - request->origin().arrival > patience) {
      late.push_back(request.get());
    }
  }
  for (auto* request : late) {
    if (request->report) {
      complete(*request, *request->report, now);
    } else {
      fail(*request,
           {ErrorCode::kTimeout, "not done within --request-timeout-s " +
                                     std::to_string(parts_.config.request_timeout_s)},
           now);
    }
  }
  for (auto& group : groups_) {
    on_events(*group, group->ranks.on_time(now), now);
    if (group->kill_at && now >= *group->kill_at) {
      ask_for_restart(*group, group->ranks.life(), now);
    }
  }
  pump(now);
  finish_drain(now);

  metrics_.set_requests(requests_.size() - waiting_.size(), waiting_.size());
}

void Service::drain(TimePoint now) {
  if (drain_until_) return;
  drain_until_ = now + std::chrono::seconds(parts_.config.drain_timeout_s);
  log().info("draining: {} requests to finish", requests_.size());
  outbox_.to_parent(R"({"event":"draining"})");
  finish_drain(now);
}

void Service::finish_drain(TimePoint now) {
  if (!drain_until_ || finished_) return;
  if (!(requests_.empty() && sessions_.is_empty()) && now < *drain_until_) return;
  std::vector<Request*> rest;
  for (auto& [id, request] : requests_) rest.push_back(request.get());
  for (auto* request : rest) {
    fail(*request, {ErrorCode::kUnavailable, "the service ends (--drain-timeout-s is over)"}, now);
  }
  const auto shutdown = encode(CoordinatorMessage(Shutdown{}));
  for (auto& group : groups_) {
    for (const auto& peer : group->ranks.peers()) {
      // A rank that is gone needs no Shutdown.
      static_cast<void>(outbox_.to_worker(peer, shutdown));
    }
  }
  finished_ = true;
}

}  // namespace foretoken::coordinator
