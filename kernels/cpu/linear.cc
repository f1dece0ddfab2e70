// make_weight and linear of the CPU device: packs weights, and splits products among the pool.
#include <algorithm>
#include <span>
#include <vector>

#include "common/check.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/gemm.h"

namespace foretoken::kernels {
namespace {

using simd::kPanelColumns;

// Rows of a task: with 320 features (simd/gemm.cc) they stay in the second-level cache.
constexpr int kMaxTaskRows = 192;
// Tasks a thread, about, so that the last ones even out.
constexpr int kTasksPerThread = 8;

constexpr int kRowUnit = 12;  // whole tiles on AVX2 and on AVX-512

int divide_up(int a, int b) { return (a + b - 1) / b; }

// Part i of n takes [cut(total, i, n), cut(total, i + 1, n)).
int cut(int total, int i, int n) {
  return static_cast<int>(static_cast<std::int64_t>(total) * i / n);
}

class CpuWeight final : public Weight {
 public:
  CpuWeight(Device& device, DataType weight_type, int num_rows, int num_columns)
      : type(weight_type),
        num_panels(divide_up(num_rows, kPanelColumns)),
        packed(device,
               bytes_of(weight_type) * kPanelColumns * static_cast<std::size_t>(num_panels) *
                   static_cast<std::size_t>(num_columns),
               MemoryUse::kWeights) {
    rows = num_rows;
    columns = num_columns;
  }

  std::byte* panel(int i) const {
    const std::size_t bytes = packed.bytes() / static_cast<std::size_t>(num_panels);
    return packed.as<std::byte>() + static_cast<std::size_t>(i) * bytes;
  }

  DataType type;
  int num_panels;
  DeviceBuffer packed;  // see simd/gemm.h
};

// The rows of all parts, of one type: fp32 where the parts differ.
struct StackedRows {
  DataType type;
  std::vector<const std::byte*> rows;
  std::vector<std::vector<float>> widened;  // what of the rows was not fp32
};

StackedRows stack(std::span<const WeightPart> parts) {
  const bool same = std::ranges::all_of(
      parts, [&](const WeightPart& part) { return part.type == parts[0].type; });
  StackedRows stacked{same ? parts[0].type : DataType::kFp32, {}, {}};
  for (const WeightPart& part : parts) {
    FT_CHECK(part.columns == parts[0].columns, part.columns, parts[0].columns);
    for (int row = 0; row < part.rows; ++row) {
      const std::byte* data = part.data + static_cast<std::size_t>(row) * part.row_stride_bytes;
      if (part.type != stacked.type) {
        auto& wide = stacked.widened.emplace_back(static_cast<std::size_t>(part.columns));
        simd::to_float(data, part.type, part.columns, wide.data());
        data = std::as_bytes(std::span(wide)).data();
      }
      stacked.rows.push_back(data);
    }
  }
  return stacked;
}

}  // namespace

std::unique_ptr<Weight> CpuDevice::make_weight(std::span<const WeightPart> parts) {
  FT_CHECK(!parts.empty());
  const StackedRows stacked = stack(parts);
  const std::span rows(stacked.rows);
  auto weight = std::make_unique<CpuWeight>(*this, stacked.type, static_cast<int>(rows.size()),
                                            parts[0].columns);
  pool_.parallel_for(weight->num_panels, [&](int panel, int) {
    const auto first = static_cast<std::size_t>(panel) * kPanelColumns;
    const std::size_t count = std::min<std::size_t>(kPanelColumns, rows.size() - first);
    simd::pack_panel(rows.subspan(first, count), weight->type, weight->columns,
                     weight->panel(panel));
  });
  return weight;
}

// One product, in tasks of rows and panels.
void CpuDevice::multiply(const LinearArgs& args, const float* x, float* out) {
  const auto& weight = static_cast<const CpuWeight&>(*args.weight);
  const auto* residual = static_cast<const float*>(args.residual);
  const simd::MultiplyArgs multiply{
      x,         weight.packed.data(), weight.type, residual == nullptr ? args.bias : nullptr,
      args.rows, weight.columns,       weight.rows, out,
      residual};
  const int row_units = divide_up(args.rows, kRowUnit);
  const int row_tasks = divide_up(args.rows, kMaxTaskRows);
  const int panel_tasks =
      std::min(weight.num_panels, divide_up(kTasksPerThread * pool_.num_threads(), row_tasks));
  pool_.parallel_for(row_tasks * panel_tasks, [&](int task, int) {
    const int row_task = task / panel_tasks;
    const int panel_task = task % panel_tasks;
    const int row = cut(row_units, row_task, row_tasks) * kRowUnit;
    const int row_end = std::min(args.rows, cut(row_units, row_task + 1, row_tasks) * kRowUnit);
    const int panel = cut(weight.num_panels, panel_task, panel_tasks);
    const int panel_end = cut(weight.num_panels, panel_task + 1, panel_tasks);
    simd::multiply(multiply, {row, row_end - row, panel, panel_end - panel});
  });
  if (residual == nullptr || args.bias == nullptr) return;
  for (int row = 0; row < args.rows; ++row) {
    simd::add(args.bias, weight.rows, out + static_cast<std::ptrdiff_t>(row) * weight.rows);
  }
}

void CpuDevice::linear(const LinearArgs& args, Stream& stream) {
  FT_CHECK(args.residual == nullptr || args.swiglu.scratch == nullptr);
  if (args.rows == 0) return;
  const void* x = args.x;
  if (args.norm.weight != nullptr) {
    rms_norm({.x = x,
              .weight = args.norm.weight,
              .eps = args.norm.eps,
              .rows = args.rows,
              .columns = args.weight->columns,
              .out = args.norm.scratch},
             stream);
    x = args.norm.scratch;
  }
  void* product = args.swiglu.scratch != nullptr ? args.swiglu.scratch : args.out;
  enqueue(stream, [this, args, x, product] {
    multiply(args, static_cast<const float*>(x), static_cast<float*>(product));
  });
  if (product == args.out) return;
  swiglu({.gate_up = product, .rows = args.rows, .columns = args.weight->rows / 2, .out = args.out},
         stream);
}

}  // namespace foretoken::kernels
