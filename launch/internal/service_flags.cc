#include "launch/internal/service_flags.h"

#include <algorithm>
#include <array>
#include <cctype>

namespace foretoken::launch {
namespace {

constexpr std::string_view kModel = "Model";
constexpr std::string_view kDevices = "Devices";
constexpr std::string_view kPolicy = "KV policy";
constexpr std::string_view kStore = "KV store";
constexpr std::string_view kLimits = "Scheduling and limits";
constexpr std::string_view kEndpoints = "Endpoints";

constexpr std::array kFlags = {
    ServiceFlag{"served_model_name", kModel, "NAME",
                "What clients see as the model's name (default: the folder's name)"},
    ServiceFlag{"load_format", kModel, "auto|dummy",
                "auto: the folder's weights; dummy: random weights of its config, for benchmarks"},
    ServiceFlag{"keep_weights", kModel, "",
                "Keep a copy of the weights in the KV store's memory (as much again in host "
                "memory), from which a group that is restarted loads"},
    ServiceFlag{"max_model_len", kModel, "N",
                "Longest prompt plus output, in tokens (0: the model's context)"},

    ServiceFlag{"device", kDevices, "auto|cuda|cpu", "Where the model runs (auto: GPU if any)"},
    ServiceFlag{"tensor_parallel_size", kDevices, "N",
                "Ranks that share one replica of the model; at most its query heads"},
    ServiceFlag{"num_groups", kDevices, "N", "Replicas of the model (data parallel)"},
    ServiceFlag{"threads_per_rank", kDevices, "N",
                "CPU threads of a rank (0: the machine's cores divided by the ranks)"},
    ServiceFlag{"gpu_memory_utilization", kDevices, "F", "Share of the device memory to use"},
    ServiceFlag{"device_memory_gib", kDevices, "X",
                "CPU device: what counts as its device memory (0: half of the machine's)"},

    ServiceFlag{"kv_policy", kPolicy, "auto|full|streaming-llm|attention-predictor|oracle",
                "Which KV blocks a decode step attends (auto: all of a sequence's while the device "
                "has room, then attention-predictor's)"},
    ServiceFlag{
        "kv_resident", kPolicy, "auto|never",
        "Policy full: on the device where the whole KV fits (on several GPUs it has to), or "
        "never: streamed each step"},
    ServiceFlag{"kv_budget", kPolicy, "TOKENS",
                "Tokens a step attends: sink (64), local window (64) and critical blocks"},
    ServiceFlag{"kv_budget_per", kPolicy, "query-head|kv-head",
                "What the budget counts when maps are a query head's"},
    ServiceFlag{
        "predict_per", kPolicy, "kv-head|query-head",
        "One attention map a KV head, or one a query head (the paper's) with the choices of "
        "a group united"},
    ServiceFlag{"history_type", kPolicy, "bf16|e5m3|fp32", "Type of the attention history"},
    ServiceFlag{
        "history_fill", kPolicy, "zero|hold",
        "What a block that was not attended leaves in the history: nothing, or its last value"},
    ServiceFlag{"calibrate_every", kPolicy, "M", "Steps from one calibration to the next"},
    ServiceFlag{
        "calibrate_with", kPolicy, "auto|exact|sketch|none",
        "How a calibration sees all blocks: by their keys, by sketches of them that stay on "
        "the device (7/64 of the KV), or not at all; auto: by their keys on a CPU, else not"},
    ServiceFlag{"audit_every", kPolicy, "N",
                "Measure recall and KL against dense attention every N steps (0: never; costs a "
                "dense forward)"},
    ServiceFlag{"min_recall", kPolicy, "F",
                "A KV head of a layer whose choice kept less attention than this at its last audit "
                "attends all blocks until it keeps enough (0: never; needs --audit-every)"},
    ServiceFlag{"max_dense_heads", kPolicy, "N",
                "At most so many do in a step of a rank, the lowest first: each streams its whole "
                "KV from host memory"},
    ServiceFlag{"predictor_weights", kPolicy, "FILE",
                "Predictor weights as safetensors (default: the published ones)"},
    ServiceFlag{"trace", kPolicy, "churn=P",
                "For benchmarks: the predictor runs, but the blocks are made up, P % of them new "
                "from step to step (answers are worthless)"},

    ServiceFlag{"kv_host_gib", kStore, "X",
                "Host memory of the node's KV store (0: a quarter of the machine's, at most 64)"},
    ServiceFlag{"kv_nvme_path", kStore, "DIR",
                "Folder on an NVMe disk for KV that leaves host memory (default: none)"},
    ServiceFlag{"kv_nvme_gib", kStore, "X",
                "Size of that tier (0: as a kept one has, else 9/10 of what is free there)"},
    ServiceFlag{"kv_nvme_reuse", kStore, "auto|always",
                "Prefixes that it alone has are read where that takes less time than computing "
                "them anew, by what both have taken lately; or always"},
    ServiceFlag{"kv_persist", kStore, "",
                "Keep the NVMe tier from start to start; with a --runtime-dir of yours"},
    ServiceFlag{"kv_encrypt", kStore, "",
                "Encrypt that tier, with a random key that is in memory only (AES-256-GCM, or "
                "XChaCha20-Poly1305 where the CPU has no AES) ..."},
    ServiceFlag{
        "kv_key_file", kStore, "FILE",
        "... or with this one, so that --kv-persist can keep it: 64 hexadecimal digits, mode "
        "0600"},
    ServiceFlag{"on_late", kStore, "wait|skip",
                "What a step does about a block that is not there in time"},
    ServiceFlag{"guard_arena", kStore, "",
                "Test aid: the store's memory is unmapped but while blocks are copied"},

    ServiceFlag{"max_num_seqs", kLimits, "N", "Sequences that decode in one step"},
    ServiceFlag{"max_batched_tokens", kLimits, "N",
                "Prefill tokens of one step (0: 512 on a CPU, 8192 on a GPU)"},
    ServiceFlag{"max_inter_token_ms", kLimits, "N",
                "Beside decoding sequences prefill is cut so that a step takes N ms at most (0: it "
                "isn't cut)"},
    ServiceFlag{"max_waiting", kLimits, "N", "Requests that may wait; more are turned away"},
    ServiceFlag{"max_requests_per_client", kLimits, "N", "Requests of one client at a time"},
    ServiceFlag{"request_timeout_s", kLimits, "S", "Longest life of a request"},
    ServiceFlag{"drain_timeout_s", kLimits, "S", "How long running requests may take at shutdown"},

    ServiceFlag{"host", kEndpoints, "ADDRESS", "Address that clients connect to"},
    ServiceFlag{"port", kEndpoints, "N", "Port that clients connect to (0: any free one)"},
    ServiceFlag{"zmq_endpoint", kEndpoints, "E",
                "tcp://HOST:PORT or ipc://PATH, in place of --host and --port"},
    ServiceFlag{"metrics_port", kEndpoints, "N", "Prometheus metrics on loopback (0: off)"},
    ServiceFlag{"insecure_bind", kEndpoints, "",
                "Serve without keys: anyone who reaches the endpoint may use it"},
};

}  // namespace

std::span<const ServiceFlag> service_flags() { return kFlags; }

std::string environment_name(std::string_view field) {
  std::string name = "FORETOKEN_" + std::string(field);
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return name;
}

}  // namespace foretoken::launch
