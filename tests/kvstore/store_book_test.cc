// StoreBook against a plain model: random leases, reservations, trims, commits and releases. The
// model holds sets and maps only, and says exactly which slab may be given when.
//
// FORETOKEN_STORE_OPS sets the number of operations (100,000).
#include "kvstore/internal/store_book.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <map>
#include <optional>
#include <random>
#include <set>

namespace foretoken::kvstore {
namespace {

constexpr unsigned kSeed = 20261122;

PrefixKey key_of(int prompt, int segment) {
  PrefixKey key;
  key.bytes[0] = static_cast<std::uint8_t>(prompt + 1);
  key.bytes[9] = static_cast<std::uint8_t>(segment + 1);
  return key;
}
std::vector<PrefixKey> keys_of(int prompt, int count) {
  std::vector<PrefixKey> keys;
  for (int i = 0; i < count; ++i) keys.push_back(key_of(prompt, i));
  return keys;
}

// ---- the model --------------------------------------------------------------------------------

// One head: every slab number is in exactly one of free, last, held and cached.
struct HeadModel {
  std::set<SlabIndex> free;
  std::list<SlabIndex> last;                 // free and distrusted, in the order they became so
  std::set<SlabIndex> distrusted;            // held or in `last`
  std::map<SlabIndex, int> held;             // holds
  std::list<SlabIndex> cached;               // least recently used first
  std::map<SlabIndex, PrefixKey> published;  // held or cached

  std::optional<SlabIndex> find(const PrefixKey& key) const {
    for (const auto& [slab, its_key] : published) {
      if (its_key == key) return slab;
    }
    return std::nullopt;
  }
  void hold(SlabIndex slab) {
    cached.remove(slab);
    ++held[slab];
  }
  // The store chose `slab` as an empty one: it must have been free, or the oldest cached one.
  void take_empty(SlabIndex slab) {
    if (free.erase(slab) == 0) {
      ASSERT_TRUE(free.empty()) << "evicted although slabs were free";
      std::list<SlabIndex>& from = cached.empty() ? last : cached;
      ASSERT_FALSE(from.empty());
      ASSERT_EQ(from.front(), slab) << "evicted out of turn";
      from.pop_front();
      published.erase(slab);
      distrusted.erase(slab);
    }
    ASSERT_FALSE(held.contains(slab)) << "a slab in use was given away";
    held[slab] = 1;
  }
  void release(SlabIndex slab) {
    ASSERT_GT(held[slab], 0);
    if (--held[slab] > 0) return;
    held.erase(slab);
    if (published.contains(slab)) {
      cached.push_back(slab);
    } else if (distrusted.contains(slab)) {
      last.push_back(slab);
    } else {
      free.insert(slab);
    }
  }
  std::size_t num_available() const { return free.size() + last.size() + cached.size(); }
};

struct AllocationModel {
  std::vector<SlabIndex> slabs;
  int hits = 0;
  std::set<LeaseId> holders;
};
using Place = std::tuple<int, Epoch, SequenceId, std::optional<int>, int>;

// Of these, as of outsized ones, ranks have slabs of their own.
bool is_own(SequenceId sequence) { return raw(sequence) % 4 == 3; }

struct LeaseModel {
  LeaseOwner owner;
  std::set<SequenceId> sequences;
};

class BookModel {
 public:
  BookModel(int num_heads, std::uint32_t slabs) : heads_(static_cast<std::size_t>(num_heads)) {
    for (HeadModel& head : heads_) {
      for (std::uint32_t i = 0; i < slabs; ++i) head.free.insert(SlabIndex{i});
    }
  }

  std::map<LeaseId, LeaseModel> leases;

  Place place(const LeaseOwner& owner, SequenceId sequence, int i) const {
    const auto rank = is_own(sequence) ? std::optional(owner.rank) : std::nullopt;
    return {owner.group, owner.epoch, sequence, rank, owner.first_head + i};
  }
  HeadModel& head(const LeaseOwner& owner, int i) {
    return heads_[static_cast<std::size_t>(owner.first_head + i)];
  }

