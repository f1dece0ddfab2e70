#include "kernels/cuda/cnn_tables.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstddef>
#include <span>
#include <string>

#include "common/result.h"
#include "kernels/cpu/cnn.h"

namespace foretoken::kernels::cuda {
namespace {

constexpr double kOne = 1 << kFixedPointBits;

std::uint32_t pack(double low, double high) {
  const auto bits = [](double x) {
    return std::uint32_t{__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
  };
  return bits(low) | bits(high) << 16;
}
double rounded(double x) { return __half2float(__float2half_rn(static_cast<float>(x))); }

std::uint32_t pack_bf16(double low, double high) {
  const auto bits = [](double x) {
    return std::uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))};
  };
  return bits(low) | bits(high) << 16;
}
// What rounding to bf16 leaves of x.
double rest_of(double x) {
  return x - __bfloat162float(__float2bfloat16_rn(static_cast<float>(x)));
}

// The tensor cores' fp16 operands and the fixed-point sums hold trained weights (at most about 2)
// with room to spare, and not any number.
[[noreturn]] void refuse(const std::string& what, double value, double most) {
  throw Exception(ErrorCode::kModelFile, "predictor weights: " + what + std::to_string(value) +
                                             " is out of the CUDA predictor's range of -" +
                                             std::to_string(most) + " .. " + std::to_string(most) +
                                             "; train them anew, or use --device cpu");
}
void check_range(const PredictorWeights& weights) {
  constexpr float kLargest = 64;
  const auto check = [](std::span<const float> values) {
    for (const float value : values) {
      if (!(std::abs(value) <= kLargest)) refuse("", value, kLargest);
    }
  };
  check(weights.conv1_weight);
  check(weights.conv1_bias);
  check(weights.conv2_weight);
  check(weights.conv2_bias);
  check(weights.conv3_weight);
  check({&weights.conv3_bias, 1});
}
// What is added to each output for the biases that products leave out.
void check_at_zero(double s) {
  constexpr double kMost = kMostAtZero / kOne;
  if (std::abs(s) > kMost) refuse("the biases' share of an output, ", s, kMost);
}

// What builds the tables, lane by lane.
class Maker {
 public:
  explicit Maker(const PredictorWeights& weights) : w_(weights), filters_(weights) {
    for (int row = 0; row < kNumOutputRows; ++row) {
      for (int o = 0; o < kChannels2; ++o) bias2_[row][o] = bias2(static_cast<OutputRow>(row), o);
    }
  }

  CnnTables make() {
    for (int lane = 0; lane < kLanes; ++lane) {
      make_conv2(lane);
      make_conv1(lane);
      make_biases(lane);
      for (int side = 0; side < kNumSides; ++side) make_cold(side, lane);
    }
    for (int row = 0; row < kNumOutputRows; ++row) {
      double sum = 0;
      for (int o = 0; o < kChannels2; ++o) sum += conv3(o) * bias2_[row][o];
      check_at_zero(sum);
      out_.at_zero[row] = static_cast<std::int32_t>(std::lrint(sum * kOne));
    }
    for (int side = 0; side < kNumSides; ++side) {
      for (int i = 0; i < 2; ++i) {
        out_.cold_at_zero[side][i] = static_cast<float>(cold_output(side, i).at_zero * kOne);
      }
    }
    if (cold_is_bounded()) {
      out_.cold_limit[kScaledHalf] = half_limit();
      out_.cold_limit[kPlainBf16] =
          __bfloat16_as_ushort(__float2bfloat16_rd(filters_.bottom.cold.limit));
    }
    return out_;
  }

