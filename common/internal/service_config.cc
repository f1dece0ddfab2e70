#include "common/service_config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "common/ids.h"
#include "common/sequence_limit.h"

namespace foretoken {
namespace {

using Json = nlohmann::json;

// Each field once: f(name, field).
template <typename F>
void visit_config(F&& f, auto& c) {
  f("model", c.model);
  f("served_model_name", c.served_model_name);
  f("load_format", c.load_format);
  f("keep_weights", c.keep_weights);
  f("max_model_len", c.max_model_len);
  f("device", c.device);
  f("tensor_parallel_size", c.tensor_parallel_size);
  f("num_groups", c.num_groups);
  f("threads_per_rank", c.threads_per_rank);
  f("gpu_memory_utilization", c.gpu_memory_utilization);
  f("device_memory_gib", c.device_memory_gib);
  f("kv_policy", c.kv_policy);
  f("kv_resident", c.kv_resident);
  f("kv_budget", c.kv_budget);
  f("kv_budget_per", c.kv_budget_per);
  f("predict_per", c.predict_per);
  f("history_type", c.history_type);
  f("history_fill", c.history_fill);
  f("calibrate_every", c.calibrate_every);
  f("calibrate_with", c.calibrate_with);
  f("audit_every", c.audit_every);
  f("min_recall", c.min_recall);
  f("max_dense_heads", c.max_dense_heads);
  f("predictor_weights", c.predictor_weights);
  f("trace", c.trace);
  f("kv_host_gib", c.kv_host_gib);
  f("kv_nvme_path", c.kv_nvme_path);
  f("kv_nvme_gib", c.kv_nvme_gib);
  f("kv_nvme_reuse", c.kv_nvme_reuse);
  f("kv_encrypt", c.kv_encrypt);
  f("kv_key_file", c.kv_key_file);
  f("kv_persist", c.kv_persist);
  f("on_late", c.on_late);
  f("guard_arena", c.guard_arena);
  f("max_num_seqs", c.max_num_seqs);
  f("max_batched_tokens", c.max_batched_tokens);
  f("max_inter_token_ms", c.max_inter_token_ms);
  f("max_waiting", c.max_waiting);
  f("max_requests_per_client", c.max_requests_per_client);
  f("request_timeout_s", c.request_timeout_s);
  f("drain_timeout_s", c.drain_timeout_s);
  f("zmq_endpoint", c.zmq_endpoint);
  f("host", c.host);
  f("port", c.port);
  f("metrics_port", c.metrics_port);
  f("insecure_bind", c.insecure_bind);
}

Error config_error(std::string_view field, const std::string& why) {
  return {ErrorCode::kConfig, flag_name(field) + " " + why};
}

// ---- rules -----------------------------------------------------------------------------------

struct Choice {
  std::string_view field;
  std::string ServiceConfig::*value;
  std::vector<std::string> names;
};
const std::vector<Choice>& choices() {
  using C = ServiceConfig;
  static const std::vector<Choice> all = {
      {"load_format", &C::load_format, {"auto", "dummy"}},
      {"device", &C::device, {"auto", "cuda", "cpu"}},
      {"kv_policy",
       &C::kv_policy,
       {"auto", "full", "streaming-llm", "attention-predictor", "oracle"}},
      {"kv_resident", &C::kv_resident, {"auto", "never"}},
      {"kv_budget_per", &C::kv_budget_per, {"query-head", "kv-head"}},
      {"predict_per", &C::predict_per, {"kv-head", "query-head"}},
      {"history_type", &C::history_type, {"bf16", "e5m3", "fp32"}},
      {"history_fill", &C::history_fill, {"zero", "hold"}},
      {"calibrate_with", &C::calibrate_with, {"auto", "exact", "sketch", "none"}},
      {"kv_nvme_reuse", &C::kv_nvme_reuse, {"auto", "always"}},
      {"on_late", &C::on_late, {"wait", "skip"}},
  };
  return all;
}

template <typename T>
struct Range {
  std::string_view field;
  T ServiceConfig::*value;
  T least;
  T most;
};

constexpr std::array kIntRanges = {
    Range<int>{"tensor_parallel_size", &ServiceConfig::tensor_parallel_size, 1, 256},
    Range<int>{"num_groups", &ServiceConfig::num_groups, 1, 256},
    Range<int>{"threads_per_rank", &ServiceConfig::threads_per_rank, 0, 1024},
    Range<int>{"calibrate_every", &ServiceConfig::calibrate_every, 1, 1 << 20},
    Range<int>{"audit_every", &ServiceConfig::audit_every, 0, 1 << 20},
    Range<int>{"max_dense_heads", &ServiceConfig::max_dense_heads, 0, 1 << 20},
    Range<int>{"max_num_seqs", &ServiceConfig::max_num_seqs, 1, 4096},
    Range<int>{"max_batched_tokens", &ServiceConfig::max_batched_tokens, 0, 1 << 20},
    Range<int>{"max_inter_token_ms", &ServiceConfig::max_inter_token_ms, 0, 1 << 20},
    Range<int>{"max_waiting", &ServiceConfig::max_waiting, 1, 1 << 20},
    Range<int>{"max_requests_per_client", &ServiceConfig::max_requests_per_client, 1, 1 << 20},
    Range<int>{"request_timeout_s", &ServiceConfig::request_timeout_s, 1, 1 << 20},
    Range<int>{"drain_timeout_s", &ServiceConfig::drain_timeout_s, 0, 1 << 20},
    Range<int>{"port", &ServiceConfig::port, 0, 65535},
    Range<int>{"metrics_port", &ServiceConfig::metrics_port, 0, 65535},
};
constexpr std::array kRealRanges = {
    Range<double>{"gpu_memory_utilization", &ServiceConfig::gpu_memory_utilization, 0.01, 1.0},
    Range<double>{"min_recall", &ServiceConfig::min_recall, 0, 0.999},
    Range<double>{"device_memory_gib", &ServiceConfig::device_memory_gib, 0, 1 << 20},
    Range<double>{"kv_host_gib", &ServiceConfig::kv_host_gib, 0, 1 << 20},
    Range<double>{"kv_nvme_gib", &ServiceConfig::kv_nvme_gib, 0, 1 << 20},
};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : " | ") + name;
  return text;
}

