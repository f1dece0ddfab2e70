#include "worker/load_progress.h"

#include <algorithm>
#include <cmath>
#include <iostream>

#include "common/log.h"

namespace foretoken::worker {
namespace {

using Seconds = std::chrono::duration<double>;

constexpr std::chrono::milliseconds kBarInterval{100};
constexpr std::chrono::seconds kLogInterval{5};
constexpr std::int64_t kBarWidth = 20;
constexpr const char* kClearLine = "\r\033[K";

double gigabytes(std::int64_t bytes) { return static_cast<double>(bytes) * 1e-9; }

}  // namespace

std::string describe_progress(std::int64_t done_bytes, std::int64_t total_bytes, Seconds elapsed) {
  const double rate = elapsed.count() > 0 ? gigabytes(done_bytes) / elapsed.count() : 0;
  std::string text = fmt::format("{} %, {:.1f} of {:.1f} GB", 100 * done_bytes / total_bytes,
                                 gigabytes(done_bytes), gigabytes(total_bytes));
  if (rate <= 0) return text;
  const double left = gigabytes(total_bytes - done_bytes) / rate;
  return text + fmt::format(", {:.2f} GB/s, {:.0f} s left", rate, std::ceil(left));
}

std::string describe_load(std::int64_t bytes, Seconds elapsed, std::string_view source) {
  return fmt::format("{:.2f} GB in {:.2f} s ({:.1f} GB/s) from {}", gigabytes(bytes),
                     elapsed.count(), gigabytes(bytes) / std::max(elapsed.count(), 1e-9), source);
}

std::string progress_bar(std::int64_t done_bytes, std::int64_t total_bytes) {
  const auto filled = static_cast<std::size_t>(kBarWidth * done_bytes / total_bytes);
  return fmt::format("[{:.<{}}]", std::string(filled, '#'), kBarWidth);
}

void LoadProgress::begin(std::int64_t total_bytes) {
  total_ = std::max<std::int64_t>(1, total_bytes);
  begun_ = shown_ = Clock::now();
}

void LoadProgress::add(std::int64_t bytes) {
  done_ = std::min(total_, done_ + bytes);
  const auto now = Clock::now();
  if (style_ == Style::kBar && now - shown_ >= kBarInterval) {
    std::cerr << kClearLine << "weights " << progress_bar(done_, total_) << " "
              << describe_progress(done_, total_, now - begun_) << std::flush;
  } else if (style_ == Style::kLog && now - shown_ >= kLogInterval) {
    log().info("loading the weights: {}", describe_progress(done_, total_, now - begun_));
  } else {
    return;
  }
  shown_ = now;
}

void LoadProgress::end(std::string_view source) {
  if (style_ == Style::kNone) return;
  if (style_ == Style::kBar) std::cerr << kClearLine << std::flush;
  log().info("weights: {}", describe_load(total_, Clock::now() - begun_, source));
}

}  // namespace foretoken::worker