  // Whether a reserve must succeed: on every head that nobody of the group has reserved yet, what
  // is free or cached, less the cached ones that are hits, must do.
  bool fits(const LeaseOwner& owner, SequenceId sequence, std::span<const PrefixKey> keys,
            int num_segments) {
    for (int i = 0; i < owner.num_heads; ++i) {
      if (allocations_.contains(place(owner, sequence, i))) continue;
      const HeadModel& model = head(owner, i);
      std::size_t available = model.num_available();
      std::size_t wanted = static_cast<std::size_t>(num_segments);
      for (const PrefixKey& key : keys) {
        const auto slab = model.find(key);
        if (!slab) break;
        --wanted;
        if (!model.held.contains(*slab)) --available;
      }
      if (available < wanted) return false;
    }
    return true;
  }

  void reserved(LeaseId lease, SequenceId sequence, std::span<const PrefixKey> keys,
                int num_segments, const Grant& grant) {
    const LeaseOwner& owner = leases.at(lease).owner;
    const auto segments = static_cast<std::size_t>(num_segments);
    ASSERT_EQ(grant.slabs.size(), segments * static_cast<std::size_t>(owner.num_heads));
    for (int i = 0; i < owner.num_heads; ++i) {
      const std::span<const SlabIndex> slabs(
          grant.slabs.data() + static_cast<std::size_t>(i) * segments, segments);
      AllocationModel& allocation = allocations_[place(owner, sequence, i)];
      if (allocation.holders.empty()) {
        allocate(allocation, head(owner, i), keys, slabs);
        if (testing::Test::HasFatalFailure()) return;
      }
      allocation.holders.insert(lease);
      ASSERT_TRUE(std::ranges::equal(allocation.slabs, slabs)) << "ranks of a group differ";
      ASSERT_EQ(allocation.hits, grant.head_hits[static_cast<std::size_t>(i)]);
    }
    leases.at(lease).sequences.insert(sequence);
  }

  // Whether a use must succeed: shared hits past hit_segments need empty slabs.
  bool swaps_fit(const LeaseOwner& owner, SequenceId sequence, int hit_segments) {
    for (int i = 0; i < owner.num_heads; ++i) {
      const AllocationModel& allocation = allocations_.at(place(owner, sequence, i));
      const HeadModel& model = head(owner, i);
      std::size_t shared = 0;
      for (int at = hit_segments; at < allocation.hits; ++at) {
        if (model.held.at(allocation.slabs[static_cast<std::size_t>(at)]) > 1) ++shared;
      }
      if (shared > model.num_available()) return false;
    }
    return true;
  }

  void used(LeaseId lease, SequenceId sequence, int hit_segments, const Grant& grant) {
    const LeaseOwner& owner = leases.at(lease).owner;
    for (int i = 0; i < owner.num_heads; ++i) {
      AllocationModel& allocation = allocations_.at(place(owner, sequence, i));
      HeadModel& model = head(owner, i);
      const auto granted =
          grant.slabs.begin() + static_cast<std::ptrdiff_t>(allocation.slabs.size()) * i;
      for (; allocation.hits > hit_segments; --allocation.hits) {
        SlabIndex& slab = allocation.slabs[static_cast<std::size_t>(allocation.hits - 1)];
        if (model.held.at(slab) == 1) {
          model.published.erase(slab);
          continue;
        }
        model.release(slab);
        slab = granted[allocation.hits - 1];
        model.take_empty(slab);
        if (testing::Test::HasFatalFailure()) return;
      }
      ASSERT_EQ(grant.head_hits[static_cast<std::size_t>(i)], allocation.hits);
      ASSERT_TRUE(std::equal(allocation.slabs.begin(), allocation.slabs.end(), granted));
    }
  }

  void committed(LeaseId lease, SequenceId sequence, int segment, const PrefixKey& key) {
    const LeaseOwner& owner = leases.at(lease).owner;
    for (int i = 0; i < owner.num_heads; ++i) {
      HeadModel& model = head(owner, i);
      const SlabIndex slab =
          allocations_.at(place(owner, sequence, i)).slabs[static_cast<std::size_t>(segment)];
      if (model.published.contains(slab) || model.distrusted.contains(slab)) continue;
      if (!model.find(key)) model.published[slab] = key;
    }
  }

  void distrusted(LeaseId lease, SequenceId sequence) {
    const LeaseOwner& owner = leases.at(lease).owner;
    for (int i = 0; i < owner.num_heads; ++i) {
      for (const SlabIndex slab : allocations_.at(place(owner, sequence, i)).slabs) {
        head(owner, i).published.erase(slab);
        head(owner, i).distrusted.insert(slab);
      }
    }
  }

