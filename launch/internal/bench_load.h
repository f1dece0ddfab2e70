// The load of `foretoken bench decode|prefill`, and what a client of the service sees of it.
#pragma once

#include <chrono>
#include <vector>

#include "client/client.h"

namespace foretoken::launch {

// Batches of requests, one batch after another; no prompt is the beginning of another one.
struct BenchLoad {
  int context = 512;  // prompt tokens
  int tokens = 64;    // of each answer
  int batch = 1;
  int repeat = 1;
  std::vector<TokenId> text;  // repeated to length; empty: random ids that any vocabulary has
};

// One request, as its client saw it.
struct Run {
  struct Arrival {
    std::chrono::steady_clock::time_point time;
    std::size_t tokens;  // several may come in one message
  };
  std::vector<Arrival> arrivals;
  DoneMessage done;
  bool ended = false;
};

// Requests that run at the same time, and their speed while all of them decode.
struct Batch {
  std::vector<Run> runs;
  std::vector<double> token_ms;  // from one token of a request to its next, one request's after the
                                 // other's
  double tokens_per_s = 0;       // of all requests together
};

// Says on stderr how each batch went. Throws Exception when a request failed or the user has had
// enough.
std::vector<Batch> run_load(client::Client& client, const BenchLoad& load);

}  // namespace foretoken::launch
