// Philox4x32-10, a counter-based random generator (Salmon et al., SC 2011, §3.3): the same numbers
// on every device, rank and thread, without state.
#pragma once

#include <array>
#include <cstdint>

namespace foretoken::kernels {

constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                  std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// In [0, 1), of 53 bits; keyed by seed, counter = position.
constexpr double philox_uniform(std::uint64_t seed, std::uint64_t position) {
  const auto word = [](std::uint64_t x, int shift) {
    return static_cast<std::uint32_t>(x >> shift);
  };
  const auto bits =
      philox4x32({word(position, 0), word(position, 32), 0, 0}, {word(seed, 0), word(seed, 32)});
  const std::uint64_t joined = (std::uint64_t{bits[1]} << 32 | bits[0]) >> 11;
  return static_cast<double>(joined) * 0x1p-53;
}

}  // namespace foretoken::kernels