  void released(LeaseId lease, SequenceId sequence) {
    const LeaseOwner& owner = leases.at(lease).owner;
    for (int i = 0; i < owner.num_heads; ++i) {
      const auto found = allocations_.find(place(owner, sequence, i));
      found->second.holders.erase(lease);
      if (!found->second.holders.empty()) continue;
      for (auto slab = found->second.slabs.rbegin(); slab != found->second.slabs.rend(); ++slab) {
        head(owner, i).release(*slab);
      }
      allocations_.erase(found);
    }
    leases.at(lease).sequences.erase(sequence);
  }

  void expect_stat(const StoreStat& stat) const {
    std::int64_t sequences = 0;
    for (const auto& [id, lease] : leases) {
      sequences += static_cast<std::int64_t>(lease.sequences.size());
    }
    ASSERT_EQ(stat.sequences, sequences);
    ASSERT_EQ(stat.leases, static_cast<std::int64_t>(leases.size()));
    std::size_t least_available = SIZE_MAX;
    for (const HeadModel& model : heads_) {
      least_available = std::min(least_available, model.num_available());
    }
    ASSERT_EQ(stat.slabs_free + stat.slabs_cached, static_cast<std::int64_t>(least_available));
    ASSERT_EQ(stat.slabs_free + stat.slabs_cached + stat.slabs_used, stat.slabs_ready);
  }

 private:
  void allocate(AllocationModel& allocation, HeadModel& model, std::span<const PrefixKey> keys,
                std::span<const SlabIndex> slabs) {
    for (const PrefixKey& key : keys) {
      const auto slab = model.find(key);
      if (!slab) break;
      ASSERT_EQ(slabs[static_cast<std::size_t>(allocation.hits)], *slab) << "a hit was missed";
      ++allocation.hits;
      model.hold(*slab);
    }
    for (const SlabIndex slab : slabs.subspan(static_cast<std::size_t>(allocation.hits))) {
      model.take_empty(slab);
      if (testing::Test::HasFatalFailure()) return;
    }
    allocation.slabs.assign(slabs.begin(), slabs.end());
  }

  std::vector<HeadModel> heads_;
  std::map<Place, AllocationModel> allocations_;
};

// ---- random traffic ---------------------------------------------------------------------------

class Traffic {
 public:
  static constexpr int kHeads = 3;
  static constexpr std::uint32_t kSlabs = 24;

  Traffic() : book_(kHeads, kSlabs), model_(kHeads, kSlabs) { book_.set_ready(kSlabs); }

  void step() {
    const unsigned choice = pick(100);
    if (choice < 4 || model_.leases.empty()) return open();
    const LeaseId lease = any_lease();
    if (choice < 6) return close(lease);
    const LeaseModel& held = model_.leases.at(lease);
    if (choice < 40 || held.sequences.empty()) return reserve(lease);
    const SequenceId sequence = any(held.sequences);
    if (choice < 50) return use(lease, sequence);
    if (choice < 75) return commit(lease, sequence);
    if (choice < 78) return distrust(lease, sequence);
    release(lease, sequence);
  }

  void check() {
    book_.check();
    model_.expect_stat(book_.stat());
  }

  void close_everything() {
    while (!model_.leases.empty()) close(any_lease());
    check();
    EXPECT_EQ(book_.stat().slabs_used, 0);
  }

 private:
  // What a sequence asks for follows from its number, so that ranks that share a head agree.
  static int prompt_of(SequenceId sequence) { return static_cast<int>(raw(sequence) % 5); }
  static int segments_of(SequenceId sequence) { return 1 + static_cast<int>(raw(sequence) % 9); }
  static std::vector<PrefixKey> keys_for(SequenceId sequence) {
    return keys_of(prompt_of(sequence), is_own(sequence) ? 0 : segments_of(sequence) - 1);
  }

  unsigned pick(unsigned n) { return static_cast<unsigned>(random_() % n); }
  SequenceId any(const std::set<SequenceId>& set) {
    return *std::next(set.begin(), pick(static_cast<unsigned>(set.size())));
  }
  LeaseId any_lease() {
    return std::next(model_.leases.begin(), pick(static_cast<unsigned>(model_.leases.size())))
        ->first;
  }

