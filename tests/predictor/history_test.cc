// Device::history_append on the CPU: what a decode step and a prefill leave in the rings.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "kernels/cpu/history_rows.h"
#include "kernels/device.h"

namespace foretoken::kernels {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kColumns = 16;

// One sequence of 2 layers, 2 KV heads and 4 query heads.
class HistoryAppend : public testing::Test {
 protected:
  void use(HistoryType type, int maps_per_kv_head) {
    const int maps = kKvHeads * maps_per_kv_head;
    rows_.assign(static_cast<std::size_t>(kLayers * maps * kRingRows * kColumns) * bytes_of(type),
                 std::byte{0xAB});  // what a recycled allocation may hold
    state_.rows = rows_.data();
    state_.num_rows = num_rows_.data();
    state_.num_columns = num_columns_.data();
    state_.num_layers = kLayers;
    state_.num_kv_heads = kKvHeads;
    state_.maps_per_kv_head = maps_per_kv_head;
    state_.max_columns = kColumns;
    state_.pitch = kColumns;
    state_.type = static_cast<std::int32_t>(type);
  }

  // block_max [kHeads, rows, pitch], lse [kHeads, rows].
  void append(const std::vector<float>& block_max, const std::vector<float>& lse, int columns,
              int rows = 1, bool hold = false) {
    HistoryAppendArgs args{};
    args.block_max = block_max.data();
    args.lse = lse.data();
    args.rows = rows;
    args.pitch = static_cast<int>(block_max.size()) / (kHeads * rows);
    args.hold = hold;
    append(args, columns);
  }
  void append(HistoryAppendArgs args, std::int32_t columns) {
    args.states = &state_;
    args.num_sequences = 1;
    args.layer = kLayer;
    args.num_heads = kHeads;
    args.num_columns = &columns;
    device_->history_append(args, *stream_);
    stream_->synchronize();
  }

  std::vector<float> row(int map, std::int64_t r) const {
    std::vector<float> out(kColumns);
    decode_history(static_cast<HistoryType>(state_.type), history_row(state_, kLayer, map, r), 0,
                   kColumns, out.data());
    return out;
  }

  static constexpr int kLayers = 2;
  static constexpr int kLayer = 1;
  static constexpr int kKvHeads = 2;
  static constexpr int kHeads = 4;
  std::unique_ptr<Device> device_ = make_cpu_device({2, 0});
  std::unique_ptr<Stream> stream_ = device_->make_stream(StreamKind::kCompute);
  std::vector<std::byte> rows_;
  std::array<std::int64_t, kLayers> num_rows_{};
  std::array<std::int32_t, kLayers> num_columns_{};
  HistoryState state_{};
};

TEST_F(HistoryAppend, ARowIsTheMeanOfItsQueryHeadsProbabilities) {
  use(HistoryType::kFp32, 1);
  // Heads 0, 1 belong to KV head 0; heads 2, 3 to KV head 1. Two columns each.
  append({0.0F, -1.0F, 1.0F, 0.5F, 2.0F, 0.0F, 0.0F, 0.0F}, {1.0F, 2.0F, 3.0F, 4.0F}, 2);
  EXPECT_EQ(num_rows_[kLayer], 1);
  EXPECT_EQ(num_rows_[0], 0);
  EXPECT_EQ(num_columns_[kLayer], 2);
  EXPECT_NEAR(row(0, 0)[0], (std::exp(-1.0) + std::exp(-1.0)) / 2, 1e-7);
  EXPECT_NEAR(row(0, 0)[1], (std::exp(-2.0) + std::exp(-1.5)) / 2, 1e-7);
  EXPECT_NEAR(row(1, 0)[0], (std::exp(-1.0) + std::exp(-4.0)) / 2, 1e-7);
  EXPECT_EQ(row(0, 0)[2], 0.0F);  // beyond the row's columns
}

TEST_F(HistoryAppend, AMapAQueryHeadTakesItsOwnRow) {
  use(HistoryType::kFp32, 2);
  append({-1.0F, -2.0F, -3.0F, -4.0F}, {0, 0, 0, 0}, 1);
  for (int h = 0; h < kHeads; ++h) EXPECT_NEAR(row(h, 0)[0], std::exp(-1.0 - h), 1e-7) << h;
}

TEST_F(HistoryAppend, PrefillRowsAreCausalAndOldestFirst) {
  use(HistoryType::kFp32, 1);
  std::vector<float> block_max;
  for (int h = 0; h < kHeads; ++h) {
    for (const float value : {-1.0F, kNone, -2.0F, -3.0F}) block_max.push_back(value);
  }
  append(block_max, std::vector<float>(kHeads * 2, 0.0F), 2, /*rows=*/2);
  EXPECT_EQ(num_rows_[kLayer], 2);
  EXPECT_NEAR(row(0, 0)[0], std::exp(-1.0), 1e-7);
  EXPECT_EQ(row(0, 0)[1], 0.0F);  // behind the query
  EXPECT_NEAR(row(0, 1)[0], std::exp(-2.0), 1e-7);
  EXPECT_NEAR(row(0, 1)[1], std::exp(-3.0), 1e-7);
}

TEST_F(HistoryAppend, TheRingWrapsAndForgetsWhatLayThere) {
  use(HistoryType::kFp32, 1);
  for (int r = 0; r < kRingRows; ++r) {
    append(std::vector<float>(kHeads * 3, -1.0F), {0, 0, 0, 0}, 3);
  }
  append(std::vector<float>(kHeads * 2, -2.0F), {0, 0, 0, 0}, 2);
  EXPECT_NEAR(row(0, kRingRows)[1], std::exp(-2.0), 1e-7);
  EXPECT_EQ(row(0, kRingRows)[2], 0.0F);
  EXPECT_NEAR(row(0, 1)[2], std::exp(-1.0), 1e-7);
}

class HistoryAppendBySlot : public HistoryAppend {
 protected:
  static constexpr int kSlots = 3;

