#include "kvstore/internal/slab_pool.h"

#include "common/check.h"
#include "common/ids.h"

namespace foretoken::kvstore {

SlabPool::SlabPool(std::uint32_t num_slabs) : slabs_(num_slabs) {}

SlabPool::Slab& SlabPool::at(SlabIndex slab) {
  FT_CHECK(raw(slab) < slabs_.size(), raw(slab), slabs_.size());
  return slabs_[raw(slab)];
}

void SlabPool::set_ready(std::uint32_t num_ready) {
  FT_CHECK(num_ready >= num_ready_ && num_ready <= num_slabs(), num_ready, num_ready_, num_slabs());
  num_ready_ = num_ready;
}

std::optional<SlabIndex> SlabPool::take_empty() {
  if (!emptied_.empty()) {
    const SlabIndex slab = emptied_.back();
    emptied_.pop_back();
    return slab;
  }
  if (num_fresh_ < num_ready_) return SlabIndex{num_fresh_++};
  if (!cached_.empty()) return evict();
  if (distrusted_.empty()) return std::nullopt;
  const SlabIndex slab = distrusted_.front();
  distrusted_.pop_front();
  at(slab).distrusted = false;
  return slab;
}

SlabIndex SlabPool::evict() {
  const SlabIndex victim = cached_.front();
  cached_.pop_front();
  unname(at(victim));
  ++num_evictions_;
  return victim;
}

void SlabPool::unname(Slab& slab) {
  by_key_.erase(slab.key);
  slab.published = false;
}

std::optional<SlabIndex> SlabPool::acquire() {
  const auto slab = take_empty();
  if (!slab) return std::nullopt;
  at(*slab).holds = 1;
  ++num_used_;
  return slab;
}

std::optional<SlabIndex> SlabPool::find(const PrefixKey& key) {
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return std::nullopt;
  Slab& slab = at(found->second);
  if (slab.holds++ == 0) {
    cached_.erase(slab.cached_place);
    ++num_used_;
  }
  return found->second;
}

std::optional<SlabIndex> SlabPool::peek(const PrefixKey& key) const {
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return std::nullopt;
  return found->second;
}

SlabPool::Run SlabPool::longest_run(std::span<const PrefixKey> keys) const {
  Run run;
  for (const PrefixKey& key : keys) {
    const auto found = by_key_.find(key);
    if (found == by_key_.end()) break;
    ++run.length;
    if (slabs_[raw(found->second)].holds == 0) ++run.cached;
  }
  return run;
}

bool SlabPool::publish(SlabIndex index, const PrefixKey& key) {
  Slab& slab = at(index);
  FT_CHECK(slab.holds > 0, raw(index));
  if (slab.published || slab.distrusted || !by_key_.try_emplace(key, index).second) return false;
  slab.published = true;
  slab.key = key;
  return true;
}

void SlabPool::unpublish(SlabIndex index) {
  Slab& slab = at(index);
  FT_CHECK(slab.holds == 1, raw(index), slab.holds);
  if (slab.published) unname(slab);
}

void SlabPool::distrust(SlabIndex index) {
  Slab& slab = at(index);
  FT_CHECK(slab.holds > 0, raw(index));
  slab.distrusted = true;
  if (slab.published) unname(slab);
}

bool SlabPool::is_shared(SlabIndex slab) const { return slabs_[raw(slab)].holds > 1; }

void SlabPool::release(SlabIndex index) {
  Slab& slab = at(index);
  FT_CHECK(slab.holds > 0, raw(index));
  if (--slab.holds > 0) return;
  --num_used_;
  if (slab.published) {
    slab.cached_place = cached_.insert(cached_.end(), index);
  } else if (slab.distrusted) {
    distrusted_.push_back(index);
  } else {
    emptied_.push_back(index);
  }
}

void SlabPool::check() const {
  std::vector<int> states(slabs_.size(), 0);
  const auto count = [&](SlabIndex slab) { ++states[raw(slab)]; };
  for (const SlabIndex slab : emptied_) {
    count(slab);
    FT_CHECK(slabs_[raw(slab)].holds == 0 && !slabs_[raw(slab)].published, raw(slab));
  }
  for (const SlabIndex slab : distrusted_) {
    count(slab);
    FT_CHECK(slabs_[raw(slab)].holds == 0 && !slabs_[raw(slab)].published, raw(slab));
    FT_CHECK(slabs_[raw(slab)].distrusted, raw(slab));
  }
  for (const SlabIndex slab : cached_) {
    count(slab);
    FT_CHECK(slabs_[raw(slab)].holds == 0 && slabs_[raw(slab)].published, raw(slab));
  }
  std::uint32_t used = 0;
  std::uint32_t published = 0;
  for (std::uint32_t i = 0; i < num_slabs(); ++i) {
    const Slab& slab = slabs_[i];
    if (slab.holds > 0) {
      ++states[i];
      ++used;
    }
    if (slab.published) ++published;
    FT_CHECK(states[i] == (i < num_fresh_ ? 1 : 0), i, states[i], num_fresh_);
    if (slab.published) FT_CHECK(by_key_.at(slab.key) == SlabIndex{i}, i);
  }
  FT_CHECK(used == num_used_, used, num_used_);
  FT_CHECK(published == by_key_.size(), published, by_key_.size());
  FT_CHECK(num_fresh_ <= num_ready_, num_fresh_, num_ready_);
}

}  // namespace foretoken::kvstore