  void open() {
    if (model_.leases.size() >= 6) return;
    // Rank 0 has heads 0 and 1, rank 1 has 1 and 2: head 1 is shared within a group.
    const int rank = static_cast<int>(pick(2));
    const LeaseOwner owner{static_cast<int>(pick(2)), rank, Epoch{pick(3)}, rank, 2};
    if (book_.find_lease(owner.group, owner.rank) != nullptr) return;
    model_.leases[book_.open_lease(owner)] = {owner, {}};
  }
  void close(LeaseId lease) {
    book_.close_lease(lease);
    while (!model_.leases.at(lease).sequences.empty()) {
      model_.released(lease, *model_.leases.at(lease).sequences.begin());
    }
    model_.leases.erase(lease);
  }
  void reserve(LeaseId lease) {
    const SequenceId sequence{pick(40)};
    const auto keys = keys_for(sequence);
    const int segments = segments_of(sequence);
    const LeaseModel& held = model_.leases.at(lease);
    const bool again = held.sequences.contains(sequence);
    const bool fits = model_.fits(held.owner, sequence, keys, segments);
    const SlabsOf whose = is_own(sequence) ? SlabsOf::kRank : SlabsOf::kGroup;
    ASSERT_EQ(book_.can_reserve(lease, sequence, keys, segments, whose).has_value(),
              fits && !again);
    const auto grant = book_.reserve(lease, sequence, keys, segments, whose);
    ASSERT_EQ(grant.has_value(), fits && !again);
    if (grant) return model_.reserved(lease, sequence, keys, segments, *grant);
    ASSERT_EQ(grant.error().code, again ? ErrorCode::kInvalidArgument : ErrorCode::kExhausted);
  }
  void use(LeaseId lease, SequenceId sequence) {
    const int hits = static_cast<int>(pick(6));
    const bool fits = model_.swaps_fit(model_.leases.at(lease).owner, sequence, hits);
    const auto grant = book_.use(lease, sequence, hits);
    ASSERT_EQ(grant.has_value(), fits);
    if (grant) model_.used(lease, sequence, hits, *grant);
  }
  void commit(LeaseId lease, SequenceId sequence) {
    const int segment = static_cast<int>(pick(static_cast<unsigned>(segments_of(sequence))));
    const bool other = pick(8) == 0;  // a key that is not the slab's own
    const PrefixKey key = key_of(other ? static_cast<int>(pick(5)) : prompt_of(sequence), segment);
    ASSERT_TRUE(book_.commit(lease, sequence, segment, key));
    model_.committed(lease, sequence, segment, key);
  }
  void distrust(LeaseId lease, SequenceId sequence) {
    ASSERT_TRUE(book_.distrust(lease, sequence));
    model_.distrusted(lease, sequence);
  }
  void release(LeaseId lease, SequenceId sequence) {
    ASSERT_TRUE(book_.release(lease, sequence));
    model_.released(lease, sequence);
  }

