#include "common/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/internal/model_folder.h"
#include "common/internal/safetensors_header.h"

namespace foretoken {

namespace fs = std::filesystem;
using internal::model_error;

static_assert(std::endian::native == std::endian::little, "safetensors are little endian");

namespace {

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::size_t kMaxIndexBytes = 4 << 20;  // Llama 3.1 405B's has 100 KB
constexpr std::size_t kMaxShards = 1024;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

Error io_error(const fs::path& path, const char* what) {
  return model_error(path.string() + ": " + what + ": " + std::strerror(errno));
}

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t size : shape)
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// A file's bytes, mapped read-only for as long as this lives.
class Mapping {
 public:
  static Result<Mapping> open(const fs::path& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io_error(path, "can't open");
    Result<Mapping> mapping = map(fd, path);
    ::close(fd);
    return mapping;
  }

  Mapping(Mapping&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  explicit Mapping(std::span<const std::byte> bytes) : bytes_(bytes) {}

  static Result<Mapping> map(int fd, const fs::path& path) {
    struct stat status {};
    if (::fstat(fd, &status) != 0) return io_error(path, "can't stat");
    if (!S_ISREG(status.st_mode)) return model_error(path.string() + " isn't a regular file");
    const auto size = static_cast<std::size_t>(status.st_size);
    if (size < kLengthBytes) {
      return model_error(path.string() + ": " + std::to_string(size) +
                         " bytes is too short for a safetensors file");
    }
    void* const start = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    if (start == MAP_FAILED) return io_error(path, "can't map");
    return Mapping({static_cast<const std::byte*>(start), size});
  }

  std::span<const std::byte> bytes_;
};

}  // namespace

std::int64_t TensorView::num_elements() const {
  return static_cast<std::int64_t>(bytes.size() / tensor_dtype_bytes(dtype));
}

bool TensorView::aligned() const {
  return reinterpret_cast<std::uintptr_t>(bytes.data()) % tensor_dtype_bytes(dtype) == 0;
}

std::string safetensors_header(std::span<const NamedTensor> tensors) {
  constexpr std::size_t kAlignment = 64;
  auto json = nlohmann::json::object();
  std::size_t end = 0;
  for (const auto& [name, view] : tensors) {
    const std::size_t begin = std::exchange(end, end + view.bytes.size());
    json[name] = {{"dtype", tensor_dtype_name(view.dtype)},
                  {"shape", view.shape},
                  {"data_offsets", {begin, end}}};
  }
  const std::string text = json.dump();
  const std::size_t bytes =
      (kLengthBytes + text.size() + kAlignment - 1) / kAlignment * kAlignment - kLengthBytes;
  std::string header(kLengthBytes + bytes, ' ');
  const std::uint64_t length = bytes;
  std::memcpy(header.data(), &length, kLengthBytes);
  std::memcpy(header.data() + kLengthBytes, text.data(), text.size());
  return header;
}

struct SafetensorsFile::Impl {
  fs::path path;
  Mapping mapping;
  std::string_view header_text;
  std::span<const std::byte> data;
  internal::SafetensorsHeader header;

  const internal::TensorEntry* find(std::string_view name) const {
    const auto at = std::lower_bound(header.tensors.begin(), header.tensors.end(), name,
                                     [](const internal::TensorEntry& entry,
                                        std::string_view wanted) { return entry.name < wanted; });
    return at != header.tensors.end() && at->name == name ? &*at : nullptr;
  }
};

Result<SafetensorsFile> SafetensorsFile::open(const fs::path& path) {
  FT_ASSIGN_OR_RETURN(Mapping mapping, Mapping::open(path));
  const std::span<const std::byte> bytes = mapping.bytes();
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  const std::uint64_t most = std::min(bytes.size() - kLengthBytes, internal::kMaxHeaderBytes);
  if (header_bytes > most) {
    return model_error(path.string() + ": at offset 0: a header of " +
                       std::to_string(header_bytes) + " bytes; at most " + std::to_string(most) +
                       " are possible: the file is truncated or isn't safetensors");
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                              header_bytes);
  const auto data = bytes.subspan(kLengthBytes + header_bytes);
  FT_ASSIGN_OR_RETURN(auto header,
                      internal::parse_safetensors_header(text, data.size(), path.string()));
  return SafetensorsFile(
      std::unique_ptr<Impl>(new Impl{path, std::move(mapping), text, data, std::move(header)}));
}

SafetensorsFile::SafetensorsFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;
SafetensorsFile::~SafetensorsFile() = default;

const fs::path& SafetensorsFile::path() const { return impl_->path; }
std::string_view SafetensorsFile::header() const { return impl_->header_text; }
std::uint64_t SafetensorsFile::file_bytes() const { return impl_->mapping.bytes().size(); }

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  for (const auto& entry : impl_->header.tensors) names.push_back(entry.name);
  return names;
}

bool SafetensorsFile::contains(std::string_view name) const { return impl_->find(name) != nullptr; }

std::string_view SafetensorsFile::metadata(std::string_view key) const {
  const auto at = impl_->header.metadata.find(key);
  return at == impl_->header.metadata.end() ? std::string_view{} : std::string_view(at->second);
}

