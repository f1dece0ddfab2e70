// What the CNN's kernels need of the weights: transformed filters, and the affine regime.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

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

double tap1(const PredictorWeights& w, int i, int y, int x) {
  return static_cast<double>(w.conv1_weight[static_cast<std::size_t>(i * 9 + y * 3 + x)]);
}
double tap2(const PredictorWeights& w, int o, int i, int y, int x) {
  return static_cast<double>(
      w.conv2_weight[static_cast<std::size_t>(((o * kChannels1 + i) * 3 + y) * 3 + x)]);
}

// 5 x 5 taps of history around an output, and the output's value at zero history.
struct Affine {
  std::array<double, 25> taps{};
  double at_zero = 0;
};

// A term that could change the sign of `at_zero` by values in [0, limit]: the least such limit.
double sign_limit(double at_zero, double positive, double negative) {
  const double against = at_zero > 0 ? negative : positive;
  if (against == 0) return std::numeric_limits<double>::infinity();
  return std::abs(at_zero) / against;
}

// Which taps see the window: an output row at its edge has fewer.
struct Taps {
  int first_row2 = 0;  // conv2's tap rows [first_row2, last_row2]
  int last_row2 = 2;
  int cut_row2 = -1;  // at this tap row of conv2, conv1 lacks its tap row cut_row1
  int cut_row1 = -1;
};

// Derives the map of an output row, and lowers tau to where it stops to be affine.
class AffineRegime {
 public:
  explicit AffineRegime(const PredictorWeights& weights) : w_(weights) {
    for (int i = 0; i < kChannels1; ++i) {
      double positive = 0;
      double negative = 0;
      for (int k = 0; k < 9; ++k) add_signed(tap1(w_, i, k / 3, k % 3), &positive, &negative);
      tau_ = std::min(tau_, sign_limit(bias1(i), positive, negative));
    }
  }

  Affine map(const Taps& taps) {
    Affine sum;
    for (int o = 0; o < kChannels2; ++o) {
      const Affine hidden = hidden_map(o, taps);
      double positive = 0;
      double negative = 0;
      for (const double tap : hidden.taps) add_signed(tap, &positive, &negative);
      tau_ = std::min(tau_, sign_limit(hidden.at_zero, positive, negative));
      if (hidden.at_zero <= 0) continue;  // relu is 0
      const auto weight = static_cast<double>(w_.conv3_weight[static_cast<std::size_t>(o)]);
      sum.at_zero += weight * hidden.at_zero;
      for (std::size_t k = 0; k < 25; ++k) sum.taps[k] += weight * hidden.taps[k];
    }
    return sum;
  }

  double tau() const { return tau_; }

 private:
  double bias1(int i) const {
    return static_cast<double>(w_.conv1_bias[static_cast<std::size_t>(i)]);
  }
  static void add_signed(double value, double* positive, double* negative) {
    (value > 0 ? *positive : *negative) += std::abs(value);
  }

  // conv2's channel o over the channels of conv1 that are positive at zero history.
  Affine hidden_map(int o, const Taps& taps) const {
    Affine out;
    out.at_zero = static_cast<double>(w_.conv2_bias[static_cast<std::size_t>(o)]);
    for (int y2 = taps.first_row2; y2 <= taps.last_row2; ++y2) {
      for (int x2 = 0; x2 < 3; ++x2) {
        for (int i = 0; i < kChannels1; ++i) {
          if (bias1(i) <= 0) continue;
          const double weight = tap2(w_, o, i, y2, x2);
          out.at_zero += weight * bias1(i);
          for (int k = 0; k < 9; ++k) {
            if (y2 == taps.cut_row2 && k / 3 == taps.cut_row1) continue;
            const int at = (y2 + k / 3) * 5 + x2 + k % 3;
            out.taps[static_cast<std::size_t>(at)] += weight * tap1(w_, i, k / 3, k % 3);
          }
        }
      }
    }
    return out;
  }

  const PredictorWeights& w_;
  double tau_ = std::numeric_limits<double>::infinity();
};

// The two rows at an edge of the window see the tile's rows at these offsets of their 5 rows.
CnnAffine join(const Affine& interior, const Affine& a, int offset_a, const Affine& b,
               int offset_b) {
  CnnAffine out{};
  out.interior_at_zero = static_cast<float>(interior.at_zero);
  out.boundary_at_zero = static_cast<float>(a.at_zero + b.at_zero);
  for (int r = 0; r < kTileRows; ++r) {
    for (int x = 0; x < 5; ++x) {
      const auto tap = [&](const Affine& map, int offset) {
        const int row = r + offset;
        return row < 0 || row >= 5 ? 0.0 : map.taps[static_cast<std::size_t>(row * 5 + x)];
      };
      out.interior[r * 5 + x] = static_cast<float>(tap(interior, 0));
      out.boundary[r * 5 + x] = static_cast<float>(tap(a, offset_a) + tap(b, offset_b));
    }
  }
  return out;
}

}  // namespace

CnnFilters::CnnFilters(const PredictorWeights& weights) : bias3(weights.conv3_bias) {
  for (int i = 0; i < kChannels1; ++i) {
    for (int k = 0; k < 9; ++k) {
      conv1[i][k] = weights.conv1_weight[static_cast<std::size_t>(i * 9 + k)];
    }
    bias1[i] = weights.conv1_bias[static_cast<std::size_t>(i)];
  }
  const auto transformed = [&](int o, int i, int y, int point) {
    double sum = 0;
    for (int x = 0; x < 3; ++x) sum += kFilterTransform[point][x] * tap2(weights, o, i, y, x);
    return static_cast<float>(sum);
  };
  for (int o = 0; o < kChannels2; ++o) {
    bias2[o] = weights.conv2_bias[static_cast<std::size_t>(o)];
    conv3[o] = weights.conv3_weight[static_cast<std::size_t>(o)];
    for (int point = 0; point < kPoints; ++point) {
      for (int i = 0; i < kChannels1; ++i) {
        above[o / kBlock][point][i][o % kBlock] = transformed(o, i, 0, point);
        below[o / kBlock][point][i][0][o % kBlock] = transformed(o, i, 1, point);
        below[o / kBlock][point][i][1][o % kBlock] = transformed(o, i, 2, point);
      }
    }
  }
  AffineRegime regime(weights);
  const Affine interior = regime.map({});
  const Affine row0 = regime.map({.first_row2 = 1, .cut_row2 = 1, .cut_row1 = 0});
  const Affine row1 = regime.map({.cut_row2 = 0, .cut_row1 = 0});
  const Affine row62 = regime.map({.cut_row2 = 2, .cut_row1 = 2});
  const Affine row63 = regime.map({.last_row2 = 1, .cut_row2 = 1, .cut_row1 = 2});
  // A bottom tile starts at row 59, where row 62's five rows start at 60; a top tile at row -1.
  bottom = join(interior, row62, -1, row63, -2);
  top = join(interior, row0, 1, row1, 0);
  constexpr double kMargin = 0.999;  // of float rounding
  tau = static_cast<float>(kMargin * regime.tau());
}

}  // namespace foretoken::kernels
