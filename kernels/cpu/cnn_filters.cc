// What the CNN's kernels need of the weights: transformed filters, and where relus cannot act.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels/cpu/cnn.h"

namespace foretoken::kernels {
namespace {

// G of F(4, 3), points 0, 1, -1, 2, -2, infinity.
constexpr double kFilterTransform[CnnFilters::kPoints][3] = {
    {1.0 / 4, 0, 0},
    {-1.0 / 6, -1.0 / 6, -1.0 / 6},
    {-1.0 / 6, 1.0 / 6, -1.0 / 6},
    {1.0 / 24, 1.0 / 12, 1.0 / 6},
    {1.0 / 24, -1.0 / 12, 1.0 / 6},
    {0, 0, 1},
};

// The weights as doubles, by index.
class Taps {
 public:
  explicit Taps(const PredictorWeights& weights) : w_(weights) {}
  double conv1(int i, int y, int x) const { return w_.conv1_weight[at(i * 9 + y * 3 + x)]; }
  double bias1(int i) const { return w_.conv1_bias[at(i)]; }
  double conv2(int o, int i, int y, int x) const {
    return w_.conv2_weight[at(((o * kChannels1 + i) * 3 + y) * 3 + x)];
  }
  double bias2(int o) const { return w_.conv2_bias[at(o)]; }
  double conv3(int o) const { return w_.conv3_weight[at(o)]; }

 private:
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }
  const PredictorWeights& w_;
};

// An affine map of a tile's history, and of the hidden channels that are kept.
struct Stencil {
  std::array<double, kTileRows * 5> history{};
  std::array<std::array<std::array<double, 3>, CnnFolded::kHiddenRows>, kChannels1> hidden{};
  double at_zero = 0;
};

using Channels = std::vector<int>;
bool contains(const Channels& channels, int channel) {
  return std::find(channels.begin(), channels.end(), channel) != channels.end();
}

// conv2's channel o before its relu, of one row of outputs. Channels of conv1 that are `kept` stay
// as they are; of the others the relu counts as passing, where it passes at zero history, or as
// zero.
Stencil conv2_channel(const Taps& w, int o, const CnnSide& side, const CnnSide::Row& row,
                      const Channels& kept) {
  Stencil out;
  out.at_zero = w.bias2(o);
  for (int k = 0; k < kChannels1 * 9; ++k) {
    const int i = k / 9;
    const int y2 = k / 3 % 3;
    const int x2 = k % 3;
    const int hidden = row.hidden[y2];
    if (hidden == CnnSide::kOutside) continue;
    const double weight = w.conv2(o, i, y2, x2);
    if (contains(kept, i)) {
      out.hidden[static_cast<std::size_t>(i)][static_cast<std::size_t>(hidden)]
                [static_cast<std::size_t>(x2)] += weight;
      continue;
    }
    if (w.bias1(i) <= 0) continue;
    out.at_zero += weight * w.bias1(i);
    const CnnSide::Hidden& from = side.hidden[hidden];
    const int rows[3] = {from.above, from.middle, from.below};
    for (int y1 = 0; y1 < 3; ++y1) {
      if (rows[y1] == CnnSide::kOutside) continue;
      for (int x1 = 0; x1 < 3; ++x1) {
        out.history[static_cast<std::size_t>(rows[y1] * 5 + x2 + x1)] +=
            weight * w.conv1(i, y1, x1);
      }
    }
  }
  return out;
}

// Sums of the positive and of the negative terms, both without sign.
struct Reach {
  double up = 0;
  double down = 0;
  void add(double term) { (term > 0 ? up : down) += std::abs(term); }
};

// Which relus can act while all history values lie in [0, a].
class SignAnalysis {
 public:
  explicit SignAnalysis(const Taps& w) {
    for (int i = 0; i < kChannels1; ++i) {
      Reach reach;
      for (int k = 0; k < 9; ++k) reach.add(w.conv1(i, k / 3, k % 3));
      channels1_.push_back({w.bias1(i), reach});
    }
    for (int o = 0; o < kChannels2; ++o) {
      for (const CnnSide* side : {&kBottomSide, &kTopSide}) {
        for (const CnnSide::Row& row : side->rows) add_channel2(w, o, *side, row);
      }
    }
  }