template <typename T>
std::string plain(T number) {
  return Json(number).dump();
}

template <typename Ranges>
Status check_ranges(const ServiceConfig& config, const Ranges& ranges) {
  for (const auto& range : ranges) {
    const auto value = config.*range.value;
    if (!(value >= range.least && value <= range.most)) {  // so that NaN fails, too
      return config_error(range.field, "must be in [" + plain(range.least) + ", " +
                                           plain(range.most) + "], not " + plain(value));
    }
  }
  return Ok{};
}

Status check_choices(const ServiceConfig& config) {
  for (const auto& choice : choices()) {
    const auto& value = config.*choice.value;
    if (std::find(choice.names.begin(), choice.names.end(), value) != choice.names.end()) continue;
    const auto near = nearest_name(value, choice.names);
    return config_error(choice.field, "takes " + join(choice.names) + ", not \"" + value + "\"" +
                                          (near.empty() ? "" : "; did you mean " + near + "?"));
  }
  return Ok{};
}

Status check_budget(const ServiceConfig& config) {
  constexpr int kLeast = kSinkTokens + kLocalTokens + kBlockTokens;
  if (config.kv_budget < kLeast || config.kv_budget % kBlockTokens != 0) {
    return config_error("kv_budget", "must be a multiple of " + std::to_string(kBlockTokens) +
                                         " tokens and at least " + std::to_string(kLeast) + " (" +
                                         std::to_string(kSinkTokens) + " sink and " +
                                         std::to_string(kLocalTokens) +
                                         " local tokens are always resident, and one block" +
                                         " is chosen), not " + std::to_string(config.kv_budget));
  }
  return Ok{};
}

Status check_trace(const ServiceConfig& config) {
  if (config.trace.empty()) return Ok{};
  if (!trace_churn(config.trace)) {
    return config_error("trace",
                        "takes churn=P, P a number in [0, 100], not \"" + config.trace + "\"");
  }
  if (config.kv_policy != "attention-predictor") {
    return config_error("trace", "replaces the choice of --kv-policy attention-predictor, not of " +
                                     config.kv_policy);
  }
  return Ok{};
}

Status check_min_recall(const ServiceConfig& config) {
  if (config.min_recall == 0 || config.audit_every > 0) return Ok{};
  return config_error("min_recall", "needs --audit-every: audits find what a head's choice keeps");
}

Status check_nvme(const ServiceConfig& config) {
  if (!config.kv_key_file.empty() && !config.kv_encrypt) {
    return config_error("kv_key_file", "needs --kv-encrypt");
  }
  if (config.kv_encrypt && config.kv_persist && config.kv_key_file.empty()) {
    return config_error("kv_encrypt",
                        "with --kv-persist needs --kv-key-file: a random key ends with the "
                        "service, and what is kept could never be read");
  }
  if (!config.kv_nvme_path.empty()) return Ok{};
  constexpr auto kWhy = "needs --kv-nvme-path: the folder of the NVMe tier";
  if (config.kv_nvme_gib > 0) return config_error("kv_nvme_gib", kWhy);
  if (config.kv_nvme_reuse != "auto") return config_error("kv_nvme_reuse", kWhy);
  if (config.kv_persist) return config_error("kv_persist", kWhy);
  if (config.kv_encrypt) return config_error("kv_encrypt", kWhy);
  return Ok{};
}

// ---- JSON ------------------------------------------------------------------------------------

