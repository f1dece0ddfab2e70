// Metrics: what the service counts, in prometheus-cpp's registry. Names: docs/operations.md.
// Numbers only: no prompt, key, path or client name goes into a label.
//
// Thread-safe as prometheus-cpp is: the exposer reads from its own threads.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "common/messages.h"

namespace foretoken::coordinator {

class Metrics {
 public:
  explicit Metrics(const std::string& model_name);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // Serves them over HTTP at 127.0.0.1:port/metrics. Throws Exception(kPortInUse).
  void serve(int port);
  // The text that would be served.
  std::string text() const;

  void on_rejected(ErrorCode why);
  void on_first_token(double seconds_since_arrival);
  void on_next_token(double seconds_since_last);
  void on_done(const DoneMessage& done);
  // All ranks have let go of a sequence, whatever its request ended with.
  void on_released(const KvReport& kv);
  void on_failed(ErrorCode why);
  void on_restart();
  // A request goes on after a death or a loss, for which so many of its tokens are computed again.
  void on_continued(std::int64_t recomputed_tokens);
  // A sequence was lost, by so many reads of host memory that failed their check.
  void on_lost(std::int64_t checksum_failures);
  void on_step(double seconds);
  // It took longer than --max-inter-token-ms.
  void on_late_step();
  void set_requests(std::size_t running, std::size_t waiting);
  void set_kv(std::int64_t slabs_total, std::int64_t slabs_free, std::int64_t slabs_cached);
  // For sequences, on the rank of the group that has the least. None: the group is dead.
  void set_device_free(int group, std::optional<std::int64_t> bytes);
  // Counts of the store's life. Groups tell them in turn, and one may do so late: of less than
  // before.
  void set_nvme(const KvNvme& nvme);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace foretoken::coordinator