Result<TensorView> SafetensorsFile::tensor(std::string_view name) const {
  const internal::TensorEntry* entry = impl_->find(name);
  if (entry == nullptr) {
    return model_error(impl_->path.string() + ": there is no tensor '" + std::string(name) + "'");
  }
  return TensorView{entry->dtype, entry->shape,
                    impl_->data.subspan(entry->begin, entry->end - entry->begin)};
}

namespace {

Error misplaced(const fs::path& index, const std::string& tensor, const std::string& shard) {
  return model_error(index.string() + ": weight_map puts '" + tensor + "' in " + shard +
                     ", which doesn't hold it");
}

// Tensor name to shard name, from the index file.
Result<std::map<std::string, std::string>> read_index(const fs::path& path) {
  FT_ASSIGN_OR_RETURN(const std::string text, internal::read_text(path, kMaxIndexBytes));
  FT_ASSIGN_OR_RETURN(const auto json,
                      internal::parse_json_object(text, path.string(), /*max_depth=*/8));
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) {
    return model_error(path.string() + ": weight_map is missing or empty");
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string()) {
      return model_error(path.string() + ": weight_map." + tensor + " isn't a file name");
    }
    shards.emplace(tensor, shard.get<std::string>());
  }
  return shards;
}

}  // namespace

Result<ModelWeights> ModelWeights::open_file(const fs::path& path) {
  ModelWeights weights;
  weights.path_ = path;
  FT_ASSIGN_OR_RETURN(auto file, SafetensorsFile::open(path));
  for (auto& name : file.names()) weights.entries_.push_back({std::move(name), 0});
  weights.files_.push_back(std::move(file));
  return weights;
}

Result<ModelWeights> ModelWeights::open(const fs::path& folder) {
  ModelWeights weights;
  weights.path_ = folder;
  std::error_code failed;
  if (fs::exists(folder / kSingleFile, failed)) {
    FT_ASSIGN_OR_RETURN(const auto path, internal::find_in_folder(folder, kSingleFile));
    return open_file(path);
  }
  if (!fs::exists(folder / kIndexFile, failed)) {
    return model_error(folder.string() + " holds neither " + kSingleFile + " nor " + kIndexFile +
                       " (pickled weights, .bin and .pt, are never read)");
  }
  FT_ASSIGN_OR_RETURN(const auto index_path, internal::find_in_folder(folder, kIndexFile));
  FT_ASSIGN_OR_RETURN(const auto index, read_index(index_path));
  std::map<std::string, std::size_t> opened;  // shard name to its place in files_
  for (const auto& [tensor, shard] : index) {
    const auto [at, is_new] = opened.try_emplace(shard, weights.files_.size());
    if (is_new) {
      if (opened.size() > kMaxShards) return model_error(index_path.string() + ": too many files");
      FT_ASSIGN_OR_RETURN(const auto path, internal::find_in_folder(folder, shard));
      FT_ASSIGN_OR_RETURN(auto file, SafetensorsFile::open(path));
      weights.files_.push_back(std::move(file));
    }
    if (!weights.files_[at->second].contains(tensor)) {
      return misplaced(index_path, tensor, shard);
    }
    weights.entries_.push_back({tensor, at->second});
  }
  return weights;
}

const ModelWeights::Entry* ModelWeights::find(std::string_view name) const {
  const auto at = std::lower_bound(
      entries_.begin(), entries_.end(), name,
      [](const Entry& entry, std::string_view wanted) { return entry.name < wanted; });
  return at != entries_.end() && at->name == name ? &*at : nullptr;
}

std::vector<std::string> ModelWeights::names() const {
  std::vector<std::string> names;
  for (const Entry& entry : entries_) names.push_back(entry.name);
  return names;
}

bool ModelWeights::contains(std::string_view name) const { return find(name) != nullptr; }

Result<TensorView> ModelWeights::tensor(std::string_view name) const {
  const Entry* entry = find(name);
  if (entry == nullptr) {
    return model_error(path_.string() + ": there is no tensor '" + std::string(name) + "'");
  }
  return files_[entry->file].tensor(name);
}

Result<TensorView> ModelWeights::tensor(std::string_view name,
                                        std::span<const std::int64_t> shape) const {
  FT_ASSIGN_OR_RETURN(TensorView view, tensor(name));
  const auto failed = [&](const std::string& what) {
    return model_error(path_.string() + ": tensor '" + std::string(name) + "' " + what);
  };
  if (!std::equal(shape.begin(), shape.end(), view.shape.begin(), view.shape.end())) {
    return failed("has shape " + shape_text(view.shape) + ", config.json asks for " +
                  shape_text(shape));
  }
  if (view.dtype != TensorDtype::kF32 && view.dtype != TensorDtype::kF16 &&
      view.dtype != TensorDtype::kBf16) {
    return failed("has type " + std::string(tensor_dtype_name(view.dtype)) +
                  "; F32, F16 and BF16 are served");
  }
  return view;
}

}  // namespace foretoken
