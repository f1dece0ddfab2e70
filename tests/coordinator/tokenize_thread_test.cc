#include "coordinator/tokenize_thread.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>

#include "tests/coordinator/tiny_model.h"

namespace foretoken::coordinator {
namespace {

// The next answers; none after 20 s.
std::vector<TokenizeThread::Answer> wait_for_answers(TokenizeThread& thread) {
  pollfd readable{.fd = thread.fd(), .events = POLLIN, .revents = 0};
  poll(&readable, 1, 20'000);
  return thread.take();
}

// Takes a while.
std::string long_text() {
  std::string text;
  while (text.size() < (4 << 20)) text += "some words ";
  return text;
}

TEST(TokenizeThread, TenantsTakeTurns) {
  TokenizeThread thread(tiny_tokenizer());
  thread.submit(RequestId{1}, "many", long_text(), {});
  for (int i = 2; i < 10; ++i) thread.submit(RequestId(i), "many", "x", {});
  thread.submit(RequestId{10}, "few", "x", {});
  thread.submit(RequestId{11}, "few", "x", {});
  std::vector<RequestId> ids;
  while (ids.size() < 11) {
    const auto some = wait_for_answers(thread);
    ASSERT_FALSE(some.empty());
    for (const auto& answer : some) ids.push_back(answer.id);
  }
  const auto place = [&](int id) {
    return std::find(ids.begin(), ids.end(), RequestId(id)) - ids.begin();
  };
  // The first text is begun at once, and another of its tenant may be the next.
  EXPECT_LE(place(10), 2);
  EXPECT_LE(place(11), 4);
  EXPECT_LT(place(8), place(9));
}

TEST(TokenizeThread, AnswersInOrder) {
  TokenizeThread thread(tiny_tokenizer());
  for (int i = 1; i <= 5; ++i)
    thread.submit(RequestId(i), "t", std::string(std::size_t(i), 'x'), {});
  std::vector<TokenizeThread::Answer> answers;
  while (answers.size() < 5) {
    auto some = wait_for_answers(thread);
    ASSERT_FALSE(some.empty());
    std::move(some.begin(), some.end(), std::back_inserter(answers));
  }
  for (int i = 1; i <= 5; ++i) {
    EXPECT_EQ(answers[std::size_t(i) - 1].id, RequestId(i));
    EXPECT_EQ(answers[std::size_t(i) - 1].ids->size(), std::size_t(i));
  }
}

// While the first one takes its time, whatever is cancelled leaves the queue.
TEST(TokenizeThread, WhatIsCancelledIsNotBegun) {
  TokenizeThread thread(tiny_tokenizer());
  thread.submit(RequestId{1}, "t", long_text(), {});
  for (int i = 2; i < 100; ++i) {
    thread.submit(RequestId(i), "t", "x", {});
    thread.cancel(RequestId(i));
  }
  thread.submit(RequestId{100}, "t", "x", {});
  thread.cancel(RequestId{1});  // it is begun, or not
  std::vector<RequestId> ids;
  while (ids.empty() || ids.back() != RequestId{100}) {
    const auto some = wait_for_answers(thread);
    ASSERT_FALSE(some.empty());
    for (const auto& answer : some) ids.push_back(answer.id);
  }
  EXPECT_LE(ids.size(), 2U);
}

TEST(TokenizeThread, KnowsHowMuchTextWaits) {
  TokenizeThread thread(tiny_tokenizer());
  thread.submit(RequestId{1}, "t", long_text(), {});  // it is begun, or not
  thread.submit(RequestId{2}, "t", "four", {});
  thread.submit(RequestId{3}, "other", "of another", {});
  EXPECT_EQ(thread.waiting_bytes("other").of_tenant, 10U);
  EXPECT_GE(thread.waiting_bytes("other").all, 14U);
  for (std::size_t answers = 0; answers < 3;) {
    const auto some = wait_for_answers(thread);
    ASSERT_FALSE(some.empty());
    answers += some.size();
  }
  EXPECT_EQ(thread.waiting_bytes("t").all, 0U);
}

}  // namespace
}  // namespace foretoken::coordinator
