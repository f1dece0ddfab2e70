// LoadProgress: tells people how far the loading of the weights is: a bar that moves on a terminal,
// or a log line every few seconds; and at the end how long it took.
//
// For one thread. Example: tests/worker/load_progress_test.cc
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace foretoken::worker {

class LoadProgress {
 public:
  enum class Style { kNone, kLog, kBar };

  explicit LoadProgress(Style style) : style_(style) {}

  void begin(std::int64_t total_bytes);
  void add(std::int64_t bytes);
  void end(std::string_view source);

 private:
  using Clock = std::chrono::steady_clock;
  const Style style_;
  std::int64_t total_ = 0;
  std::int64_t done_ = 0;
  Clock::time_point begun_;
  Clock::time_point shown_;
};

// "31 %, 5.0 of 16.1 GB, 6.20 GB/s, 2 s left". REQUIRES: total_bytes > 0.
std::string describe_progress(std::int64_t done_bytes, std::int64_t total_bytes,
                              std::chrono::duration<double> elapsed);
// "16.06 GB in 0.41 s (39.2 GB/s) from the store".
std::string describe_load(std::int64_t bytes, std::chrono::duration<double> elapsed,
                          std::string_view source);
// "[########............]", with so many of 20 places filled.
std::string progress_bar(std::int64_t done_bytes, std::int64_t total_bytes);

}  // namespace foretoken::worker
