// Promotions: prefixes on their way from NVMe to reservations that come again for them. A rank
// can't wait for a disk, as its whole group would stand still meanwhile: its Reserve is refused as
// pending, and what it needs is kept for its next one.
//
// A prefix is promoted once for all that ask for it: ranks of a group each bring their own heads,
// and none is let through before the others' have come, so that they go on together. What the arena
// has of the prefix, and what has come, is held until a reservation of its head is made, or until
// nobody has asked for kComeAgain. After kLimit a reservation goes on with the hits that there are.
// Nothing is promoted of a prefix that takes less time to compute (read_choice.h), which is told
// what promotions take.
//
// For the store's thread. Example: tests/kvstore/promotions_test.cc
#pragma once

#include <chrono>
#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <span>

#include "common/prefix_key.h"
#include "kvstore/internal/read_choice.h"
#include "kvstore/internal/store_book.h"
#include "kvstore/internal/tier_mover.h"

namespace foretoken::kvstore {

class Promotions {
 public:
  // Of one prefix, from the first time that it is asked for; it is forgotten kComeAgain later.
  static constexpr std::chrono::seconds kLimit{20};
  // A refused reservation comes again after 0.4 s at most, or a second where another rank has no
  // room; then its step's turn must come (guessed).
  static constexpr std::chrono::seconds kComeAgain{2};

  // All must outlive it. num_kv_heads: the model's.
  Promotions(StoreBook& book, TierMover& mover, ReadChoice& choice, int num_kv_heads)
      : book_(book), mover_(mover), choice_(choice), num_kv_heads_(num_kv_heads) {}

  // Whether some of this prefix is on its way to any head.
  bool is_under_way(std::span<const PrefixKey> keys, TimePoint now) const;
  // Starts what is not under way yet for these heads. True: come again. False: nothing is to be
  // waited for, and nothing is held for these heads any more; reserve before another call.
  bool is_coming(int first_head, int num_heads, std::span<const PrefixKey> keys, TimePoint now);

  // What would be read of the prefix for these heads, and what it saves.
  ReadChoice::Tokens tokens_to_read(int first_head, int num_heads, std::span<const PrefixKey> keys,
                                    TimePoint now) const;
  // A slab's promotion has ended, well or not.
  void on_ended(const SlabName& name, TimePoint now);
  // Lets go of what nobody has come for.
  void forget_late(TimePoint now);
  std::optional<TimePoint> deadline() const;  // of the next to be forgotten

  std::size_t num_prefixes() const { return prefixes_.size(); }

 private:
  struct Prefix {
    std::set<int> heads;  // begun, and not reserved yet
    std::set<SlabName> awaited;
    std::map<SlabName, SlabIndex> held;
    bool is_read = true;  // else it is computed anew
    TimePoint limit;
    TimePoint wanted_until;
  };

  void begin(Prefix& prefix, int head, int num_heads, std::span<const PrefixKey> keys,
             TimePoint now);
  bool hold(Prefix& prefix, const SlabName& name);
  bool is_reading() const;
  void let_go(Prefix& prefix, int first_head, int num_heads);
  static bool is_awaited(const Prefix& prefix, TimePoint now);
  static void want(Prefix& prefix, TimePoint now);
  static TimePoint end_of(const Prefix& prefix);

  StoreBook& book_;
  TierMover& mover_;
  ReadChoice& choice_;
  const int num_kv_heads_;
  TimePoint read_at_{};                   // the last slab; before, when reading began
  std::map<PrefixKey, Prefix> prefixes_;  // by the last key, which stands for all before it
};

}  // namespace foretoken::kvstore
