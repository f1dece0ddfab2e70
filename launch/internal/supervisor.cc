#include "launch/internal/supervisor.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "launch/internal/endpoint_file.h"

namespace foretoken::launch {
namespace {

using Clock = RestartLimit::Clock;
using std::chrono::milliseconds;

constexpr std::size_t kMostRestarts = 5;
constexpr std::chrono::minutes kRestartWindow{10};
constexpr milliseconds kFirstPause{500};
constexpr milliseconds kTick{200};
constexpr milliseconds kPauseInDrain{2'000};  // a coordinator that has drained is gone by then
constexpr milliseconds kStopTimeout{5'000};   // of a child after SIGTERM, before SIGKILL

void say(const std::string& line) { std::cerr << "foretoken: " << line << std::endl; }

// Of a group that did not start: mpirun is missing, the kernel killed a rank. A rank that crashed
// is a bug, as is one that says so.
bool is_the_machines(const ExitStatus& status) {
  const int signal = status.signal != 0 ? status.signal : status.code - 128;
  const bool crashed = signal == SIGABRT || signal == SIGSEGV || signal == SIGFPE;
  return status.error_code() == ErrorCode::kInternal && !crashed &&
         status.code != exit_code(ErrorCode::kInternal);
}

bool is_ignored(int signal) {
  struct sigaction action {};
  return sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN;
}

}  // namespace

std::optional<milliseconds> RestartLimit::next(Clock::time_point now) {
  while (!recent_.empty() && now - recent_.front() > kRestartWindow) recent_.pop_front();
  if (recent_.size() >= kMostRestarts) return std::nullopt;
  const milliseconds pause =
      recent_.empty() ? milliseconds(0) : kFirstPause * (1 << recent_.size());
  recent_.push_back(now);
  return pause;
}

Supervisor::Supervisor(SupervisorConfig config) : config_(std::move(config)) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  if (!is_ignored(SIGHUP)) sigaddset(&signals, SIGHUP);  // blocked, it would come under nohup too
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  FT_CHECK(signal_fd_ >= 0);
}

Supervisor::~Supervisor() { close(signal_fd_); }

int Supervisor::run() {
  try {
    start();
    while (!drained_) {
      wait_for_events(kTick);
      check_children();
      start_due_groups();
      if (!ready_) watch_loading();
      if (drain_deadline_ && Clock::now() > *drain_deadline_) {
        say("the drain took longer than --drain-timeout-s; stopping now");
        break;
      }
      if (signals_ > 1) break;
      if (signals_ == 1 && !draining_) begin_drain();
    }
  } catch (...) {
    stop_all();
    throw;
  }
  stop_all();
  return 0;
}

// ---- start -----------------------------------------------------------------------------------

void Supervisor::start() {
  const Status written = write_private_file(config_.files.config(), to_json(config_.service));
  if (!written) throw Exception(written.error());
  store_ = std::make_unique<Process>(kvstore_command(config_.service, config_.files));
  coordinator_ = std::make_unique<Process>(coordinator_command(config_.files));
  for (int number = 0; number < config_.service.num_groups; ++number) {
    groups_.push_back(Group{.number = number});
    groups_.back().start_at = Clock::time_point::max();  // once the coordinator listens
  }
}

void Supervisor::start_group(Group& group) {
  group.start_at.reset();
  group.cause.clear();
  Command command = worker_group_command(config_.service, config_.files,
                                         {group.number, ++group.life}, config_.launcher);
  // Through mpirun's pipes a rank can't see it.
  if (!config_.quiet && isatty(STDERR_FILENO) == 1) {
    command.environment.emplace_back("FORETOKEN_PROGRESS", "bar");
  }
  group.process = std::make_unique<Process>(command);
}

// Over ipc the folder's mode guards the socket.
bool Supervisor::has_keys() const {
  return endpoint_.rfind("tcp://", 0) == 0 && !config_.service.insecure_bind;
}

void Supervisor::connect_client() {
  client::ClientConfig connection;
  connection.endpoint = endpoint_;
  connection.silence_timeout = std::chrono::seconds(1);
  if (has_keys()) {
    connection.keys = read_client_keys(config_.files.client_key()).value_or_throw();
  }
  client_ = client::Client::connect(connection).value_or_throw();
}

// ---- events ----------------------------------------------------------------------------------

std::vector<Process*> Supervisor::running() const {
  std::vector<Process*> all;
  for (const Group& group : groups_) {
    if (group.process) all.push_back(group.process.get());
  }
  if (coordinator_) all.push_back(coordinator_.get());
  if (store_) all.push_back(store_.get());
  return all;
}

void Supervisor::wait_for_events(milliseconds timeout) {
  std::vector<pollfd> fds = {{.fd = signal_fd_, .events = POLLIN, .revents = 0}};
  if (coordinator_) {
    fds.push_back({.fd = coordinator_->output_fd(), .events = POLLIN, .revents = 0});
  }
  for (const Process* process : running()) {
    fds.push_back({.fd = process->pidfd(), .events = POLLIN, .revents = 0});
  }
  poll(fds.data(), fds.size(), static_cast<int>(timeout.count()));
  read_signals();
  read_coordinator();
}

void Supervisor::read_signals() {
  const int before = signals_;
  signalfd_siginfo info{};
  while (read(signal_fd_, &info, sizeof info) == sizeof info) {
    // A terminal that goes may send it more than once: its shell and the kernel do.
    if (info.ssi_signo != SIGHUP || signals_ == 0) ++signals_;
  }
  const bool drains_already = draining_ && before == 0 && signals_ == 1;
  if (drains_already && !config_.quiet) say("draining already; a second signal stops at once");
}

void Supervisor::read_coordinator() {
  if (!coordinator_) return;
  char buffer[4096];
  ssize_t count = 0;
  while ((count = read(coordinator_->output_fd(), buffer, sizeof buffer)) > 0) {
    coordinator_line_.append(buffer, static_cast<std::size_t>(count));
  }
  for (std::size_t end = 0; (end = coordinator_line_.find('\n')) != std::string::npos;) {
    const std::string line = coordinator_line_.substr(0, end);
    coordinator_line_.erase(0, end + 1);
    on_coordinator_line(line);
  }
}

void Supervisor::on_coordinator_line(const std::string& line) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  const std::string event = json.is_object() ? json.value("event", "") : "";
  if (event == "listening") {
    endpoint_ = json.value("endpoint", "");
    connect_client();
    for (Group& group : groups_) start_group(group);
  } else if (event == "draining") {
    expect_end();  // also where a client has asked for it
  } else if (event == "group_dead") {
    if (Group* group = group_of(json)) group->cause = json.value("reason", "");
  } else if (event == "restart_group") {
    Group* group = group_of(json);
    if (group != nullptr && group->process) {
      restart_group(*group, json.value("reason", "the coordinator asked for it"));
    }
  } else {
    say("the coordinator said what I don't know: " + line);
  }
}

// A word on a life may come when we have seen its end, and have begun the next one.
Supervisor::Group* Supervisor::group_of(const nlohmann::json& line) {
  for (Group& group : groups_) {
    if (group.number != line.value("group", -1)) continue;
    return line.value("life", group.life) == group.life ? &group : nullptr;
  }
  return nullptr;
}

// ---- children --------------------------------------------------------------------------------

void Supervisor::check_children() {
  if (const auto status = coordinator_->poll()) {
    coordinator_.reset();
    if (!status->ok())
      throw Exception(status->error_code(), "the coordinator " + status->describe());
    drained_ = true;
    return;
  }
  if (const auto status = store_->poll()) {
    throw Exception(status->error_code(), "the KV store " + status->describe());
  }
  for (Group& group : groups_) {
    if (!group.process) continue;
    if (const auto status = group.process->poll()) on_group_end(group, *status);
  }
}

std::string Supervisor::describe_end(const Group& group, const ExitStatus& status) const {
  const std::string what = group.process->name() + " " + status.describe() +
                           (ready_ ? "" : " while it loaded the model");
  return group.cause.empty() ? what : what + ": " + group.cause;
}

void Supervisor::on_group_end(Group& group, const ExitStatus& status) {
  const std::string what = describe_end(group, status);
  if (draining_ && (status.ok() || !ready_)) {  // the coordinator told it to end
    group.process.reset();
  } else if (!ready_) {
    if (is_the_machines(status)) {
      throw Exception(ErrorCode::kDevice, what + "; see above, and foretoken doctor");
    }
    throw Exception(status.error_code(), what);
  } else {
    restart_group(group, what);
  }
}

void Supervisor::restart_group(Group& group, const std::string& reason) {
  group.process.reset();  // SIGKILL to its group; its ranks follow (PDEATHSIG)
  const auto now = Clock::now();
  const auto pause = group.limit.next(now);
  if (!pause && draining_) return say(reason + "; the service ends, so it is not restarted again");
  if (!pause) {
    throw Exception(ErrorCode::kDevice, reason + "; it was restarted " +
                                            std::to_string(kMostRestarts) +
                                            " times in 10 minutes, so this is the end");
  }
  const milliseconds wait = draining_ ? std::max(*pause, kPauseInDrain) : *pause;
  group.start_at = now + wait;
  say(reason + "; restarting it in " + std::to_string(wait.count()) + " ms");
}

void Supervisor::start_due_groups() {
  for (Group& group : groups_) {
    if (group.start_at && Clock::now() >= *group.start_at) start_group(group);
  }
}

// ---- loading ---------------------------------------------------------------------------------

void Supervisor::watch_loading() {
  if (!client_ || draining_) return;
  const auto status = client_->status();
  if (!status) return;  // not yet; if the coordinator has died, check_children() says so
  const bool is_news = status->detail != last_detail_ && status->state != "failed";
  if (is_news && !config_.quiet && !status->detail.empty()) {  // of a failure our end tells
    say(status->state + ": " + status->detail);
  }
  last_detail_ = status->detail;
  if (status->state == "ready") announce();
}

void Supervisor::announce() {
  ready_ = true;
  const std::string key_file = has_keys() ? config_.files.client_key().string() : "";
  if (!config_.endpoint_file.empty()) {
    const Status written =
        write_endpoint_file(config_.endpoint_file, {.endpoint = endpoint_,
                                                    .key_file = key_file,
                                                    .model = config_.service.model,
                                                    .pid = getpid()});
    if (!written) throw Exception(written.error());
  }
  if (config_.quiet) return;
  const std::string connect =
      "--connect " + endpoint_ + (has_keys() ? " --key-file " + key_file : "");
  std::cout << "ready: " << endpoint_ << (has_keys() ? ", key file " + key_file : "")
            << "; try: foretoken generate " << connect << " --stream --prompt \"Once upon a time\""
            << std::endl;
}

// ---- end -------------------------------------------------------------------------------------

// Groups that end well from now on are not started again.
void Supervisor::expect_end() {
  if (draining_) return;
  draining_ = true;
  drain_deadline_ = Clock::now() + std::chrono::seconds(config_.service.drain_timeout_s + 5);
}

void Supervisor::begin_drain() {
  if (!client_) {  // still starting: nothing to drain
    signals_ = 2;
    return;
  }
  if (!config_.quiet) say("draining; a second signal stops at once");
  coordinator_->signal(SIGTERM);
  expect_end();
}

// A coordinator that has drained has told the ranks to end, and they do. Else all but the store,
// which may have to write what it keeps, are killed. mpirun itself never gets SIGTERM first, as it
// gives its ranks a second only.
void Supervisor::stop_all() {
  coordinator_.reset();
  for (Group& group : groups_) {
    if (group.process && drained_) group.process->wait(kStopTimeout);
    group.process.reset();
  }
  if (store_) {
    store_->signal(SIGTERM);
    store_->wait(kStopTimeout);
    store_.reset();
  }
}

}  // namespace foretoken::launch
