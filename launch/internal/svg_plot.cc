#include "launch/internal/svg_plot.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>

#include "common/result.h"

namespace foretoken::launch {
namespace {

constexpr double kWidth = 640, kHeight = 400;  // of the axes' area
constexpr double kLeft = 80, kTop = 40, kRight = 380, kBottom = 60;
constexpr std::array kColors = {"#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b",
                                "#e377c2", "#7f7f7f", "#17becf", "#bcbd22", "#000000", "#006400"};

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') out += "&amp;";
    if (c == '<') out += "&lt;";
    if (c != '&' && c != '<') out += c;
  }
  return out;
}

std::string label(double x, double y, const char* anchor, const std::string& text) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>\n", x, y, anchor,
                     escaped(text));
}

std::string line(double x1, double y1, double x2, double y2, const char* color) {
  return fmt::format(
      "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\"/>\n", x1, y1, x2,
      y2, color);
}

// Where values lie in the picture.
struct Axes {
  explicit Axes(const Plot& plot) {
    double largest_x = 0, largest_y = 0;
    for (const auto& series : plot.series) {
      for (const auto& [x, y] : series.points) {
        largest_x = std::max(largest_x, x);
        largest_y = std::max(largest_y, y);
      }
    }
    x_ticks = axis_ticks(largest_x);
    y_ticks = axis_ticks(largest_y);
  }
  double x(double value) const { return kLeft + kWidth * value / x_ticks.back(); }
  double y(double value) const { return kTop + kHeight * (1 - value / y_ticks.back()); }

  std::vector<double> x_ticks, y_ticks;
};

std::string draw_axes(const Plot& plot, const Axes& axes) {
  std::string out;
  for (const double tick : axes.y_ticks) {
    out += line(kLeft, axes.y(tick), kLeft + kWidth, axes.y(tick), "#dddddd");
    out += label(kLeft - 8, axes.y(tick) + 4, "end", fmt::format("{:.6g}", tick));
  }
  for (const double tick : axes.x_ticks) {
    out += line(axes.x(tick), kTop + kHeight, axes.x(tick), kTop + kHeight + 5, "#000000");
    out += label(axes.x(tick), kTop + kHeight + 20, "middle", fmt::format("{:.6g}", tick));
  }
  out += line(kLeft, kTop, kLeft, kTop + kHeight, "#000000");
  out += line(kLeft, kTop + kHeight, kLeft + kWidth, kTop + kHeight, "#000000");
  out += label(kLeft + kWidth / 2, kTop + kHeight + 45, "middle", plot.x_label);
  out += label(kLeft, kTop - 8, "middle", plot.y_label);
  return out + label(kLeft + kWidth / 2, kTop - 20, "middle", plot.title);
}

std::string draw_series(const Plot::Series& series, std::size_t index, const Axes& axes) {
  const char* color = kColors[index % kColors.size()];
  std::string path;
  std::string dots;
  for (const auto& [x, y] : series.points) {
    path += fmt::format("{:.1f},{:.1f} ", axes.x(x), axes.y(y));
    dots += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"2.5\" fill=\"{}\"/>\n", axes.x(x),
                        axes.y(y), color);
  }
  const double at = kTop + 10 + 18 * static_cast<double>(index);
  return fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"{}\"/>\n", path, color) +
         dots + line(kLeft + kWidth + 10, at, kLeft + kWidth + 30, at, color) +
         label(kLeft + kWidth + 36, at + 4, "start", series.name);
}

}  // namespace

std::vector<double> axis_ticks(double largest) {
  if (largest <= 0) return {0, 1};
  const double power = std::pow(10, std::floor(std::log10(largest)));
  const double first = largest / power;  // 1 to 10
  const double step = power * (first <= 2 ? 0.2 : first <= 5 ? 0.5 : 1);
  std::vector<double> ticks;
  for (int i = 0; ticks.empty() || ticks.back() < largest * (1 - 1e-9); ++i) {
    ticks.push_back(i * step);
  }
  return ticks;
}

std::string to_svg(const Plot& plot) {
  const Axes axes(plot);
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} "
      "{1}\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
      kLeft + kWidth + kRight, kTop + kHeight + kBottom);
  out += draw_axes(plot, axes);
  for (std::size_t i = 0; i < plot.series.size(); ++i) {
    out += draw_series(plot.series[i], i, axes);
  }
  return out + "</svg>\n";
}

void save_svg(const Plot& plot, const std::filesystem::path& path) {
  std::ofstream file(path);
  file << to_svg(plot) << std::flush;
  if (!file) throw Exception(ErrorCode::kIo, "can't write the plot " + path.string());
}

}  // namespace foretoken::launch