  // Channels of conv1 whose relu may leave the state that it has at zero history. Rows at the
  // window's edge have fewer taps, so they reach less far.
  Channels acting1(double a) const {
    Channels out;
    for (int i = 0; i < kChannels1; ++i) {
      if (deviation(i, a) > 0) out.push_back(i);
    }
    return out;
  }

  // The same of conv2, in one row of outputs.
  Channels acting2(const CnnSide::Row* row, double a) const {
    std::array<double, kChannels1> deviations{};
    for (int i = 0; i < kChannels1; ++i) deviations[static_cast<std::size_t>(i)] = deviation(i, a);
    Channels out;
    for (const Channel2& c : channels2_) {
      if (c.row != row) continue;
      double up = c.at_zero + a * c.history.up;
      double down = c.at_zero - a * c.history.down;
      for (std::size_t i = 0; i < kChannels1; ++i) {
        up += deviations[i] * c.hidden[i].up;
        down -= deviations[i] * c.hidden[i].down;
      }
      if (c.at_zero > 0 ? down < 0 : up > 0) out.push_back(c.channel);
    }
    return out;
  }

  // The greatest a at which at most `few` relus can act, in conv1 and in each row of conv2.
  double limit(std::size_t few) const {
    double low = 0;
    double high = 2;  // more than any probability
    for (int i = 0; i < 60; ++i) {
      const double middle = (low + high) / 2;
      (holds(few, middle) ? low : high) = middle;
    }
    return low;
  }

 private:
  struct Channel1 {
    double bias;
    Reach reach;
  };
  struct Channel2 {
    const CnnSide::Row* row;
    int channel;
    double at_zero;
    Reach history;
    std::array<Reach, kChannels1> hidden;
  };

  bool holds(std::size_t few, double a) const {
    if (acting1(a).size() > few) return false;
    for (const CnnSide* side : {&kBottomSide, &kTopSide}) {
      for (const CnnSide::Row& row : side->rows) {
        if (acting2(&row, a).size() > few) return false;
      }
    }
    return true;
  }

  // Greatest difference between a hidden value and its affine (or zero) stand-in; never negative.
  double deviation(int i, double a) const {
    const Channel1& c = channels1_[static_cast<std::size_t>(i)];
    const double against = c.bias > 0 ? c.reach.down : c.reach.up;
    return std::max(0.0, a * against - std::abs(c.bias));
  }

  void add_channel2(const Taps& w, int o, const CnnSide& side, const CnnSide::Row& row) {
    const Stencil stencil = conv2_channel(w, o, side, row, {});
    Channel2 c{&row, o, stencil.at_zero, {}, {}};
    for (const double tap : stencil.history) c.history.add(tap);
    for (int i = 0; i < kChannels1; ++i) {
      for (int k = 0; k < 9; ++k) {
        if (row.hidden[k / 3] == CnnSide::kOutside) continue;
        c.hidden[static_cast<std::size_t>(i)].add(w.conv2(o, i, k / 3, k % 3));
      }
    }
    channels2_.push_back(c);
  }

  std::vector<Channel1> channels1_;
  std::vector<Channel2> channels2_;
};

// Folds conv2 and conv3 of one side around the relus that can act at history values up to a limit.
class Folding {
 public:
  Folding(const Taps& w, const SignAnalysis& signs, const CnnSide& side, double limit)
      : w_(w), side_(side), kept1_(signs.acting1(limit)) {
    for (std::size_t r = 0; r < 3; ++r) kept2_[r] = signs.acting2(&side.rows[r], limit);
    constexpr double kMargin = 0.999;  // of rounding
    out_.limit = static_cast<float>(kMargin * limit);
  }

  CnnFolded fold() {
    out_.num_hidden = static_cast<int>(kept1_.size());
    for (std::size_t i = 0; i < kept1_.size(); ++i) {
      for (int k = 0; k < 9; ++k) {
        out_.conv1[i][k] = static_cast<float>(w_.conv1(kept1_[i], k / 3, k % 3));
      }
      out_.bias1[i] = static_cast<float>(w_.bias1(kept1_[i]));
    }
    Stencil interior;
    Stencil boundary;
    add_rest(0, &interior);
    add_rest(1, &boundary);
    add_rest(2, &boundary);
    add(interior, 1.0, false, true);
    add(boundary, 1.0, false, false);
    for (std::size_t r = 0; r < 3; ++r) {
      for (const int o : kept2_[r]) {
        add(conv2_channel(w_, o, side_, side_.rows[r], kept1_), w_.conv3(o), true, r == 0);
      }
    }
    return out_;
  }

