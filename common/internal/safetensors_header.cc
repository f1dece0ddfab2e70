#include "common/internal/safetensors_header.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>
#include <utility>

#include "common/internal/model_folder.h"

namespace foretoken::internal {
namespace {

constexpr std::size_t kMaxDims = 8;

struct DtypeInfo {
  TensorDtype dtype;
  std::string_view name;
  std::size_t bytes;
};

constexpr std::array kDtypes = {
    DtypeInfo{TensorDtype::kBool, "BOOL", 1},      DtypeInfo{TensorDtype::kU8, "U8", 1},
    DtypeInfo{TensorDtype::kI8, "I8", 1},          DtypeInfo{TensorDtype::kU16, "U16", 2},
    DtypeInfo{TensorDtype::kI16, "I16", 2},        DtypeInfo{TensorDtype::kU32, "U32", 4},
    DtypeInfo{TensorDtype::kI32, "I32", 4},        DtypeInfo{TensorDtype::kU64, "U64", 8},
    DtypeInfo{TensorDtype::kI64, "I64", 8},        DtypeInfo{TensorDtype::kF8E4M3, "F8_E4M3", 1},
    DtypeInfo{TensorDtype::kF8E5M2, "F8_E5M2", 1}, DtypeInfo{TensorDtype::kF16, "F16", 2},
    DtypeInfo{TensorDtype::kBf16, "BF16", 2},      DtypeInfo{TensorDtype::kF32, "F32", 4},
    DtypeInfo{TensorDtype::kF64, "F64", 8},
};

const DtypeInfo& info(TensorDtype dtype) {
  return *std::find_if(kDtypes.begin(), kDtypes.end(),
                       [&](const DtypeInfo& entry) { return entry.dtype == dtype; });
}

// Walks the header without building a tree of it, so a hostile one costs no more memory than its
// own size. The schema is fixed, and three levels deep:
//   {"__metadata__": {text: text}, NAME: {"dtype": text, "shape": [n...], "data_offsets": [n, n]}}
class HeaderHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  SafetensorsHeader header;
  std::string problem;  // why the walk stopped

  bool start_object(std::size_t) override {
    if (where_ == Where::kFile) return enter(Where::kTop);
    if (where_ != Where::kTop) return fail("an object where none belongs");
    if (key_ == "__metadata__") return enter(Where::kMetadata);
    if (header.tensors.size() == kMaxTensors) {
      return fail("more than " + std::to_string(kMaxTensors) + " tensors");
    }
    header.tensors.emplace_back().name = key_;
    has_dtype_ = false;
    shape_.reset();
    offsets_.reset();
    return enter(Where::kTensor);
  }

  bool end_object() override {
    if (where_ == Where::kTop) return enter(Where::kDone);
    const bool was_tensor = where_ == Where::kTensor;
    where_ = Where::kTop;
    return !was_tensor || finish_tensor();
  }

  bool key(std::string& text) override {
    key_ = text;
    if (where_ == Where::kTop && !names_.insert(text).second) return fail("it stands twice");
    return true;
  }

  bool start_array(std::size_t) override {
    if (where_ != Where::kTensor) return fail("a list where none belongs");
    std::optional<std::vector<std::uint64_t>>* list = nullptr;
    if (key_ == "shape") list = &shape_;
    if (key_ == "data_offsets") list = &offsets_;
    if (list == nullptr) return fail("the unknown field '" + key_ + "'");
    if (list->has_value()) return fail(key_ + " stands twice");
    numbers_ = &list->emplace();
    return enter(Where::kNumbers);
  }

  bool end_array() override { return enter(Where::kTensor); }

  bool string(std::string& text) override {
    if (where_ == Where::kMetadata) {
      if (header.metadata.size() == kMaxTensors) return fail("too many __metadata__ entries");
      return header.metadata.emplace(key_, text).second || fail("it stands twice");
    }
    if (where_ != Where::kTensor || key_ != "dtype") return fail("a text where none belongs");
    if (has_dtype_) return fail("dtype stands twice");
    const auto found = std::find_if(kDtypes.begin(), kDtypes.end(),
                                    [&](const DtypeInfo& entry) { return entry.name == text; });
    if (found == kDtypes.end()) return fail("the unknown dtype '" + text + "'");
    header.tensors.back().dtype = found->dtype;
    has_dtype_ = true;
    return true;
  }

