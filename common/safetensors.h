// Weights from safetensors files, mapped read-only: a tensor is a view of the file's pages.
//
// Format: 8 bytes header length (little endian), a JSON header, then the tensors' bytes
// (https://github.com/huggingface/safetensors#format). Opening checks everything that upstream's
// reader demands before any of it is used: header at most 100 MB, JSON at most 8 levels deep, known
// types, sizes by checked arithmetic, tensors that cover the data exactly, without hole or overlap.
//
// Immutable after open, so any thread may read. Example: tests/common/safetensors_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.h"

namespace foretoken {

enum class TensorDtype {
  kBool,
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kU64,
  kI64,
  kF8E4M3,
  kF8E5M2,
  kF16,
  kBf16,
  kF32,
  kF64
};
std::string_view tensor_dtype_name(TensorDtype dtype);  // as the files write it: "F32", "BF16"
std::size_t tensor_dtype_bytes(TensorDtype dtype);

// A tensor's bytes, little endian, last index fastest; alive as long as the file they come from.
// The start is aligned to the element type in every file upstream's writers make, but the format
// doesn't demand it: `aligned()` says so.
struct TensorView {
  TensorDtype dtype = TensorDtype::kF32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;

  std::int64_t num_elements() const;
  bool aligned() const;
};

struct NamedTensor {
  std::string name;
  TensorView view;
};

// What a file begins with, length and header, so that the tensors' bytes can follow it one behind
// the other in this order. A multiple of 64 bytes.
std::string safetensors_header(std::span<const NamedTensor> tensors);

class SafetensorsFile {
 public:
  // Maps and checks the file. Error: kModelFile, naming file, tensor and offset.
  static Result<SafetensorsFile> open(const std::filesystem::path& path);

  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;
  ~SafetensorsFile();

  const std::filesystem::path& path() const;
  std::vector<std::string> names() const;  // sorted
  bool contains(std::string_view name) const;
  Result<TensorView> tensor(std::string_view name) const;  // error: kModelFile

  // The JSON header as it stands in the file, and the size of the whole file.
  std::string_view header() const;
  std::uint64_t file_bytes() const;

  // A value of the header's __metadata__; empty when it isn't there.
  std::string_view metadata(std::string_view key) const;

 private:
  struct Impl;
  explicit SafetensorsFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// All weights of a model folder: `model.safetensors`, or the shards that
// `model.safetensors.index.json` names. A shard is a plain file name inside the folder: no
// separators, and nothing that a symbolic link leads out of the folder (a Hugging Face cache,
// whose files are links into a blobs folder beside the snapshot, is accepted as it is).
class ModelWeights {
 public:
  static Result<ModelWeights> open(const std::filesystem::path& folder);  // error: kModelFile
  // All of them in this one file.
  static Result<ModelWeights> open_file(const std::filesystem::path& path);

  std::vector<std::string> names() const;  // sorted
  bool contains(std::string_view name) const;
  Result<TensorView> tensor(std::string_view name) const;  // error: kModelFile

  // The tensor, which must have this shape and be F32, F16 or BF16. Error: kModelFile, with both
  // shapes, or the types that are served.
  Result<TensorView> tensor(std::string_view name, std::span<const std::int64_t> shape) const;

  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  struct Entry {
    std::string name;
    std::size_t file = 0;
  };
  const Entry* find(std::string_view name) const;

  std::filesystem::path path_;  // of the folder or file; for errors
  std::vector<SafetensorsFile> files_;
  std::vector<Entry> entries_;  // sorted by name
};

}  // namespace foretoken
