// fake-worker: a FakeRank as a process, in place of foretoken-worker:
//   fake-worker ENDPOINT GROUP RANK WORLD_SIZE STEP_MS [KEY_FILE]
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

#include "common/socket.h"
#include "common/wire.h"
#include "tests/coordinator/fake_worker.h"

int main(int argc, char** argv) {
  using namespace foretoken;
  using std::chrono::milliseconds;
  if (argc < 6) return 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  coordinator::FakeRankConfig config;
  config.group = std::atoi(argv[2]);
  config.rank = std::atoi(argv[3]);
  config.world_size = std::atoi(argv[4]);
  const milliseconds step_time(std::atoi(argv[5]));

  DealerSocket::Config connection{.endpoint = argv[1]};
  if (argc > 6) connection.keys = read_client_keys(argv[6]).value_or_throw();
  auto socket = DealerSocket::connect(make_socket_context(), connection).value_or_throw();
  const auto send = [&](const WorkerMessage& message) {
    static_cast<void>(socket->send(encode(message)).value_or_throw());
  };
  coordinator::FakeRank rank(config, std::make_shared<coordinator::FakeStore>());
  send(Hello{config.group, config.rank, config.world_size, getpid(), "here"});
  Epoch epoch{};
  while (true) {
    const auto frame = socket->receive(milliseconds(100));
    if (!frame) {
      send(Heartbeat{epoch, config.group, config.rank});
      continue;
    }
    const auto message = decode_coordinator_message(*frame).value_or_throw();
    if (std::holds_alternative<Shutdown>(message)) return 0;
    if (const auto* welcome = std::get_if<Welcome>(&message)) {
      if (welcome->epoch == epoch) continue;  // a probe
      epoch = welcome->epoch;
      send(rank.ready(epoch));
    } else if (const auto* plan = std::get_if<StepPlan>(&message)) {
      std::this_thread::sleep_for(step_time);
      send(rank.run(*plan));
    }
  }
}
