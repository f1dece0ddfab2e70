// Sampler: logits to tokens, on the device. A pure function of (seed, position, logits, earlier
// tokens), so every rank draws the same token and none is sent around.
#pragma once

#include <span>
#include <vector>

#include "kernels/device.h"
#include "worker/sequence.h"

namespace foretoken::worker {

class Sampler {
 public:
  Sampler(kernels::Device& device, int max_rows, int vocab, int max_model_len);

  // The next token of each row; logits [rows, vocab] (device), row i is rows[i]'s.
  // Appends it to sequence.tokens (a forced token instead, where the request has one).
  std::vector<SequenceToken> sample(const float* logits, std::span<Sequence* const> rows,
                                    kernels::Stream& stream);

 private:
  kernels::SampleRow make_row(const Sequence& sequence, int row, kernels::Stream& stream);

  kernels::Device& device_;
  const int vocab_;
  const int max_model_len_;
  kernels::DeviceBuffer rows_;     // [max_rows] SampleRow
  kernels::DeviceBuffer tokens_;   // [max_rows, max_model_len], where a penalty needs them
  kernels::DeviceBuffer sampled_;  // [max_rows] SampledToken
};

}  // namespace foretoken::worker
