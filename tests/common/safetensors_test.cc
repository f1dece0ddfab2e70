#include "common/safetensors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "common/internal/safetensors_header.h"

namespace foretoken {
namespace {

namespace fs = std::filesystem;

std::string file_bytes(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t length = header.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
  bytes += header;
  for (std::size_t i = 0; i < data_bytes; ++i) bytes += static_cast<char>(i);
  return bytes;
}

void write(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

constexpr const char* kTwoTensors = R"({"__metadata__":{"format":"pt"},)"
                                    R"("b":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},)"
                                    R"("a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}  )";

class SafetensorsTest : public testing::Test {
 protected:
  SafetensorsTest() { fs::create_directories(folder_); }
  ~SafetensorsTest() override { fs::remove_all(folder_); }

  const fs::path folder_ =
      fs::path(testing::TempDir()) /
      (std::string("safetensors_") + testing::UnitTest::GetInstance()->current_test_info()->name());
};

TEST_F(SafetensorsTest, WhatIsWrittenIsRead) {
  const std::string data = "0123456789ab";
  const auto bytes = std::as_bytes(std::span(data));
  const std::vector<NamedTensor> tensors = {
      {"z", {TensorDtype::kF16, {2}, bytes.first(4)}},
      {"none", {TensorDtype::kBf16, {0, 3}, bytes.subspan(4, 0)}},
      {"a \"quoted\"", {TensorDtype::kF32, {2, 1}, bytes.subspan(4, 8)}}};
  const std::string header = safetensors_header(tensors);
  EXPECT_EQ(header.size() % 64, 0U);
  write(folder_ / "any name", header + data);
  const auto weights = ModelWeights::open_file(folder_ / "any name");
  ASSERT_TRUE(weights) << weights.error().message;
  EXPECT_EQ(weights->names().size(), tensors.size());
  for (const auto& [name, view] : tensors) {
    const auto read = weights->tensor(name, view.shape);
    ASSERT_TRUE(read) << read.error().message;
    EXPECT_EQ(read->dtype, view.dtype);
    EXPECT_TRUE(std::ranges::equal(read->bytes, view.bytes));
  }
}

TEST_F(SafetensorsTest, MapsTensors) {
  write(folder_ / "x.safetensors", file_bytes(kTwoTensors, 12));
  const auto file = SafetensorsFile::open(folder_ / "x.safetensors");
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(file->names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(file->metadata("format"), "pt");
  EXPECT_EQ(file->metadata("absent"), "");
  EXPECT_EQ(file->header(), kTwoTensors);

  const auto b = file->tensor("b");
  ASSERT_TRUE(b);
  EXPECT_EQ(b->dtype, TensorDtype::kF32);
  EXPECT_EQ(b->shape, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(b->num_elements(), 2);
  ASSERT_EQ(b->bytes.size(), 8u);
  EXPECT_EQ(b->bytes[0], std::byte{4});  // the file's data counts 0, 1, 2, ...
  EXPECT_FALSE(file->contains("c"));
  EXPECT_EQ(file->tensor("c").error().code, ErrorCode::kModelFile);
}

TEST_F(SafetensorsTest, RefusesEveryTruncation) {
  const std::string whole = file_bytes(kTwoTensors, 12);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write(folder_ / "x.safetensors", whole.substr(0, size));
    const auto file = SafetensorsFile::open(folder_ / "x.safetensors");
    ASSERT_FALSE(file) << "cut to " << size << " bytes";
    EXPECT_EQ(file.error().code, ErrorCode::kModelFile);
    EXPECT_NE(file.error().message.find("x.safetensors"), std::string::npos);
  }
}

struct BadHeader {
  const char* header;
  const char* complaint;  // a part of the message
};

TEST(SafetensorsHeader, RefusesWhatUpstreamRefuses) {
  // Each describes 8 bytes of data, wrongly.
  const BadHeader cases[] = {
      {R"([])", "JSON object"},
      {R"({"a":)", "offset"},
      {R"({"a":1})", "number"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}})", "twice"},
      {R"({"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}})", "unknown dtype"},
      {R"({"a":{"dtype":"F32","shape":[2]}})", "missing"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "negative"},
      {R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", "whole number"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":[1]}})", "unknown field"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}})", "data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "12 bytes"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})",
       "overflows"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]}})", "overflows"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "begins at data offset 4"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "8 bytes of data"},
      {R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", "truncated"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "the one before ends at 8"},
      {R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,8]}})", "list"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}})", "longer"},
      {R"({"__metadata__":{"a":1}})", "number"},
      {R"({"__metadata__":{"a":{}}})", "object"},
      {R"({"a":null})", "null"},
      {R"({}{})", "offset"},
  };
  for (const BadHeader& bad : cases) {
    const auto header = internal::parse_safetensors_header(bad.header, 8, "file");
    ASSERT_FALSE(header) << bad.header;
    EXPECT_NE(header.error().message.find(bad.complaint), std::string::npos)
        << bad.header << "\n  gave: " << header.error().message;
  }
}

