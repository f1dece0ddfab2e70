#include "coordinator/output_text.h"

#include <algorithm>

namespace foretoken::coordinator {

OutputText::OutputText(const std::optional<Tokenizer>& tokenizer, std::vector<std::string> stops)
    : stops_(std::move(stops)) {
  if (tokenizer) decoder_.emplace(*tokenizer);
}

bool OutputText::push(TokenId id) { return decoder_ && decide(decoder_->push(id)); }

void OutputText::finish() {
  if (stopped_) return;
  if (decoder_ && decide(decoder_->flush())) return;
  text_ += std::exchange(held_, {});
}

std::string OutputText::take() {
  auto fresh = text_.substr(taken_);
  taken_ = text_.size();
  return fresh;
}

bool OutputText::decide(const std::string& more) {
  held_ += more;
  std::size_t first = std::string::npos;
  for (const auto& stop : stops_) first = std::min(first, held_.find(stop));
  stopped_ = first != std::string::npos;
  const std::size_t decided = stopped_ ? first : held_.size() - undecided(held_);
  text_.append(held_, 0, decided);
  held_.erase(0, stopped_ ? std::string::npos : decided);
  return stopped_;
}

std::size_t OutputText::undecided(const std::string& held) const {
  std::size_t most = 0;
  for (const auto& stop : stops_) {
    for (std::size_t n = std::min(stop.size() - 1, held.size()); n > most; --n) {
      if (held.compare(held.size() - n, n, stop, 0, n) == 0) most = n;
    }
  }
  return most;
}

}  // namespace foretoken::coordinator
