// The CNN as the paper's code has it, in double: the reference of every fast path.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/device.h"

namespace foretoken::predictor::reference {

// rows x columns, zeros around it.
struct Image {
  Image(int num_rows, int num_columns)
      : rows(num_rows),
        columns(num_columns),
        values(static_cast<std::size_t>(num_rows * num_columns)) {}
  double at(int r, int c) const {
    if (r < 0 || r >= rows || c < 0 || c >= columns) return 0.0;
    return values[static_cast<std::size_t>(r * columns + c)];
  }
  double& at(int r, int c) { return values[static_cast<std::size_t>(r * columns + c)]; }

  int rows;
  int columns;
  std::vector<double> values;
};

// relu(conv2d(3 x 3, pad 1)) of one output channel.
inline Image conv_relu(const std::vector<Image>& in, const float* weight, double bias) {
  Image out(in[0].rows, in[0].columns);
  for (int r = 0; r < out.rows; ++r) {
    for (int c = 0; c < out.columns; ++c) {
      double sum = bias;
      for (std::size_t i = 0; i < in.size(); ++i) {
        for (int y = 0; y < 3; ++y) {
          for (int x = 0; x < 3; ++x) {
            sum += static_cast<double>(weight[i * 9 + static_cast<std::size_t>(y * 3 + x)]) *
                   in[i].at(r + y - 1, c + x - 1);
          }
        }
      }
      out.at(r, c) = std::max(0.0, sum);
    }
  }
  return out;
}

// Scores of the columns of a window [64 rows, oldest first; candidate columns].
inline std::vector<double> scores(const kernels::PredictorWeights& w, const Image& window) {
  std::vector<Image> hidden1;
  for (std::size_t i = 0; i < w.conv1_bias.size(); ++i) {
    hidden1.push_back(
        conv_relu({window}, w.conv1_weight.data() + i * 9, static_cast<double>(w.conv1_bias[i])));
  }
  std::vector<double> out(static_cast<std::size_t>(window.columns),
                          static_cast<double>(w.conv3_bias));
  for (std::size_t o = 0; o < w.conv2_bias.size(); ++o) {
    const Image hidden2 = conv_relu(hidden1, w.conv2_weight.data() + o * hidden1.size() * 9,
                                    static_cast<double>(w.conv2_bias[o]));
    for (int c = 0; c < window.columns; ++c) {
      double mean = 0;
      for (int r = 0; r < window.rows; ++r) mean += hidden2.at(r, c) / window.rows;
      out[static_cast<std::size_t>(c)] += static_cast<double>(w.conv3_weight[o]) * mean;
    }
  }
  return out;
}

// The k best columns, sorted; ties go to the lower column.
template <typename Score>
std::vector<int> top(std::span<const Score> scores, int k) {
  std::vector<int> order(scores.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace foretoken::predictor::reference
