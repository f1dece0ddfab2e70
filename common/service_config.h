// ServiceConfig: what a service is asked to be: one struct from the command line, the environment
// and the config file down to every rank. Field names are the long flags with '_' for '-'.
// Defaults stand here and nowhere else.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken {

struct ServiceConfig {
  // Model.
  std::string model;                 // folder
  std::string served_model_name;     // empty: the folder's name
  std::string load_format = "auto";  // auto | dummy
  bool keep_weights = false;         // a copy in the store's memory, for groups that start again
  std::int64_t max_model_len = 0;    // tokens; 0: the model's

  // Devices.
  std::string device = "auto";  // auto | cuda | cpu
  int tensor_parallel_size = 1;
  int num_groups = 1;                   // worker groups (data parallel)
  int threads_per_rank = 0;             // CPU device; 0: the machine's share
  double gpu_memory_utilization = 0.9;  // of the device's memory, all modes alike
  double device_memory_gib = 0;  // CPU device: the accounted memory; 0: half of the machine's

  // KV policy. Names as in predictor/policy.h.
  std::string kv_policy = "attention-predictor";
  std::string kv_resident = "auto";          // of policy full: auto (where it fits) | never
  int kv_budget = 1024;                      // tokens: sink + local + critical
  std::string kv_budget_per = "query-head";  // query-head | kv-head
  std::string predict_per = "kv-head";       // kv-head | query-head
  std::string history_type = "bf16";         // bf16 | e5m3 | fp32
  std::string history_fill = "zero";         // zero | hold
  int calibrate_every = 5;                   // steps
  std::string calibrate_with = "auto";       // auto | exact | sketch | none
  int audit_every = 0;                       // steps; 0: off
  double min_recall = 0;                     // of a head's last audit; 0: off
  int max_dense_heads = 8;                   // that attend all blocks in a step, a rank
  std::string predictor_weights;             // empty: the published Llama-3.1 weights
  std::string trace;  // benchmarks: churn=P, blocks of which P % are new a step; empty: off

  // KV store.
  double kv_host_gib = 0;    // arena; 0: a quarter of the machine's memory, at most 64
  std::string kv_nvme_path;  // folder of the second tier; empty: none
  double kv_nvme_gib = 0;    // its size; 0: as a kept one, else 9/10 of what is free there
  std::string kv_nvme_reuse = "auto";  // auto: where reading is faster than computing | always
  bool kv_persist = false;             // the second tier is kept from start to start
  bool kv_encrypt = false;             // the second tier is encrypted
  std::string kv_key_file;             // with the key in this file; empty: a random one, in memory
  std::string on_late = "wait";        // wait | skip
  bool guard_arena = false;  // test aid: the arena is unmapped but inside gather and write

  // Scheduling and limits.
  int max_num_seqs = 8;          // sequences that decode in one step
  int max_batched_tokens = 0;    // of prefill, a step; 0: as batched_tokens() says
  int max_inter_token_ms = 200;  // of a step that decodes, prefill beside it included; 0: no bound
  int max_waiting = 1024;        // requests; more are turned away
  int max_requests_per_client = 64;
  int request_timeout_s = 600;
  int drain_timeout_s = 30;

  // Endpoints.
  std::string zmq_endpoint;  // empty: tcp://HOST:PORT
  std::string host = "127.0.0.1";
  int port = 8000;
  int metrics_port = 0;  // 0: off
  bool insecure_bind = false;

  bool operator==(const ServiceConfig&) const = default;
};

// What computes: --device, with its auto decided.
enum class DeviceKind { kCpu, kGpu };

// Prefill tokens of a step: --max-batched-tokens, or what suits the device where that is 0. All
// ranks of a group must have the same, so it depends on nothing else.
int batched_tokens(const ServiceConfig& config, DeviceKind device);

// Of a field: kv_budget -> --kv-budget.
std::string flag_name(std::string_view field);

// The P of a --trace churn=P, as a share; nullopt for any other text.
std::optional<float> trace_churn(std::string_view trace);

// Checks ranges and names of every field; the error (kConfig) names the flag and what it takes.
Status validate(const ServiceConfig& config);

// The config as a JSON object, and back. Unknown keys are an error with a "did you mean".
std::string to_json(const ServiceConfig& config);
Result<ServiceConfig> service_config_from_json(std::string_view json);

// The nearest of `known` to a mistyped name, for "did you mean"; empty if none is near.
std::string nearest_name(std::string_view name, const std::vector<std::string>& known);

}  // namespace foretoken
