#include "tests/coordinator/test_service.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/coordinator/tiny_model.h"

namespace foretoken::coordinator {

ChildProcess::ChildProcess(const std::vector<std::string>& arguments) {
  int ends[2];
  FT_CHECK(pipe2(ends, O_CLOEXEC) == 0);
  std::vector<char*> argv;
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(ends[1], STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(ends[1]);
  output_ = ends[0];
}

ChildProcess::~ChildProcess() {
  if (!ended_) {
    kill(pid_, SIGKILL);
    wait();
  }
  close(output_);
}

void ChildProcess::signal(int number) const { kill(pid_, number); }

std::string ChildProcess::read_line() {
  std::string line;
  char c = 0;
  while (read(output_, &c, 1) == 1 && c != '\n') line += c;
  return line;
}

int ChildProcess::wait() {
  int status = 0;
  FT_CHECK(ended_ || waitpid(pid_, &status, 0) == pid_);
  ended_ = true;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TestService::TestService(ServiceConfig config) : config_(std::move(config)) {
  char name[] = "/tmp/foretoken_test_XXXXXX";
  folder_ = ::mkdtemp(name);
  write_tiny_model(folder_ / "tiny");
  config_.model = (folder_ / "tiny").string();
  const auto path = folder_ / "config.json";
  FT_CHECK(write_private_file(path, to_json(config_)).has_value());
  coordinator_ = std::make_unique<ChildProcess>(std::vector<std::string>{
      COORDINATOR_PROGRAM, "--config", path, "--runtime-dir", folder_, "--store-socket", "none"});
  const auto line = nlohmann::json::parse(coordinator_->read_line());
  endpoint_ = line.at("endpoint");
  worker_endpoint_ = line.at("worker_endpoint");
}

TestService::~TestService() {
  ranks_.clear();
  coordinator_.reset();
  std::filesystem::remove_all(folder_);
}

void TestService::start_ranks(int step_ms) {
  ranks_.clear();
  const int world_size = config_.tensor_parallel_size;
  for (int group = 0; group < config_.num_groups; ++group) {
    for (int rank = 0; rank < world_size; ++rank) {
      ranks_.push_back(std::make_unique<ChildProcess>(std::vector<std::string>{
          FAKE_WORKER_PROGRAM, worker_endpoint_, std::to_string(group), std::to_string(rank),
          std::to_string(world_size), std::to_string(step_ms)}));
    }
  }
}

std::unique_ptr<client::Client> TestService::connect(std::optional<ClientKeys> keys) const {
  return client::Client::connect({.endpoint = endpoint_, .keys = std::move(keys)}).value_or_throw();
}

std::unique_ptr<client::Client> TestService::connect() const {
  const auto path = folder_ / "client.key";
  if (!std::filesystem::exists(path)) return connect(std::nullopt);
  return connect(read_client_keys(path).value_or_throw());
}

void TestService::wait_until_ready(client::Client& client) const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::chrono::steady_clock::now() < end) {
    const auto status = client.status();
    if (status && status->state == "ready") return;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  FAIL() << "the service is not ready after 20 s";
}

}  // namespace foretoken::coordinator