  std::mt19937_64 random_{kSeed};
  StoreBook book_;
  BookModel model_;
};

TEST(StoreBook, AgreesWithAPlainModel) {
  const char* wanted = std::getenv("FORETOKEN_STORE_OPS");
  const std::int64_t operations = wanted == nullptr ? 100'000 : std::atoll(wanted);
  Traffic traffic;
  for (std::int64_t i = 0; i < operations; ++i) {
    traffic.step();
    if (i % 1'000 == 0) traffic.check();
    ASSERT_FALSE(testing::Test::HasFailure()) << "seed " << kSeed << ", operation " << i;
  }
  traffic.close_everything();
}

class StoreBookTest : public testing::Test {
 protected:
  StoreBookTest() { book.set_ready(10); }
  LeaseId lease(int group, int rank, int epoch = 1) {
    return book.open_lease({group, rank, Epoch{static_cast<std::uint32_t>(epoch)}, 0, 2});
  }
  // Reserves, commits all keys, releases: the prefix is cached.
  void cache(LeaseId by, SequenceId sequence, int prompt, int segments) {
    ASSERT_TRUE(book.reserve(by, sequence, {}, segments));
    for (int i = 0; i < segments; ++i) {
      ASSERT_TRUE(book.commit(by, sequence, i, key_of(prompt, i)));
    }
    ASSERT_TRUE(book.release(by, sequence));
  }
  StoreBook book{2, 12};
};

TEST_F(StoreBookTest, HandsOutOnlyWhatIsReady) {
  const LeaseId rank = lease(0, 0);
  const auto none = book.reserve(rank, SequenceId{1}, {}, 11);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code, ErrorCode::kExhausted);  // may pass: two slabs are not ready yet
  const auto never = book.reserve(rank, SequenceId{1}, {}, 13);
  ASSERT_FALSE(never);
  EXPECT_EQ(never.error().code, ErrorCode::kInvalidArgument);
  book.set_ready(12);
  EXPECT_TRUE(book.reserve(rank, SequenceId{1}, {}, 11));
}

TEST_F(StoreBookTest, FindsAPrefixThatAnotherGroupMade) {
  cache(lease(0, 0), SequenceId{1}, 7, 4);
  const LeaseId other = lease(1, 0);
  const auto grant = book.reserve(other, SequenceId{9}, keys_of(7, 6), 8);
  ASSERT_TRUE(grant);
  EXPECT_EQ(grant->head_hits, (std::vector<int>{4, 4}));
  EXPECT_EQ(book.stat().hits, 8);
  EXPECT_EQ(book.stat().misses, 4);
}

TEST_F(StoreBookTest, ASharedPrefixIsHeldOnceAndNeverEvicted) {
  const LeaseId rank = lease(0, 0);
  cache(rank, SequenceId{1}, 7, 4);
  const auto first = book.reserve(rank, SequenceId{2}, keys_of(7, 4), 5);
  const auto second = book.reserve(rank, SequenceId{3}, keys_of(7, 4), 5);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->slabs.front(), second->slabs.front());
  EXPECT_EQ(book.stat().slabs_used, 6);
  EXPECT_TRUE(book.reserve(rank, SequenceId{4}, {}, 4));
  EXPECT_FALSE(book.reserve(rank, SequenceId{5}, {}, 1)) << "all ten are in use";
  EXPECT_EQ(book.stat().evictions, 0);
}

TEST_F(StoreBookTest, ForgetsTheTailOfTheOldestPrefixFirst) {
  const LeaseId rank = lease(0, 0);
  cache(rank, SequenceId{1}, 1, 4);
  cache(rank, SequenceId{2}, 2, 4);
  ASSERT_TRUE(book.reserve(rank, SequenceId{3}, {}, 4));  // two free ones, then two evictions
  EXPECT_EQ(book.stat().evictions, 4);                    // on each of two heads
  EXPECT_EQ(book.reserve(rank, SequenceId{4}, keys_of(1, 4), 4)->head_hits[0], 2);
}

TEST_F(StoreBookTest, UseSwapsWhatTheRanksDidNotAgreeOn) {
  const LeaseId rank = lease(0, 0);
  cache(rank, SequenceId{1}, 7, 4);
  const auto reader = book.reserve(rank, SequenceId{2}, keys_of(7, 4), 4);
  const auto other = book.reserve(rank, SequenceId{3}, keys_of(7, 4), 4);
  ASSERT_TRUE(reader && other);
  const auto used = book.use(rank, SequenceId{3}, 1);
  ASSERT_TRUE(used);
  EXPECT_EQ(used->head_hits[0], 1);
  EXPECT_EQ(used->slabs[0], reader->slabs[0]);
  EXPECT_NE(used->slabs[1], reader->slabs[1]) << "somebody reads it: not ours to write";
  ASSERT_TRUE(book.release(rank, SequenceId{2}));
  EXPECT_EQ(book.reserve(rank, SequenceId{4}, keys_of(7, 4), 4)->head_hits[0], 4);
}

TEST_F(StoreBookTest, RanksOfAGroupShareASequencesSlabs) {
  const LeaseId low = lease(0, 0);
  const LeaseId high = lease(0, 1);
  const auto first = book.reserve(low, SequenceId{1}, {}, 3);
  const auto second = book.reserve(high, SequenceId{1}, {}, 3);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->slabs, second->slabs);
  EXPECT_EQ(book.stat().slabs_used, 3);
  EXPECT_FALSE(book.reserve(low, SequenceId{1}, {}, 3)) << "reserved already";
  ASSERT_TRUE(book.release(low, SequenceId{1}));
  EXPECT_EQ(book.stat().slabs_used, 3) << "the other rank still reads";
  book.close_lease(high);
  EXPECT_EQ(book.stat().slabs_used, 0);
}

