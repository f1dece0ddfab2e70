#include "kvstore/internal/read_choice.h"

#include <cmath>

#include "common/log.h"

namespace foretoken::kvstore {

void Pace::add(double tokens, Seconds time) {
  if (tokens <= 0) return;
  const double kept = std::exp(-tokens / kMemory);
  tokens_ = tokens_ * kept + tokens;
  time_ = time_ * kept + time;
}

std::optional<Pace::Seconds> Pace::time_for(double tokens) const {
  if (tokens_ <= 0) return std::nullopt;
  return time_ * (tokens / tokens_);
}

bool ReadChoice::reads(const PrefixKey& prefix, Way way, const Tokens& tokens, TimePoint now) {
  if (mode_ == Mode::kAlways || tokens.read <= 0) return true;
  std::erase_if(decisions_, [&](const auto& entry) { return now >= entry.second.until; });
  const auto [place, is_new] = decisions_.try_emplace({way, prefix});
  if (is_new) place->second = {decide(way, tokens), now + kSame};
  return place->second.reads;
}

bool ReadChoice::is_passed_over(const PrefixKey& prefix, Way way, TimePoint now) const {
  const auto found = decisions_.find({way, prefix});
  return found != decisions_.end() && now < found->second.until && !found->second.reads;
}

bool ReadChoice::decide(Way way, const Tokens& tokens) {
  Reading& reading = at(way);
  const auto read = reading.pace.time_for(tokens.read);
  const auto compute = computing_.time_for(tokens.compute);
  const bool pays = !read || !compute || *read <= *compute;
  if (pays != reading.pays) {
    log().info("prefixes on NVMe {}: of the next one, reading takes {:.0f} ms, computing {:.0f}",
               pays ? "are read again" : "are computed anew, as reading is slower",
               read.value_or(Pace::Seconds(0)).count() * 1e3,
               compute.value_or(Pace::Seconds(0)).count() * 1e3);
  }
  reading.pays = pays;
  if (pays) {
    reading.computed = Pace::Seconds(0);
    return true;
  }
  reading.computed += *compute;
  if (reading.computed < kTrialShare * *read) return false;
  reading.pace.forget();
  reading.computed = Pace::Seconds(0);
  return true;
}

}  // namespace foretoken::kvstore
