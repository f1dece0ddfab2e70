// ending_store SOCKET: listens, and ends as a killed store does that a disk keeps waiting: says so
// when its main thread is gone, and half a second later the other one is too. For server_test.
#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

#include "kvstore/internal/seqpacket.h"

namespace {

bool main_thread_is_gone() {
  std::ifstream file("/proc/self/stat");
  const std::string all(std::istreambuf_iterator<char>(file), {});
  return all.find(") Z ") != std::string::npos;
}

void end() {
  while (!main_thread_is_gone()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::puts("ending");
  std::fflush(stdout);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  _exit(0);  // the socket's file stays
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  static const foretoken::kvstore::Listener listener(argv[1]);
  std::thread(end).detach();
  pthread_exit(nullptr);
}
