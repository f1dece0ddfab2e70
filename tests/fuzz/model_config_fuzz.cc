// Fuzzes config.json and generation_config.json (a NUL between them): what is accepted must be a
// model that can be built.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "common/check.h"
#include "common/model_config.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::size_t cut = std::min(text.find('\0'), text.size());
  const auto config = foretoken::parse_model_config(
      text.substr(0, cut), cut < text.size() ? text.substr(cut + 1) : std::string_view{});
  if (!config) return 0;
  FT_CHECK(config->hidden_size > 0 && config->num_layers > 0 && config->vocab_size > 0);
  FT_CHECK(config->num_kv_heads > 0 && config->num_heads % config->num_kv_heads == 0);
  FT_CHECK(config->head_dim > 0 && config->head_dim % 2 == 0, config->head_dim);
  for (const std::int64_t id : config->eos_ids) FT_CHECK(id >= 0 && id < config->vocab_size, id);
  for (const double frequency : foretoken::rope_inverse_frequencies(*config)) {
    FT_CHECK(std::isfinite(frequency) && frequency > 0, frequency);
  }
  return 0;
}