 private:
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }
  double conv1(int i, int y, int x) const { return w_.conv1_weight[at(i * 9 + y * 3 + x)]; }
  double bias1(int i) const { return w_.conv1_bias[at(i)]; }
  double conv2(int o, int i, int tap) const {
    return w_.conv2_weight[at((o * kChannels1 + i) * 9 + tap)];
  }
  double conv3(int o) const { return w_.conv3_weight[at(o)]; }

  // B: conv2's bias and its product with b1. Where b1 <= 0 the channel is off at zero history: h'
  // is -b1 then, as fp16 rounds it, and its product must cancel exactly.
  double bias2(OutputRow row, int o) const {
    double sum = w_.conv2_bias[at(o)];
    for (int tap = 0; tap < 9; ++tap) {
      const bool outside = (row == kFirstRow && tap / 3 == 0) || (row == kLastRow && tap / 3 == 2);
      for (int i = 0; i < kChannels1 && !outside; ++i) {
        const double b = bias1(i);
        sum += b > 0 ? conv2(o, i, tap) * b
                     : rounded(conv2(o, i, tap)) * rounded(b * kValueScale) / kValueScale;
      }
    }
    return sum;
  }

  void make_conv2(int lane) {
    for (int tap = 0; tap < 9; ++tap) {
      for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 4; ++k) {
          const int o = half * 16 + lane / 4 + k % 2 * 8;
          const int i = lane % 4 * 2 + k / 2 * 8;
          out_.conv2[tap][half][lane][k] = pack(conv2(o, i, tap), conv2(o, i + 1, tap));
        }
      }
    }
  }

  // Operand B's rows 2 q, 2 q + 1: history row q, columns 0, 1 of four; rows 2 q + 8, 2 q + 9: its
  // columns 2, 3. The result stands at the first or the second of them, with taps to its right.
  void make_conv1(int lane) {
    const int q = lane % 4;
    for (int taps = 0; taps < kNumTapRows; ++taps) {
      const int y = q - (taps == kLowerTaps ? 1 : 0);
      const bool used = y >= 0 && y < 3 && !(taps == kCutTaps && y == 0);
      for (int k = 0; k < 8; ++k) {
        const int column = k / 4;
        const int half = k / 2 % 2;
        const int reg = k % 2;
        double tap[2] = {0, 0};
        for (int e = 0; e < 2; ++e) {
          const int x = reg * 2 + e - column;
          if (used && x >= 0 && x < 3) tap[e] = conv1(half * 8 + lane / 4, y, x);
        }
        out_.conv1[taps][column][half][lane][reg] = pack(tap[0], tap[1]);
      }
    }
  }

  void make_biases(int lane) {
    for (int half = 0; half < 2; ++half) {
      const int i = half * 8 + lane % 4 * 2;
      out_.minus_bias1[half][lane] = pack(-bias1(i) * kValueScale, -bias1(i + 1) * kValueScale);
    }
    for (int k = 0; k < 4; ++k) {
      const int o = k * 8 + lane / 4;
      for (int row = 0; row < kNumOutputRows; ++row) {
        out_.minus_bias2[row][k][lane] = static_cast<float>(-bias2_[row][o] * kValueScale);
      }
      out_.conv3[k][lane] = static_cast<float>(conv3(o) / kValueScale * kOne);
    }
  }

  const CnnFolded::Output& cold_output(int side, int i) const {
    return i == 0 ? filters_.bottom.cold.outputs[0]  // a row is inner as it enters and leaves
                  : (side == kBottom ? filters_.bottom : filters_.top).cold.outputs[1];
  }

  bool cold_is_bounded() const {
    for (int side = 0; side < kNumSides; ++side) {
      for (int i = 0; i < 2; ++i) {
        const CnnFolded::Output& output = cold_output(side, i);
        double most = std::abs(output.at_zero);
        for (const float tap : output.history) most += std::abs(tap) * filters_.bottom.cold.limit;
        if (most * kOne > (i == 0 ? kMostInterior : kMostEdge)) return false;
      }
    }
    return true;
  }

  // Operand B's rows 2 q, 2 q + 1: columns of history row 2 i of product i; 8 later: of row 2 i
  // + 1.
  void make_cold(int side, int lane) {
    const CnnFolded::Output& output = cold_output(side, lane / 16);
    for (int k = 0; k < 6; ++k) {
      double tap[2] = {0, 0};
      for (int e = 0; e < 2; ++e) {
        const int x = lane % 4 * 2 + e - lane / 4 % 4;
        if (k < kTileRows && x >= 0 && x < 5) {
          tap[e] = output.history[k * 5 + x] * kOne;
        }
        fits_ &= std::abs(tap[e]) / kValueScale < 65504;
      }
      out_.cold[kScaledHalf][side][k / 2][lane][k % 2] =
          pack(tap[0] / kValueScale, tap[1] / kValueScale);
      out_.cold[kPlainBf16][side][k / 2][lane][k % 2] = pack_bf16(tap[0], tap[1]);
      out_.cold[kPlainBf16][side][k / 2][lane][2 + k % 2] =
          pack_bf16(rest_of(tap[0]), rest_of(tap[1]));
    }
  }

  // Rounded down; none is cold where a stencil would leave fp16's range.
  std::uint16_t half_limit() const {
    if (!fits_) return 0;
    return __half_as_ushort(__float2half_rd(filters_.bottom.cold.limit * kValueScale));
  }

  const PredictorWeights& w_;
  CnnFilters filters_;
  double bias2_[kNumOutputRows][kChannels2] = {};
  bool fits_ = true;
  CnnTables out_{};
};

}  // namespace

CnnTables make_cnn_tables(const PredictorWeights& weights) {
  check_range(weights);
  return Maker(weights).make();
}

}  // namespace foretoken::kernels::cuda
