// Fuzzes the safetensors header: what is accepted must lie inside the data, and cover it.
// Input: one byte for the size of the data, then the header.
#include <cstdint>
#include <string_view>

#include "common/check.h"
#include "common/internal/safetensors_header.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::uint64_t data_bytes = data[0];
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto header = foretoken::internal::parse_safetensors_header(text, data_bytes, "fuzz");
  if (!header) return 0;
  std::uint64_t covered = 0;
  for (const auto& tensor : header->tensors) {
    FT_CHECK(tensor.begin <= tensor.end && tensor.end <= data_bytes, tensor.begin, tensor.end);
    covered += tensor.end - tensor.begin;
  }
  FT_CHECK(covered == data_bytes, covered, data_bytes);
  return 0;
}