template <typename T>
std::string_view type_name() {
  if (std::is_same_v<T, std::string>) return "a string";
  if (std::is_same_v<T, bool>) return "true or false";
  return std::is_integral_v<T> ? "an integer" : "a number";
}

template <typename T>
bool assign(const Json& json, T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    if (!json.is_string()) return false;
    value = json.get<std::string>();
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!json.is_boolean()) return false;
    value = json.get<bool>();
  } else if constexpr (std::is_integral_v<T>) {
    using Limits = std::numeric_limits<T>;
    if (!json.is_number_integer()) return false;
    if (json.is_number_unsigned() &&
        json.get<std::uint64_t>() > static_cast<std::uint64_t>(Limits::max())) {
      return false;
    }
    const auto integer = json.get<std::int64_t>();
    if (integer < Limits::min() || integer > Limits::max()) return false;
    value = static_cast<T>(integer);
  } else {
    if (!json.is_number()) return false;
    value = json.get<double>();
  }
  return true;
}

}  // namespace

Status validate(const ServiceConfig& config) {
  if (config.model.empty()) return config_error("model", "is missing: the model's folder");
  if (config.max_model_len < 0 || config.max_model_len > kMaxTokens) {
    return config_error("max_model_len", "must be in [0, " + std::to_string(kMaxTokens) +
                                             "], not " + std::to_string(config.max_model_len));
  }
  FT_RETURN_IF_ERROR(check_choices(config));
  FT_RETURN_IF_ERROR(check_ranges(config, kIntRanges));
  FT_RETURN_IF_ERROR(check_ranges(config, kRealRanges));
  FT_RETURN_IF_ERROR(check_trace(config));
  FT_RETURN_IF_ERROR(check_min_recall(config));
  FT_RETURN_IF_ERROR(check_nvme(config));
  return check_budget(config);
}

int batched_tokens(const ServiceConfig& config, DeviceKind device) {
  if (config.max_batched_tokens > 0) return config.max_batched_tokens;
  // Products of fewer rows leave a GPU idle (docs/measurements.md#gpu).
  constexpr int kOfGpu = 8192;
  constexpr int kOfCpu = 512;
  return device == DeviceKind::kGpu ? kOfGpu : kOfCpu;
}

std::string flag_name(std::string_view field) {
  std::string name = "--" + std::string(field);
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

std::optional<float> trace_churn(std::string_view trace) {
  constexpr std::string_view kName = "churn=";
  if (!trace.starts_with(kName)) return std::nullopt;
  trace.remove_prefix(kName.size());
  float percent = 0;
  const auto [end, error] = std::from_chars(trace.data(), trace.data() + trace.size(), percent);
  if (error != std::errc{} || end != trace.data() + trace.size()) return std::nullopt;
  if (!(percent >= 0 && percent <= 100)) return std::nullopt;
  return percent / 100;
}

std::string to_json(const ServiceConfig& config) {
  auto json = nlohmann::ordered_json::object();
  visit_config([&](const char* name, const auto& field) { json[name] = field; }, config);
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

Result<ServiceConfig> service_config_from_json(std::string_view text) {
  const auto json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return Error{ErrorCode::kConfig, "the configuration is not a JSON object"};
  }
  ServiceConfig config;
  std::vector<std::string> known;
  std::optional<Error> wrong;
  visit_config(
      [&]<typename T>(const char* name, T& field) {
        known.emplace_back(name);
        const auto found = json.find(name);
        if (found == json.end() || wrong || assign(*found, field)) return;
        wrong = config_error(name, "must be " + std::string(type_name<T>()) + ", not " +
                                       found->dump(-1, ' ', true, Json::error_handler_t::replace));
      },
      config);
  if (wrong) return *wrong;
  for (const auto& [key, value] : json.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    const auto near = nearest_name(key, known);
    return Error{ErrorCode::kConfig, "unknown setting \"" + key + "\"" +
                                         (near.empty() ? "" : "; did you mean " + near + "?")};
  }
  return config;
}

// Levenshtein distance; a name is near when at most a third of it, or two characters, differ.
std::string nearest_name(std::string_view name, const std::vector<std::string>& known) {
  std::string best;
  std::size_t best_distance = std::max<std::size_t>(2, name.size() / 3) + 1;
  for (const auto& candidate : known) {
    std::vector<std::size_t> row(candidate.size() + 1);
    std::iota(row.begin(), row.end(), std::size_t{0});
    for (std::size_t i = 1; i <= name.size(); ++i) {
      std::size_t diagonal = std::exchange(row[0], i);
      for (std::size_t j = 1; j <= candidate.size(); ++j) {
        const auto substituted = diagonal + (name[i - 1] == candidate[j - 1] ? 0 : 1);
        diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, substituted}));
      }
    }
    if (row.back() < best_distance) {
      best_distance = row.back();
      best = candidate;
    }
  }
  return best;
}

}  // namespace foretoken
