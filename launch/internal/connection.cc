#include "launch/internal/connection.h"

#include <signal.h>

#include "launch/internal/files.h"

namespace foretoken::launch {
namespace {

volatile sig_atomic_t interrupt_count = 0;

void on_interrupt(int number) {
  // The first asks for an orderly end; the second ends us as if there were no handler.
  interrupt_count = interrupt_count + 1;
  if (interrupt_count > 1) {
    signal(number, SIG_DFL);
    raise(number);
  }
}

}  // namespace

bool interrupted() {
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_handler = on_interrupt;
    return sigaction(SIGINT, &action, nullptr) == 0 && sigaction(SIGTERM, &action, nullptr) == 0;
  }();
  FT_CHECK(installed);
  return interrupt_count > 0;
}

void ConnectOptions::add_to(CLI::App& app) {
  app.add_option("--connect", endpoint_, "A running service's endpoint, as `serve` printed it")
      ->type_name("ENDPOINT")
      ->group("Service");
  app.add_option("--key-file", key_file_, "Its key file")->type_name("F")->group("Service");
}

client::ClientConfig ConnectOptions::find() const {
  client::ClientConfig config;
  config.endpoint = endpoint_;
  if (!key_file_.empty()) config.keys = read_client_keys(key_file_).value_or_throw();
  return config;
}

void ModelOrConnectOptions::add_to(CLI::App& app) {
  app.add_option("--model", model_, "Start a private service of this model (folder or name)")
      ->type_name("MODEL")
      ->group("Service");
  connect_.add_to(app);
  service_.add_to(app);
}

void ModelOrConnectOptions::check() const {
  if (model_.empty() == connect_.endpoint().empty()) {
    throw CLI::RequiredError("one of --model and --connect");
  }
  if (!is_private() && !service_.any_given().empty()) {
    throw CLI::ValidationError(service_.any_given(),
                               "is for a service that is started (--model); the one of --connect "
                               "has its own");
  }
  if (is_private() && connect_.has_key_file()) {
    throw CLI::ValidationError("--key-file", "goes with --connect");
  }
}

ServiceConfig ModelOrConnectOptions::service_config() const {
  FT_CHECK(is_private());
  ServiceConfig config = service_.find(model_).config;
  config.model = find_model(model_).value_or_throw();
  return config;
}

ModelOrConnectOptions::Opened ModelOrConnectOptions::open() const {
  Opened opened;
  client::ClientConfig connection;
  if (is_private()) {
    opened.service = std::make_unique<PrivateService>(service_config(), interrupted);
    connection = opened.service->connection();
  } else {
    connection = connect_.find();
  }
  opened.client = client::Client::connect(connection).value_or_throw();
  return opened;
}

}  // namespace foretoken::launch