 private:
  // Adds the channels of a row whose relu passes throughout.
  void add_rest(std::size_t r, Stencil* sum) const {
    const CnnSide::Row& row = side_.rows[r];
    for (int o = 0; o < kChannels2; ++o) {
      if (contains(kept2_[r], o)) continue;
      if (conv2_channel(w_, o, side_, row, {}).at_zero <= 0) continue;
      add_scaled(conv2_channel(w_, o, side_, row, kept1_), w_.conv3(o), sum);
    }
  }

  static void add_scaled(const Stencil& from, double weight, Stencil* to) {
    to->at_zero += weight * from.at_zero;
    for (std::size_t k = 0; k < from.history.size(); ++k) {
      to->history[k] += weight * from.history[k];
    }
    for (std::size_t i = 0; i < from.hidden.size(); ++i) {
      for (std::size_t r = 0; r < CnnFolded::kHiddenRows; ++r) {
        for (std::size_t x = 0; x < 3; ++x) to->hidden[i][r][x] += weight * from.hidden[i][r][x];
      }
    }
  }

  void add(const Stencil& stencil, double weight, bool relu, bool interior) {
    CnnFolded::Output& output = out_.outputs[out_.num_outputs++];
    for (std::size_t k = 0; k < stencil.history.size(); ++k) {
      output.history[k] = static_cast<float>(stencil.history[k]);
    }
    for (std::size_t i = 0; i < kept1_.size(); ++i) {
      for (std::size_t r = 0; r < CnnFolded::kHiddenRows; ++r) {
        for (std::size_t x = 0; x < 3; ++x) {
          output.hidden[i][r][x] =
              static_cast<float>(stencil.hidden[static_cast<std::size_t>(kept1_[i])][r][x]);
        }
      }
    }
    output.at_zero = static_cast<float>(stencil.at_zero);
    output.weight = static_cast<float>(weight);
    output.relu = relu;
    output.interior = interior;
  }

  const Taps& w_;
  const CnnSide& side_;
  Channels kept1_;
  std::array<Channels, 3> kept2_;  // by row of outputs
  CnnFolded out_{};
};

CnnFilters::Folded fold(const Taps& w, const SignAnalysis& signs, const CnnSide& side) {
  return {Folding(w, signs, side, signs.limit(0)).fold(),
          Folding(w, signs, side, signs.limit(CnnFolded::kFew)).fold()};
}

}  // namespace

CnnFilters::CnnFilters(const PredictorWeights& weights) : bias3(weights.conv3_bias) {
  const Taps w(weights);
  for (int i = 0; i < kChannels1; ++i) {
    for (int k = 0; k < 9; ++k) conv1[i][k] = static_cast<float>(w.conv1(i, k / 3, k % 3));
    bias1[i] = static_cast<float>(w.bias1(i));
  }
  const auto transformed = [&](int o, int i, int y, int point) {
    double sum = 0;
    for (int x = 0; x < 3; ++x) sum += kFilterTransform[point][x] * w.conv2(o, i, y, x);
    return static_cast<float>(sum);
  };
  for (int o = 0; o < kChannels2; ++o) {
    bias2[o] = static_cast<float>(w.bias2(o));
    conv3[o] = static_cast<float>(w.conv3(o));
    for (int point = 0; point < kPoints; ++point) {
      for (int i = 0; i < kChannels1; ++i) {
        above[o / kBlock][point][i][o % kBlock] = transformed(o, i, 0, point);
        below[o / kBlock][point][i][0][o % kBlock] = transformed(o, i, 1, point);
        below[o / kBlock][point][i][1][o % kBlock] = transformed(o, i, 2, point);
      }
    }
  }
  const SignAnalysis signs(w);
  bottom = fold(w, signs, kBottomSide);
  top = fold(w, signs, kTopSide);
}

}  // namespace foretoken::kernels
