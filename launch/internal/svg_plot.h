// Plot: points of a few series over one pair of linear axes, as an SVG file. Pure functions.
// Example: tests/launch/svg_plot_test.cc
#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace foretoken::launch {

struct Plot {
  struct Series {
    std::string name;
    std::vector<std::pair<double, double>> points;  // in the order they are joined in
  };
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<Series> series;
};

// Places for labels from 0 to at least `largest`: 1, 2 or 5 times a power of ten apart, 4 to 11 of
// them. REQUIRES: largest >= 0 and finite.
std::vector<double> axis_ticks(double largest);

// The y axis and the x axis begin at 0. REQUIRES: values are finite and not negative.
std::string to_svg(const Plot& plot);

// Throws Exception(kIo).
void save_svg(const Plot& plot, const std::filesystem::path& path);

}  // namespace foretoken::launch