  bool number_unsigned(std::uint64_t value) override {
    if (where_ != Where::kNumbers) return fail("a number where none belongs");
    if (numbers_->size() == kMaxDims) return fail(key_ + " is longer than 8");
    numbers_->push_back(value);
    return true;
  }

  bool number_integer(std::int64_t) override { return fail("a negative number"); }
  bool number_float(double, const std::string& text) override {
    return fail(text + " where a whole number belongs");
  }
  bool null() override { return fail("a null"); }
  bool boolean(bool) override { return fail("a boolean"); }
  bool binary(binary_t&) override { return fail("binary data"); }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    problem = "at offset " + std::to_string(8 + position) + ": " + error.what();
    return false;
  }

 private:
  enum class Where { kFile, kTop, kMetadata, kTensor, kNumbers, kDone };

  bool enter(Where where) {
    where_ = where;
    return true;
  }

  bool fail(const std::string& what) {
    const bool in_tensor = where_ == Where::kTensor || where_ == Where::kNumbers;
    const std::string& name = in_tensor ? header.tensors.back().name : key_;
    problem = name.empty() ? what : "tensor '" + name + "': " + what;
    return false;
  }

  bool finish_tensor() {
    TensorEntry& tensor = header.tensors.back();
    key_ = tensor.name;
    if (!has_dtype_ || !shape_ || !offsets_) return fail("dtype, shape or data_offsets is missing");
    if (offsets_->size() != 2 || offsets_->at(0) > offsets_->at(1)) {
      return fail("data_offsets isn't [begin, end]");
    }
    tensor.begin = offsets_->at(0);
    tensor.end = offsets_->at(1);
    std::uint64_t bytes = info(tensor.dtype).bytes;
    for (const std::uint64_t size : *shape_) {
      if (!std::in_range<std::int64_t>(size) || __builtin_mul_overflow(bytes, size, &bytes)) {
        return fail("its shape overflows");
      }
      tensor.shape.push_back(static_cast<std::int64_t>(size));
    }
    if (bytes != tensor.end - tensor.begin) {
      return fail("its shape takes " + std::to_string(bytes) + " bytes, data_offsets says " +
                  std::to_string(tensor.end - tensor.begin));
    }
    return true;
  }

  Where where_ = Where::kFile;
  std::string key_;  // the last one read
  std::unordered_set<std::string> names_;
  bool has_dtype_ = false;
  std::optional<std::vector<std::uint64_t>> shape_;
  std::optional<std::vector<std::uint64_t>> offsets_;
  std::vector<std::uint64_t>* numbers_ = nullptr;  // the list being read
};

// Upstream's rule: in order of offset, each tensor begins where the one before ends, and the last
// ends with the file. nullopt, or what is wrong.
std::optional<std::string> check_coverage(std::vector<TensorEntry>& tensors,
                                          std::uint64_t data_bytes) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t covered = 0;
  for (const TensorEntry& tensor : tensors) {
    if (tensor.begin != covered) {
      return "tensor '" + tensor.name + "': begins at data offset " + std::to_string(tensor.begin) +
             ", the one before ends at " + std::to_string(covered);
    }
    if (tensor.end > data_bytes) {
      return "tensor '" + tensor.name + "': ends at data offset " + std::to_string(tensor.end) +
             ", the file has " + std::to_string(data_bytes) + " bytes of data: it is truncated";
    }
    covered = tensor.end;
  }
  if (covered == data_bytes) return std::nullopt;
  return "its tensors end at data offset " + std::to_string(covered) + ", the file has " +
         std::to_string(data_bytes) + " bytes of data";
}

}  // namespace

Result<SafetensorsHeader> parse_safetensors_header(std::string_view text, std::uint64_t data_bytes,
                                                   std::string_view file) {
  const auto failed = [&](const std::string& what) {
    return model_error(std::string(file) + ": " + what);
  };
  if (!text.starts_with('{')) return failed("its header isn't a JSON object");
  HeaderHandler handler;
  if (!nlohmann::json::sax_parse(text, &handler)) return failed(handler.problem);
  SafetensorsHeader header = std::move(handler.header);
  if (const auto problem = check_coverage(header.tensors, data_bytes)) return failed(*problem);
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorEntry& a, const TensorEntry& b) { return a.name < b.name; });
  return header;
}

}  // namespace foretoken::internal

namespace foretoken {

std::string_view tensor_dtype_name(TensorDtype dtype) { return internal::info(dtype).name; }
std::size_t tensor_dtype_bytes(TensorDtype dtype) { return internal::info(dtype).bytes; }

}  // namespace foretoken
