// PeerSum: sums over the GPUs of a node that have each other's memory open, and joined rows of
// logits.
//
// Small ones, in one kernel: decode adds 8 KiB a row up 65 times a token; there the link's latency
// counts, and that a kernel may start early. Every rank writes its values into every other's inbox,
// and adds up what comes into its own, in the order of ranks: all get equal bits. Values travel
// with the number of their call beside them, 4 bytes of it with 4 of values: who finds the number
// has found the values, so that there is one crossing of the link and no fence (as in NCCL's
// protocol LL). An inbox has two halves, used in turn: a rank that writes call n has had all
// answers of call n - 1, so that nobody still reads call n - 2.
//
// Or within a chain of products, as all but one of decode's are where a step has one row: those who
// make values send them, and those who take the sum add it up (kernels/cuda/peer_links.cuh).
//
// Large ones of two GPUs, in two steps: prefill adds 64 MiB up, which takes as long as a tenth of
// its products. begin() has the copy engine bring the values into the other's inbox, which takes no
// SM from the products that follow; end() waits for what comes, and adds it. A number follows the
// values through the same engine, so that who finds it has found them. An inbox has four places,
// used in turn: a rank begins call n once it has ended call n - 2, for which the other had begun
// that, and so had ended call n - 4.
//
// Called by one thread, in the same order and with the same counts on every rank, always on one
// stream at a time. Recorded graphs may contain it.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>

#include "kernels/device.h"

namespace foretoken::kernels {

class PeerSum {
 public:
  static constexpr int kMaxRanks = 8;
  static constexpr std::size_t kMaxBytes = std::size_t{256} << 10;  // of a tensor, or a part

  // How another rank finds an inbox.
  using Address = std::array<std::byte, 96>;

  // Kernels that wait for others give up. REQUIRES: no rank calls run() any more.
  virtual ~PeerSum() = default;

  virtual Address address() const = 0;
  // Opens the others' inboxes, given every rank's address by rank. Throws Exception(kDevice) where
  // one can't be reached.
  virtual void connect(std::span<const Address> addresses) = 0;
  // Closes them, which every rank does before any inbox may go.
  virtual void disconnect() = 0;

  // Whether it takes a tensor of so many values of the device's activation type.
  virtual bool takes(std::size_t count) const = 0;
  // data[count] on the device becomes its sum over the ranks. REQUIRES: takes(count), connected.
  virtual void run(void* data, std::size_t count, Stream& stream) = 0;

  // Whether it joins such parts of one row, none of them empty: part[widths[rank]] of each rank
  // into all[sum of widths].
  virtual bool gathers(std::span<const int> widths) const = 0;
  // REQUIRES: gathers(), connected.
  virtual void gather(const float* part, float* all, std::span<const int> widths,
                      Stream& stream) = 0;

  // Whether it sums so many values, of one row, within a chain of products (Device::linear_chain).
  virtual bool takes_in_chain(int columns) const = 0;

  // Whether it takes so many values in two steps.
  virtual bool begins(std::size_t count) const = 0;
  // Nothing writes data[count] until end(), which makes it the sum of the oldest that was begun.
  // Not recorded. REQUIRES: begins(count), connected; not more than kMaxBegun are begun.
  static constexpr std::size_t kMaxBegun = 2;
  virtual void begin(void* data, std::size_t count, Stream& stream) = 0;
  virtual void end(Stream& stream) = 0;
};

struct PeerSumSizes {
  std::size_t most_bytes = 0;  // of a sum in two steps; 0: there are none
  int chain_columns = 0;       // of each sum within a chain; 0: there are none
};

// REQUIRES: a CUDA device; it outlives the sum. Throws Exception(kExhausted) where the device's
// memory, in which it has MemoryUse::kSums, is full, and Exception(kDevice).
std::unique_ptr<PeerSum> make_peer_sum(Device& device, int rank, int world_size,
                                       const PeerSumSizes& sizes = {});

}  // namespace foretoken::kernels