TEST_F(StoreBookTest, RanksOfAGroupHaveSlabsOfTheirOwnWhereTheyAskForThem) {
  const LeaseId low = lease(0, 0);
  const LeaseId high = lease(0, 1);
  const auto first = book.reserve(low, SequenceId{1}, {}, 5, SlabsOf::kRank);
  const auto second = book.reserve(high, SequenceId{1}, {}, 4, SlabsOf::kRank);
  ASSERT_TRUE(first && second);
  for (const SlabIndex slab : std::span(first->slabs).first(5)) {
    EXPECT_EQ(std::ranges::count(std::span(second->slabs).first(4), slab), 0);
  }
  EXPECT_EQ(book.stat().slabs_used, 9);
  EXPECT_FALSE(book.reserve(low, SequenceId{1}, {}, 1, SlabsOf::kRank)) << "reserved already";
  EXPECT_FALSE(book.can_reserve(low, SequenceId{2}, {}, 2, SlabsOf::kRank)) << "one is left";
  EXPECT_EQ(book.use(high, SequenceId{1}, 0)->slabs, second->slabs);
  ASSERT_TRUE(book.distrust(low, SequenceId{1}));
  ASSERT_TRUE(book.release(low, SequenceId{1}));
  EXPECT_EQ(book.stat().slabs_used, 4);
  book.check();
  book.close_lease(high);
  EXPECT_EQ(book.stat().slabs_used, 0);
}

TEST_F(StoreBookTest, AGroupIsWhatRunsInOneEpoch) {
  const LeaseId low = lease(0, 0, 2);
  const LeaseId high = lease(0, 1, 2);
  const LeaseId dying = lease(0, 2, 1);
  lease(1, 0, 2);
  std::vector<LeaseId> found;
  for (const auto& [id, owner] : book.group_of(low)) found.push_back(id);
  EXPECT_EQ(found, (std::vector{low, high}));
  EXPECT_EQ(book.group_of(dying).size(), 1U);
}

TEST_F(StoreBookTest, AnEpochNeverMeetsTheSlabsOfTheLast) {
  const LeaseId old = lease(0, 0, 1);
  const LeaseId fresh = book.open_lease({0, 1, Epoch{2}, 0, 2});
  const auto before = book.reserve(old, SequenceId{1}, {}, 3);
  const auto after = book.reserve(fresh, SequenceId{1}, {}, 3);
  ASSERT_TRUE(before && after);
  EXPECT_NE(before->slabs, after->slabs);
}

TEST_F(StoreBookTest, AKeyThatIsThereStaysWithItsFirstSlab) {
  const LeaseId rank = lease(0, 0);
  ASSERT_TRUE(book.reserve(rank, SequenceId{1}, {}, 1));
  ASSERT_TRUE(book.reserve(rank, SequenceId{2}, {}, 1));
  ASSERT_TRUE(book.commit(rank, SequenceId{1}, 0, key_of(1, 0)));
  ASSERT_TRUE(book.commit(rank, SequenceId{1}, 0, key_of(1, 0))) << "twice does no harm";
  ASSERT_TRUE(book.commit(rank, SequenceId{2}, 0, key_of(1, 0)));
  ASSERT_TRUE(book.release(rank, SequenceId{1}));
  ASSERT_TRUE(book.release(rank, SequenceId{2}));
  EXPECT_EQ(book.stat().slabs_cached, 1);
  EXPECT_EQ(book.stat().slabs_free, 9);
}

TEST_F(StoreBookTest, KnowsWhatASegmentBuildsOnWhoeverHoldsThat) {
  const LeaseId rank = lease(0, 0);
  cache(rank, SequenceId{1}, 1, 1);
  ASSERT_TRUE(book.reserve(rank, SequenceId{2}, {}, 4));
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(book.commit(rank, SequenceId{2}, i, key_of(1, i)));
  EXPECT_EQ(book.key_before(rank, SequenceId{2}, 0), std::nullopt);
  EXPECT_EQ(book.key_before(rank, SequenceId{2}, 1), key_of(1, 0)) << "of the other's slab";
  ASSERT_TRUE(book.commit(rank, SequenceId{2}, 3, key_of(1, 3)));
  EXPECT_EQ(book.key_before(rank, SequenceId{2}, 3), std::nullopt) << "2 has no key yet";
  ASSERT_TRUE(book.reserve(rank, SequenceId{3}, keys_of(1, 2), 3));
  ASSERT_TRUE(book.commit(rank, SequenceId{3}, 2, key_of(1, 2)));
  EXPECT_EQ(book.key_before(rank, SequenceId{3}, 2), key_of(1, 1)) << "as it was reserved";
}

