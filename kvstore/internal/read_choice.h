// ReadChoice: whether KV of a prefix that NVMe alone has is read from there, or sooner computed
// anew. It is read while that is expected to take no longer than computing, by what both have taken
// lately; and where one of the two is not known, so that it will be.
//
// A prefix of a sequence that the arena holds is promoted: it takes what the disk takes. Prefill of
// one that is larger reads its prefix beside its work: it takes the time that it waits. A disk that
// is slow is tried again, when computing in place of reading has taken kTrialShare times what the
// next read is expected to take.
//
// A decision on a prefix holds for kSame, so that all ranks of a group are told the same.
//
// Pure; times are the caller's. For the store's thread. Example: tests/kvstore/read_choice_test.cc
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <map>
#include <optional>
#include <utility>

#include "common/prefix_key.h"
#include "kvstore/internal/nvme_health.h"

namespace foretoken::kvstore {

// What a token takes, over the last kMemory of them.
class Pace {
 public:
  using Seconds = std::chrono::duration<double>;
  static constexpr double kMemory = 16'384;  // tokens (guessed: a few prompts)

  void add(double tokens, Seconds time);
  std::optional<Seconds> time_for(double tokens) const;  // nullopt: nothing is known
  void forget() { *this = Pace(); }

 private:
  double tokens_ = 0;  // those of longer ago count less
  Seconds time_{};
};

class ReadChoice {
 public:
  // The ranks of a group ask within one step, and again while their sequence waits for room.
  static constexpr std::chrono::seconds kSame{2};
  static constexpr double kTrialShare = 8;  // of a disk twice as slow, every 16th prefix is read

  enum class Mode { kAuto, kAlways };  // kAlways: whatever it takes
  enum class Way { kPromoted, kInPrefill };

  explicit ReadChoice(Mode mode) : mode_(mode) {}

  void on_computed(double tokens, Pace::Seconds time) { computing_.add(tokens, time); }
  void on_read(Way way, double tokens, Pace::Seconds time) { at(way).pace.add(tokens, time); }

  // What there is to read of a prefix, and what is to be computed without that: more, where the
  // arena has some of what comes behind it.
  struct Tokens {
    double read = 0;
    double compute = 0;
  };
  bool reads(const PrefixKey& prefix, Way way, const Tokens& tokens, TimePoint now);
  // It was decided that the prefix is computed anew, and the decision holds.
  bool is_passed_over(const PrefixKey& prefix, Way way, TimePoint now) const;

 private:
  struct Reading {
    Pace pace;
    Pace::Seconds computed{};  // in its place, since the last read
    bool pays = true;          // as last decided
  };
  struct Decision {
    bool reads = false;
    TimePoint until;
  };

  Reading& at(Way way) { return readings_[static_cast<std::size_t>(way)]; }
  bool decide(Way way, const Tokens& tokens);

  const Mode mode_;
  Pace computing_;
  std::array<Reading, 2> readings_;  // by Way
  std::map<std::pair<Way, PrefixKey>, Decision> decisions_;
};

}  // namespace foretoken::kvstore
