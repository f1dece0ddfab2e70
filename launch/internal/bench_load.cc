#include "launch/internal/bench_load.h"

#include <algorithm>
#include <iostream>
#include <map>
#include <random>

#include "launch/internal/connection.h"
#include "launch/internal/report.h"

namespace foretoken::launch {
namespace {

using Clock = std::chrono::steady_clock;

// Random ids of a small range that any vocabulary has. A fixed seed: runs are comparable.
std::vector<TokenId> random_prompt(int length, int run) {
  constexpr int kFirst = 256;  // past special tokens and bytes of common vocabularies
  constexpr int kLast = 20000;
  std::mt19937 random(20261122U + static_cast<unsigned>(run));
  std::uniform_int_distribution<TokenId> pick(kFirst, kLast);
  std::vector<TokenId> ids(static_cast<std::size_t>(length));
  std::generate(ids.begin(), ids.end(), [&] { return pick(random); });
  return ids;
}

// The text's ids, repeated to `length`, and rotated a little a run, so that no run finds the prefix
// of another one in the KV store.
std::vector<TokenId> text_prompt(const std::vector<TokenId>& text, int length, int run) {
  std::vector<TokenId> ids;
  for (std::size_t i = 0; ids.size() < static_cast<std::size_t>(length); ++i) {
    ids.push_back(text[(i + 7 * static_cast<std::size_t>(run)) % text.size()]);
  }
  return ids;
}

GenerateRequest make_request(std::vector<TokenId> prompt, int tokens) {
  GenerateRequest request;
  request.prompt_ids = std::move(prompt);
  request.max_tokens = tokens;
  request.ignore_eos = true;
  request.sampling.temperature = 0;
  return request;
}

void take(const ServerMessage& message, std::map<std::string, Run*>& by_id) {
  if (const auto* tokens = std::get_if<TokenMessage>(&message)) {
    by_id.at(tokens->request_id)->arrivals.push_back({Clock::now(), tokens->tokens.size()});
  } else if (const auto* done = std::get_if<DoneMessage>(&message)) {
    Run& run = *by_id.at(done->request_id);
    run.done = *done;
    run.ended = true;
  } else if (const auto* error = std::get_if<ErrorMessage>(&message)) {
    throw Exception(error_code_from_name(error->code).value_or(ErrorCode::kInternal),
                    error->message);
  }
}

// Takes the next message in, if one comes soon; how long a request may take is the service's to
// say. Throws Exception when a request failed or the user has had enough.
void receive_one(client::Client& client, std::map<std::string, Run*>& by_id) {
  constexpr std::chrono::milliseconds kLookEvery{200};  // for an interrupt
  Result<ServerMessage> message = client.receive(kLookEvery);
  const bool none_came = !message && message.error().code == ErrorCode::kTimeout;
  if (!none_came) take(std::move(message).value_or_throw(), by_id);
  if (!interrupted()) return;
  for (const auto& [id, run] : by_id) client.cancel(id).value_or_throw();
  throw Exception(ErrorCode::kCancelled, "interrupted");
}

void measure(Batch& batch) {
  Clock::time_point begin = Clock::time_point::min();
  Clock::time_point end = Clock::time_point::max();
  for (const Run& run : batch.runs) {
    if (run.arrivals.size() < 2) return;
    begin = std::max(begin, run.arrivals.front().time);
    end = std::min(end, run.arrivals.back().time);
  }
  std::size_t tokens = 0;
  for (const Run& run : batch.runs) {
    for (std::size_t i = 1; i < run.arrivals.size(); ++i) {
      const auto& [time, count] = run.arrivals[i];
      if (run.arrivals[i - 1].time < begin || time > end) continue;
      const std::chrono::duration<double, std::milli> took = time - run.arrivals[i - 1].time;
      batch.token_ms.insert(batch.token_ms.end(), count, took.count() / static_cast<double>(count));
      tokens += count;
    }
  }
  const std::chrono::duration<double> seconds = end - begin;
  if (seconds.count() > 0) batch.tokens_per_s = static_cast<double>(tokens) / seconds.count();
}

Batch run_batch(client::Client& client, std::vector<std::vector<TokenId>> prompts, int tokens) {
  Batch batch;
  batch.runs.resize(prompts.size());
  std::map<std::string, Run*> by_id;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    by_id[client.submit(make_request(std::move(prompts[i]), tokens)).value_or_throw()] =
        &batch.runs[i];
  }
  while (!std::ranges::all_of(batch.runs, &Run::ended)) receive_one(client, by_id);
  measure(batch);
  return batch;
}

std::vector<std::vector<TokenId>> make_prompts(const BenchLoad& load, int batch) {
  std::vector<std::vector<TokenId>> prompts;
  for (int row = 0; row < load.batch; ++row) {
    const int run = batch * load.batch + row;
    prompts.push_back(load.text.empty() ? random_prompt(load.context, run)
                                        : text_prompt(load.text, load.context, run));
  }
  return prompts;
}

}  // namespace

std::vector<Batch> run_load(client::Client& client, const BenchLoad& load) {
  std::vector<Batch> batches;
  for (int i = 0; i < load.repeat; ++i) {
    batches.push_back(run_batch(client, make_prompts(load, i), load.tokens));
    std::cerr << "run " << i + 1 << " of " << load.repeat << ": "
              << summary(batches.back().runs.back().done) << "\n";
  }
  return batches;
}

}  // namespace foretoken::launch