TEST_F(StoreBookTest, WhatIsDistrustedServesNobodyAndIsTakenLast) {
  const LeaseId rank = lease(0, 0);
  cache(rank, SequenceId{1}, 7, 4);
  const auto reader = book.reserve(rank, SequenceId{2}, keys_of(7, 4), 5);
  const auto other = book.reserve(rank, SequenceId{3}, keys_of(7, 4), 5);
  ASSERT_TRUE(reader && other);
  ASSERT_TRUE(book.distrust(rank, SequenceId{2}));
  ASSERT_TRUE(book.commit(rank, SequenceId{3}, 0, key_of(7, 0))) << "no harm, and no effect";
  ASSERT_TRUE(book.release(rank, SequenceId{2}));
  ASSERT_TRUE(book.release(rank, SequenceId{3}));
  book.check();
  EXPECT_EQ(book.stat().slabs_free, 10);

  const auto next = book.reserve(rank, SequenceId{4}, keys_of(7, 4), 5);
  ASSERT_TRUE(next);
  EXPECT_EQ(next->head_hits[0], 0);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(std::ranges::count(next->slabs, reader->slabs[static_cast<std::size_t>(i)]), 0);
  }
  EXPECT_TRUE(book.reserve(rank, SequenceId{5}, {}, 5)) << "there are no others";
  EXPECT_TRUE(book.commit(rank, SequenceId{5}, 0, key_of(7, 0)));
  EXPECT_TRUE(book.release(rank, SequenceId{5}));
  EXPECT_EQ(book.stat().slabs_cached, 1) << "whoever takes it begins anew";
  book.check();
}

// Between a reservation and its use.
TEST_F(StoreBookTest, UseTakesOverWhatWasDistrusted) {
  const LeaseId rank = lease(0, 0);
  cache(rank, SequenceId{1}, 7, 4);
  ASSERT_TRUE(book.reserve(rank, SequenceId{2}, keys_of(7, 4), 4));
  ASSERT_TRUE(book.distrust(rank, SequenceId{2}));
  ASSERT_TRUE(book.use(rank, SequenceId{2}, 0));
  ASSERT_TRUE(book.release(rank, SequenceId{2}));
  book.check();
  EXPECT_EQ(book.stat().slabs_free, 10);
}

TEST_F(StoreBookTest, RefusesWhatIsNotHeld) {
  const LeaseId rank = lease(0, 0);
  EXPECT_FALSE(book.release(rank, SequenceId{1}));
  EXPECT_FALSE(book.distrust(rank, SequenceId{1}));
  EXPECT_FALSE(book.use(rank, SequenceId{1}, 0));
  EXPECT_FALSE(book.commit(rank, SequenceId{1}, 0, key_of(1, 0)));
  ASSERT_TRUE(book.reserve(rank, SequenceId{1}, {}, 2));
  EXPECT_FALSE(book.commit(rank, SequenceId{1}, 2, key_of(1, 0)));
}

// Memory ran out while the arena was made ready: nothing is waited for that never comes.
TEST(StoreBookSettles, WhatIsReadyIsAll) {
  StoreBook book(2, 8);
  const LeaseId lease = book.open_lease({0, 0, Epoch{1}, 0, 2});
  book.set_ready(3);
  EXPECT_EQ(book.reserve(lease, SequenceId{1}, {}, 4).error().code, ErrorCode::kExhausted);
  EXPECT_EQ(book.stat().slabs_total, 8);
  book.settle();
  EXPECT_EQ(book.reserve(lease, SequenceId{1}, {}, 4).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(book.stat().slabs_total, 3);
  EXPECT_EQ(book.num_unheld(0), 3U);
  EXPECT_TRUE(book.reserve(lease, SequenceId{1}, {}, 3));
  book.check();
}

}  // namespace
}  // namespace foretoken::kvstore
