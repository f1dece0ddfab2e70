// lease_holder SOCKET RANK EPOCH: a rank that reserves three sequences, says so, and waits to be
// killed. For server_test.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "tests/kvstore/running_server.h"

int main(int argc, char** argv) {
  using namespace foretoken;
  if (argc != 4) return 2;
  const auto device = kernels::make_cpu_device({1, 1 << 20});
  auto store = kvstore::KvStore::connect(
      kvstore::test_client(argv[1], std::atoi(argv[2]), std::atoi(argv[3])), *device);
  if (!store || !kvstore::ready(**store)) return 1;
  for (std::uint64_t i = 0; i < 3; ++i) {
    if (!(*store)->reserve(SequenceId{i}, {}, 2)) return 1;
  }
  std::puts("holding");
  std::fflush(stdout);
  for (;;) pause();
}