TEST(SafetensorsHeader, AcceptsScalarsAndEmptyTensors) {
  const auto header = internal::parse_safetensors_header(
      R"({"scalar":{"dtype":"F64","shape":[],"data_offsets":[0,8]},)"
      R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}})",
      8, "file");
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->tensors.size(), 2u);
}

// A folder with two shards: `a` in the first file, `b` in the second.
class ShardedTest : public SafetensorsTest {
 protected:
  ShardedTest() {
    write(folder_ / "1.safetensors",
          file_bytes(R"({"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}})", 4));
    write(folder_ / "2.safetensors",
          file_bytes(R"({"b":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}})", 4));
  }

  Result<ModelWeights> open_with_index(const std::string& weight_map) {
    write(folder_ / "model.safetensors.index.json", R"({"weight_map":)" + weight_map + "}");
    return ModelWeights::open(folder_);
  }
};

TEST_F(ShardedTest, FindsTensorsInTheirFiles) {
  const auto weights = open_with_index(R"({"a":"1.safetensors","b":"2.safetensors"})");
  ASSERT_TRUE(weights) << weights.error().message;
  EXPECT_EQ(weights->names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(weights->tensor("b")->dtype, TensorDtype::kI32);
  EXPECT_EQ(weights->files().size(), 2u);
  EXPECT_FALSE(weights->tensor("c"));
}

TEST_F(ShardedTest, ChecksShapeAndType) {
  const auto weights = open_with_index(R"({"a":"1.safetensors","b":"2.safetensors"})");
  ASSERT_TRUE(weights);
  const std::int64_t one[] = {1}, two[] = {2}, matrix[] = {2, 1};
  EXPECT_TRUE(weights->tensor("a", two));
  EXPECT_NE(weights->tensor("a", one).error().message.find("[2]"), std::string::npos);
  EXPECT_FALSE(weights->tensor("a", matrix));
  EXPECT_NE(weights->tensor("b", one).error().message.find("I32"), std::string::npos);
}

TEST_F(ShardedTest, RefusesPathsOutOfTheFolder) {
  fs::create_directories(folder_ / "below");
  fs::rename(folder_ / "2.safetensors", folder_ / "below" / "2.safetensors");
  fs::create_symlink("below/2.safetensors", folder_ / "link.safetensors");
  for (const std::string shard : {"below/2.safetensors", "../2.safetensors", "/etc/passwd", "..",
                                  "", "link.safetensors", "absent.safetensors", "below"}) {
    const auto weights = open_with_index(R"({"b":")" + shard + R"("})");
    ASSERT_FALSE(weights) << shard;
    EXPECT_EQ(weights.error().code, ErrorCode::kModelFile);
  }
}

TEST_F(ShardedTest, RefusesAnIndexThatDisagreesWithItsFiles) {
  EXPECT_FALSE(open_with_index(R"({"a":"2.safetensors"})"));
  EXPECT_FALSE(open_with_index(R"({"a":7})"));
  EXPECT_FALSE(open_with_index(R"({})"));
  EXPECT_FALSE(open_with_index(R"({"a":"1.safetensors","a":"2.safetensors"})"));
  EXPECT_FALSE(open_with_index(std::string(5 << 20, ' ')));
}

TEST_F(SafetensorsTest, FollowsTheLinksOfAHuggingFaceCache) {
  const fs::path snapshot = folder_ / "models--x" / "snapshots" / "0123";
  fs::create_directories(snapshot);
  fs::create_directories(folder_ / "models--x" / "blobs");
  write(folder_ / "models--x" / "blobs" / "abc", file_bytes(kTwoTensors, 12));
  fs::create_symlink("../../blobs/abc", snapshot / "model.safetensors");
  const auto weights = ModelWeights::open(snapshot);
  ASSERT_TRUE(weights) << weights.error().message;
  EXPECT_TRUE(weights->contains("a"));
}

TEST_F(SafetensorsTest, RefusesAFolderWithPickledWeightsOnly) {
  write(folder_ / "pytorch_model.bin", "x");
  const auto weights = ModelWeights::open(folder_);
  ASSERT_FALSE(weights);
  EXPECT_NE(weights.error().message.find("never read"), std::string::npos);
}

}  // namespace
}  // namespace foretoken
