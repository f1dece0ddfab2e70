#include "coordinator/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>

namespace foretoken::coordinator {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

// From a token on a fast GPU to a long prompt on a slow CPU.
const Histogram::BucketBoundaries kSeconds = {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
                                              0.2,   0.5,   1,     2,    5,    10,   20,
                                              50,    100,   200,   500,  1000, 2560};

constexpr auto kFailures = "foretoken_kv_checksum_failures_total";
constexpr auto kFailuresHelp =
    "Slabs on their way between the tiers, and reads of blocks for a device, that failed their "
    "checksum; by the tier that held them";

}  // namespace

struct Metrics::Impl {
  explicit Impl(const std::string& model) : labels{{"model_name", model}} {}

  Counter& counter(const char* name, const char* help) {
    return BuildCounter().Name(name).Help(help).Labels(labels).Register(*registry).Add({});
  }
  Gauge& gauge(const char* name, const char* help) { return gauges(name, help).Add({}); }
  Histogram& histogram(const char* name, const char* help) {
    return BuildHistogram().Name(name).Help(help).Labels(labels).Register(*registry).Add({},
                                                                                         kSeconds);
  }
  // Adding a label set again gives the metric that is there.
  Counter& labelled(const char* name, const char* help, const char* label,
                    const std::string& value) {
    return BuildCounter().Name(name).Help(help).Labels(labels).Register(*registry).Add(
        {{label, value}});
  }

  Family<Gauge>& gauges(const char* name, const char* help) {
    return BuildGauge().Name(name).Help(help).Labels(labels).Register(*registry);
  }

  const std::map<std::string, std::string> labels;
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  Gauge& running = gauge("foretoken_num_requests_running", "Requests that a group works on");
  Gauge& waiting = gauge("foretoken_num_requests_waiting", "Requests that wait for a group");
  Gauge& kv_usage = gauge("foretoken_kv_cache_usage_perc", "Share of KV slabs in use; 1 is full");
  Gauge& kv_cached = gauge("foretoken_kv_slabs_cached", "Slabs that hold reusable prefixes only");
  Counter& prompt_tokens = counter("foretoken_prompt_tokens_total", "Tokens of prompts");
  Counter& generated = counter("foretoken_generation_tokens_total", "Tokens generated");
  Counter& prefix_queries =
      counter("foretoken_prefix_cache_queries_total", "Prompt tokens looked up for reuse");
  Counter& prefix_hits =
      counter("foretoken_prefix_cache_hits_total", "Prompt tokens whose KV was reused");
  Counter& fetched = counter("foretoken_kv_blocks_fetched_total", "KV blocks brought to devices");
  Counter& host_bytes = counter("foretoken_kv_host_bytes_total", "KV bytes fetched from the host");
  Gauge& nvme_slabs = gauge("foretoken_kv_nvme_slabs", "Slabs that the NVMe tier holds");
  Counter& nvme_read =
      counter("foretoken_kv_nvme_read_bytes_total", "KV bytes read from the NVMe tier");
  Counter& nvme_written =
      counter("foretoken_kv_nvme_written_bytes_total", "KV bytes written to the NVMe tier");
  Counter& nvme_errors =
      counter("foretoken_kv_nvme_io_errors_total", "Operations of the NVMe tier that failed");
  Counter& nvme_passed_over =
      counter("foretoken_kv_nvme_passed_over_tokens_total",
              "Tokens that the NVMe tier had, computed anew as reading them takes longer");
  Counter& late = counter("foretoken_prefetch_late_total", "Blocks that were not there in time");
  Counter& fallbacks = counter("foretoken_predictor_fallbacks_total",
                               "Times that a map had no finite scores, and its latest blocks were "
                               "taken");
  Counter& dense_fallbacks =
      labelled("foretoken_fallback_dense_total", "Times that a head attended all blocks in a step",
               "reason", "recall");
  Counter& dense_capped = counter("foretoken_fallback_capped_total",
                                  "Times that the cap kept a head from attending all blocks");
  Counter& spilled = counter("foretoken_spilled_requests_total",
                             "Requests under --kv-policy auto that were predicted, not dense");
  Counter& recall_sum =
      counter("foretoken_predictor_recall_sum", "Attention mass kept, summed over audits");
  Counter& recall_count = counter("foretoken_predictor_recall_count", "Audited maps");
  Counter& host_failures = labelled(kFailures, kFailuresHelp, "tier", "host");
  Counter& losses = counter("foretoken_kv_losses_total",
                            "Times that a request's KV was lost, and computed anew if it could be");
  Counter& recomputed = counter("foretoken_recomputed_tokens_total",
                                "Tokens computed again by requests that went on after their "
                                "group's death or the loss of their KV");
  Counter& late_steps = counter("foretoken_late_steps_total",
                                "Steps with decoding sequences that took longer than "
                                "--max-inter-token-ms");
  Counter& restarts = counter("foretoken_worker_restarts_total", "Worker groups that died");
  Histogram& first_token =
      histogram("foretoken_time_to_first_token_seconds", "Arrival to first token");
  Histogram& next_token = histogram("foretoken_inter_token_latency_seconds", "Token to token");
  Histogram& whole =
      histogram("foretoken_e2e_request_latency_seconds", "Arrival to the last message");
  Histogram& step = histogram("foretoken_step_seconds", "A step on the slowest rank");
  KvNvme most;  // each count, as far as it was told
  std::unique_ptr<prometheus::Exposer> exposer;
};

Metrics::Metrics(const std::string& model_name) : impl_(std::make_unique<Impl>(model_name)) {}
Metrics::~Metrics() = default;

