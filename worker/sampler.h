// Sampler: logits to tokens, on the device. A pure function of (seed, position, logits, earlier
// tokens), so every rank draws the same token and none is sent around. A drawn token stays on the
// device, where the next step reads it; the device leaves another in host memory, which is looked
// at later, when it has been drawn.
//
//   auto draw = sampler.begin(rows, stream);      // what each row's request asks for
//   sampler.run(logits, rows.size(), stream);     // may be recorded, and launched again
//   sampler.end(*draw, stream);
//   ... next step ...
//   sampler.collect(draw, result);     // waits
//
// With a token comes how often the sequence has read KV that failed its check: then the token is
// worth nothing, nor is any later one.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/device.h"
#include "worker/pinned.h"
#include "worker/sequence.h"

namespace foretoken::worker {

class Sampler {
 public:
  Sampler(kernels::Device& device, int max_rows, int vocab);

  // One step's rows, on their way to the device and back.
  struct Draw {
    Draw(kernels::Device& device, std::size_t max_rows)
        : rows(device, max_rows), sampled(device, max_rows), done(device.make_event()) {}
    std::vector<SequenceToken> tokens;  // whose, and where; what was drawn comes with collect()
    PinnedArray<kernels::SampleRow> rows;
    PinnedArray<kernels::SampledToken> sampled;
    std::unique_ptr<kernels::Event> done;
  };

  // A position more in each sequence: it is drawn here (a forced token instead, where the request
  // has one).
  Draw* begin(std::span<Sequence* const> rows, kernels::Stream& stream);
  // logits [num_rows, vocab] (device), row i is rows[i]'s.
  void run(const float* logits, int num_rows, kernels::Stream& stream);
  void end(Draw& draw, kernels::Stream& stream);
  // Adds to the result's tokens, and to its `lost`.
  void collect(Draw* draw, StepResult& result);

 private:
  kernels::Device& device_;
  const int max_rows_;
  const int vocab_;
  kernels::DeviceBuffer rows_;          // [max_rows] SampleRow
  kernels::DeviceBuffer token_counts_;  // [max_rows, vocab], scratch
  // The device writes to a draw until it is done, whatever fails meanwhile: so they are kept here.
  std::vector<std::unique_ptr<Draw>> draws_;
  std::vector<Draw*> idle_;
};

}  // namespace foretoken::worker
