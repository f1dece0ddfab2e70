#include "kvstore/internal/promotions.h"

#include <algorithm>
#include <utility>

#include "common/ids.h"

namespace foretoken::kvstore {

bool Promotions::is_under_way(std::span<const PrefixKey> keys, TimePoint now) const {
  if (keys.empty()) return false;
  const auto found = prefixes_.find(keys.back());
  return found != prefixes_.end() && is_awaited(found->second, now);
}

bool Promotions::is_coming(int first_head, int num_heads, std::span<const PrefixKey> keys,
                           TimePoint now) {
  if (keys.empty()) return false;
  const auto [place, is_new] = prefixes_.try_emplace(keys.back());
  Prefix& prefix = place->second;
  if (is_new) {
    prefix.limit = now + kLimit;
    prefix.is_read = choice_.reads(keys.back(), ReadChoice::Way::kPromoted,
                                   tokens_to_read(first_head, num_heads, keys, now), now);
  }
  want(prefix, now);
  if (now < prefix.limit && prefix.is_read) begin(prefix, first_head, num_heads, keys, now);
  if (is_awaited(prefix, now)) return true;
  let_go(prefix, first_head, num_heads);
  if (is_new) prefixes_.erase(place);  // else a rank that comes later must meet the same limit
  return false;
}

ReadChoice::Tokens Promotions::tokens_to_read(int first_head, int num_heads,
                                              std::span<const PrefixKey> keys,
                                              TimePoint now) const {
  int num_read = 0;      // slabs
  int num_whole = 0;     // segments that will be there
  int num_in_arena = 0;  // ... and are, from the first one on
  for (const PrefixKey& key : keys) {
    int num_on_file = 0;
    for (int i = 0; i < num_heads; ++i) {
      const auto place = mover_.place_of({first_head + i, key}, now);
      if (place == TierMover::Place::kNeither) num_on_file = num_heads + 1;
      if (place == TierMover::Place::kFile) ++num_on_file;
    }
    if (num_on_file > num_heads) break;
    if (num_on_file == 0 && num_in_arena == num_whole) ++num_in_arena;
    num_read += num_on_file;
    ++num_whole;
  }
  return {static_cast<double>(num_read) * kSegmentTokens / num_heads,
          static_cast<double>(num_whole - num_in_arena) * kSegmentTokens};
}

// Segment by segment over all heads: what has come when nobody waits any longer is of use, since
// the shortest run of a rank's heads counts.
void Promotions::begin(Prefix& prefix, int first_head, int num_heads,
                       std::span<const PrefixKey> keys, TimePoint now) {
  std::set<int> heads;  // whose run of hits is not over
  for (int head = first_head; head < first_head + num_heads; ++head) {
    if (prefix.heads.insert(head).second) heads.insert(head);
  }
  for (const PrefixKey& key : keys) {
    std::erase_if(heads, [&](int head) {
      const SlabName name{head, key};
      switch (mover_.promote(name, now)) {
        case TierMover::Promoted::kIsThere:
          hold(prefix, name);
          return false;
        case TierMover::Promoted::kComes:
          if (!is_reading()) read_at_ = now;
          prefix.awaited.insert(name);
          return false;
        case TierMover::Promoted::kNowhere:
          return true;
      }
      return true;
    });
  }
}

// False: it has not come.
bool Promotions::hold(Prefix& prefix, const SlabName& name) {
  const auto slab = book_.hold_published(name.head, name.key);
  if (slab) prefix.held.emplace(name, *slab);
  return slab.has_value();
}

void Promotions::let_go(Prefix& prefix, int first_head, int num_heads) {
  const auto is_theirs = [&](const SlabName& name) {
    return name.head >= first_head && name.head < first_head + num_heads;
  };
  std::erase_if(prefix.held, [&](const auto& held) {
    if (!is_theirs(held.first)) return false;
    book_.return_slab(held.first.head, held.second);
    return true;
  });
  std::erase_if(prefix.awaited, is_theirs);
  for (int i = 0; i < num_heads; ++i) prefix.heads.erase(first_head + i);
}

// The disk's time, not a prefix's: of several at once, each waits for the others'.
void Promotions::on_ended(const SlabName& name, TimePoint now) {
  bool has_come = false;
  for (auto& [key, prefix] : prefixes_) {
    if (prefix.awaited.erase(name) == 0) continue;
    if (hold(prefix, name)) has_come = true;
    want(prefix, now);
  }
  if (!has_come) return;
  choice_.on_read(ReadChoice::Way::kPromoted, 1.0 * kSegmentTokens / num_kv_heads_,
                  now - std::exchange(read_at_, now));
}

bool Promotions::is_reading() const {
  return std::ranges::any_of(prefixes_, [](const auto& e) { return !e.second.awaited.empty(); });
}

void Promotions::forget_late(TimePoint now) {
  std::erase_if(prefixes_, [&](const auto& entry) {
    const Prefix& prefix = entry.second;
    if (now < end_of(prefix)) return false;
    for (const auto& [name, slab] : prefix.held) book_.return_slab(name.head, slab);
    return true;
  });
}

std::optional<TimePoint> Promotions::deadline() const {
  std::optional<TimePoint> next;
  for (const auto& [key, prefix] : prefixes_) {
    next = std::min(next.value_or(end_of(prefix)), end_of(prefix));
  }
  return next;
}

bool Promotions::is_awaited(const Prefix& prefix, TimePoint now) {
  return !prefix.awaited.empty() && now < prefix.limit;
}

void Promotions::want(Prefix& prefix, TimePoint now) {
  prefix.wanted_until = std::min(now, prefix.limit) + kComeAgain;
}

// While slabs come it is kept, so that none of them is asked for anew.
TimePoint Promotions::end_of(const Prefix& prefix) {
  return prefix.awaited.empty() ? prefix.wanted_until : prefix.limit + kComeAgain;
}

}  // namespace foretoken::kvstore