void Metrics::serve(int port) {
  const auto address = "127.0.0.1:" + std::to_string(port);
  try {
    impl_->exposer = std::make_unique<prometheus::Exposer>(address, /*num_threads=*/1);
    impl_->exposer->RegisterCollectable(impl_->registry);
  } catch (const std::exception& error) {
    throw Exception(ErrorCode::kPortInUse, "can't serve metrics at " + address + " (" +
                                               error.what() + "); choose another --metrics-port");
  }
}

std::string Metrics::text() const {
  return prometheus::TextSerializer().Serialize(impl_->registry->Collect());
}

void Metrics::on_rejected(ErrorCode why) {
  impl_
      ->labelled("foretoken_requests_rejected_total", "Requests that were not taken", "reason",
                 std::string(error_code_name(why)))
      .Increment();
}

void Metrics::on_failed(ErrorCode why) {
  impl_
      ->labelled("foretoken_requests_failed_total", "Requests that ended in an error", "reason",
                 std::string(error_code_name(why)))
      .Increment();
}

void Metrics::on_done(const DoneMessage& done) {
  impl_
      ->labelled("foretoken_request_success_total", "Requests that ended well", "finished_reason",
                 done.finish_reason)
      .Increment();
  impl_->prompt_tokens.Increment(static_cast<double>(done.usage.prompt_tokens));
  impl_->generated.Increment(static_cast<double>(done.usage.completion_tokens));
  impl_->prefix_queries.Increment(static_cast<double>(done.usage.prompt_tokens));
  impl_->prefix_hits.Increment(static_cast<double>(done.usage.cached_tokens));
  impl_->whole.Observe(done.timing.total_ms / 1000);
}

void Metrics::on_released(const KvReport& kv) {
  impl_->nvme_read.Increment(static_cast<double>(kv.bytes_nvme));
  impl_->fetched.Increment(static_cast<double>(kv.blocks_fetched));
  impl_->host_bytes.Increment(static_cast<double>(kv.bytes_host));
  impl_->host_failures.Increment(static_cast<double>(kv.checksum_failures));
  impl_->late.Increment(static_cast<double>(kv.late));
  impl_->fallbacks.Increment(static_cast<double>(kv.predictor_fallbacks));
  impl_->dense_fallbacks.Increment(static_cast<double>(kv.dense_fallbacks));
  impl_->dense_capped.Increment(static_cast<double>(kv.dense_capped));
  impl_->spilled.Increment(kv.spilled ? 1 : 0);
  impl_->recall_sum.Increment(kv.recall_sum);
  impl_->recall_count.Increment(static_cast<double>(kv.recall_count));
}

void Metrics::on_first_token(double seconds) { impl_->first_token.Observe(seconds); }
void Metrics::on_next_token(double seconds) { impl_->next_token.Observe(seconds); }
void Metrics::on_lost(std::int64_t checksum_failures) {
  impl_->host_failures.Increment(static_cast<double>(checksum_failures));
  impl_->losses.Increment();
}
void Metrics::on_restart() { impl_->restarts.Increment(); }
void Metrics::on_continued(std::int64_t recomputed_tokens) {
  impl_->recomputed.Increment(static_cast<double>(recomputed_tokens));
}
void Metrics::on_step(double seconds) { impl_->step.Observe(seconds); }
void Metrics::on_late_step() { impl_->late_steps.Increment(); }

void Metrics::set_requests(std::size_t running, std::size_t waiting) {
  impl_->running.Set(static_cast<double>(running));
  impl_->waiting.Set(static_cast<double>(waiting));
}

void Metrics::set_kv(std::int64_t total, std::int64_t free, std::int64_t cached) {
  const auto used = static_cast<double>(total - free - cached);
  impl_->kv_usage.Set(total > 0 ? used / static_cast<double>(total) : 0);
  impl_->kv_cached.Set(static_cast<double>(cached));
}

void Metrics::set_device_free(int group, std::optional<std::int64_t> bytes) {
  auto& groups =
      impl_->gauges("foretoken_device_free_bytes",
                    "Device memory that sequences may still take, on the rank that has the least");
  auto& gauge = groups.Add({{"group", std::to_string(group)}});
  if (!bytes) return groups.Remove(&gauge);
  gauge.Set(static_cast<double>(*bytes));
}

void Metrics::set_nvme(const KvNvme& nvme) {
  if (nvme.state == "off") return;
  for (const char* state : {"online", "read-only", "offline"}) {
    impl_->gauges("foretoken_kv_nvme_state", "1 for the state of the NVMe tier")
        .Add({{"state", state}})
        .Set(nvme.state == state ? 1 : 0);
  }
  impl_->nvme_slabs.Set(static_cast<double>(nvme.slabs_held));
  const auto raise = [&](Counter& counter, std::int64_t KvNvme::*count) {
    auto& most = impl_->most.*count;
    counter.Increment(static_cast<double>(std::max(most, nvme.*count) - most));
    most = std::max(most, nvme.*count);
  };
  raise(impl_->nvme_read, &KvNvme::bytes_read);
  raise(impl_->nvme_written, &KvNvme::bytes_written);
  raise(impl_->nvme_errors, &KvNvme::io_errors);
  raise(impl_->nvme_passed_over, &KvNvme::tokens_passed_over);
  raise(impl_->labelled(kFailures, kFailuresHelp, "tier", "nvme"), &KvNvme::checksum_failures);
  raise(impl_->host_failures, &KvNvme::host_checksum_failures);
}

}  // namespace foretoken::coordinator