  // block_max: [kHeads, kSlots] of the layer. LSEs are 0.
  void append_by_slot(const std::vector<float>& block_max, int columns, bool hold) {
    std::vector<float> maxima(kLayer * block_max.size(), 1.0F);  // other layers'
    maxima.insert(maxima.end(), block_max.begin(), block_max.end());
    const std::vector<float> lse(kHeads, 0.0F);
    SequenceKv kv{};
    kv.slot_to_block = table_.data();
    kv.num_slots = kSlots;
    kv.shape.num_layers = kLayers;
    kv.shape.num_kv_heads = kKvHeads;
    kv.block_max = maxima.data();
    HistoryAppendArgs args{};
    args.lse = lse.data();
    args.rows = 1;
    args.sequences = &kv;
    args.hold = hold;
    append(args, columns);
  }
  // Other layers' slots point elsewhere; KV head 0 holds blocks 5, 0; KV head 1 holds 1, 2, 3.
  std::vector<std::int32_t> table_ = {9, 9, 9, 9, 9, 9, 5, kAbsent, 0, 1, 2, 3};
};

TEST_F(HistoryAppendBySlot, FindsColumnsThroughTheSlotTable) {
  use(HistoryType::kFp32, 1);
  std::vector<float> block_max;
  for (int h = 0; h < kHeads; ++h) {
    for (const float value : {-1.0F, h < 2 ? kNone : -2.0F, -3.0F}) block_max.push_back(value);
  }
  append_by_slot(block_max, 6, false);
  const auto head0 = row(0, 0);
  EXPECT_NEAR(head0[5], std::exp(-1.0), 1e-7);
  EXPECT_NEAR(head0[0], std::exp(-3.0), 1e-7);
  for (const std::size_t c : {1, 2, 3, 4, 6}) EXPECT_EQ(head0[c], 0.0F) << c;
  const auto head1 = row(1, 0);
  EXPECT_NEAR(head1[1], std::exp(-1.0), 1e-7);
  EXPECT_NEAR(head1[2], std::exp(-2.0), 1e-7);
  EXPECT_NEAR(head1[3], std::exp(-3.0), 1e-7);
}

TEST_F(HistoryAppendBySlot, HoldKeepsTheLastValueOfABlockThatWasNotAttended) {
  for (const bool hold : {false, true}) {
    num_rows_ = {};
    use(HistoryType::kBf16, 1);
    append(std::vector<float>(kHeads * 6, -1.0F), {0, 0, 0, 0}, 6, 1, hold);
    append_by_slot(std::vector<float>(kHeads * kSlots, -2.0F), 7, hold);
    const auto head0 = row(0, 1);
    EXPECT_NEAR(head0[5], std::exp(-2.0), 1e-3);
    EXPECT_EQ(head0[4], hold ? row(0, 0)[4] : 0.0F);
    EXPECT_EQ(head0[6], 0.0F) << "a new column has no last value";
  }
}

TEST(HistoryTypes, RoundToNearest) {
  // bf16: 8 significant bits. e5m3: 4, down to 2^-29 in steps of 2^-29 below 2^-26.
  const std::vector<float> values = {0.0F,     1.0F,    0.5F,      0.3F,  1e-3F,
                                     6.19e-4F, 3.7e-9F, 1.862e-9F, 1e-12F};
  for (const HistoryType type : {HistoryType::kFp32, HistoryType::kBf16, HistoryType::kE5m3}) {
    std::vector<std::byte> row(values.size() * bytes_of(type));
    std::vector<float> back(values.size());
    const int count = static_cast<int>(values.size());
    encode_history(type, values.data(), count, row.data());
    decode_history(type, row.data(), 0, count, back.data());
    const float relative = type == HistoryType::kFp32   ? 0.0F
                           : type == HistoryType::kBf16 ? 1.0F / 256
                                                        : 1.0F / 16;
    const float absolute = type == HistoryType::kE5m3 ? 0x1p-30F : 0.0F;
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_NEAR(back[i], values[i], std::max(relative * values[i], absolute)) << values[i];
    }
  }
}

TEST(HistoryTypes, EveryE5m3CodeSurvivesARoundTrip) {
  for (int code = 0; code < 0xF8; ++code) {
    const auto byte = static_cast<std::byte>(code);
    float value = 0;
    decode_history(HistoryType::kE5m3, &byte, 0, 1, &value);
    std::byte again{};
    encode_history(HistoryType::kE5m3, &value, 1, &again);
    EXPECT_EQ(again, byte) << value;
  }
}

TEST(HistoryTypes, ValuesThatAreNoneStayVisible) {
  for (const HistoryType type : {HistoryType::kFp32, HistoryType::kBf16, HistoryType::kE5m3}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30F}) {
      std::array<std::byte, 4> row{};
      float back = 0;
      encode_history(type, &bad, 1, row.data());
      decode_history(type, row.data(), 0, 1, &back);
      EXPECT_FALSE(back <= 2.0F) << bad;
    }
  }
}

}  // namespace
}  // namespace foretoken::kernels
