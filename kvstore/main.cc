// foretoken-kvstore: the KV store process of a node (docs/architecture.md, "Processes").
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <map>
#include <memory>
#include <string>

#include "common/program.h"
#include "common/result.h"
#include "kvstore/internal/server.h"
#include "kvstore/internal/tool_flags.h"

namespace {

using foretoken::ErrorCode;
using foretoken::Exception;
using foretoken::kernels::DataType;
using foretoken::kvstore::FileDescriptor;
using foretoken::kvstore::KvCipher;
using foretoken::kvstore::ModelIdentity;
using foretoken::kvstore::NumaPlacement;
using foretoken::kvstore::NvmeConfig;
using foretoken::kvstore::NvmeReuse;
using foretoken::kvstore::ReadChoice;
using foretoken::kvstore::Server;
using foretoken::kvstore::ServerConfig;
using foretoken::kvstore::ToolFlags;

constexpr int kNice = 10;  // on a CPU node, ranks go first

struct Options {
  ServerConfig server;
  NvmeConfig nvme;  // of the server, where it has a folder
  bool keep_slabs = false;
  bool encrypts = false;
  std::string key_file;
  ModelIdentity model;
  bool die_with_parent = false;
};

void add_options(CLI::App& app, Options& options) {
  app.add_option("--socket", options.server.socket_path, "Path of the socket, in a private folder");
  app.add_option("--arena-bytes", options.server.arena_bytes, "Host memory for KV (64GiB, 512MiB)")
      ->transform(CLI::AsSizeValue(false));
  app.add_option("--numa", options.server.placement, "Spread stripes over NUMA nodes")
      ->transform(CLI::CheckedTransformer(std::map<std::string, NumaPlacement>{
          {"none", NumaPlacement::kNone}, {"spread", NumaPlacement::kSpread}}));
  auto* folder = app.add_option("--nvme-path", options.nvme.folder,
                                "Folder for KV that leaves host memory; no NVMe tier without it");
  app.add_option("--nvme-bytes", options.nvme.capacity_bytes,
                 "Size of the file there (default: as a kept one, else 9/10 of what is free)")
      ->transform(CLI::AsSizeValue(false))
      ->needs(folder);
  app.add_option("--nvme-reuse", options.nvme.reads,
                 "Read prefixes from it where that is faster than computing them anew, or always")
      ->transform(CLI::CheckedTransformer(std::map<std::string, ReadChoice::Mode>{
          {"auto", ReadChoice::Mode::kAuto}, {"always", ReadChoice::Mode::kAlways}}))
      ->needs(folder);
  app.add_flag("--persist", options.keep_slabs, "Keep the file from start to start")->needs(folder);
  app.add_flag("--encrypt", options.encrypts, "Encrypt the file; with a random key, unless ...")
      ->needs(folder);
  app.add_option("--key-file", options.key_file,
                 "... a file has it: 64 hexadecimal digits, mode 0600. Tools take it too")
      ->type_name("FILE");
  app.add_flag("--die-with-parent", options.die_with_parent, "Exit when the parent process does");
  auto* heads = app.add_option("--kv-heads", options.model.total_kv_heads,
                               "Shape of the KV; without it, the first rank brings it");
  auto* layers = app.add_option("--layers", options.model.num_layers, "Layers of the model");
  auto* head_dim = app.add_option("--head-dim", options.model.head_dim, "Width of a head");
  for (auto* option : {heads, layers, head_dim}) option->check(CLI::Range(1, 1024));
  heads->needs(layers)->needs(head_dim);
  layers->needs(heads);
  head_dim->needs(heads);
  app.add_option("--kv-type", options.model.kv_type, "fp16 or bf16")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, DataType>{{"fp16", DataType::kFp16}, {"bf16", DataType::kBf16}}));
}

// SIGTERM and SIGINT as a file descriptor. Blocked before any thread starts, so that all inherit
// it.
FileDescriptor stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  return FileDescriptor(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
}

std::shared_ptr<const KvCipher> cipher_of(const Options& options) {
  if (!options.encrypts) return nullptr;
  if (!options.key_file.empty()) return KvCipher::from_file(options.key_file);
  if (options.keep_slabs) {
    throw Exception(ErrorCode::kConfig,
                    "--encrypt with --persist needs --key-file: a random key ends with the store");
  }
  return KvCipher::random();
}

void serve(const Options& options) {
  if (options.server.socket_path.empty() || options.server.arena_bytes == 0) {
    throw Exception(ErrorCode::kUsage, "--socket and --arena-bytes are required");
  }
  const FileDescriptor stop = stop_signals();
  if (options.die_with_parent) prctl(PR_SET_PDEATHSIG, SIGTERM);
  setpriority(PRIO_PROCESS, 0, kNice);
  ServerConfig config = options.server;
  if (!options.nvme.folder.empty()) {
    config.nvme = options.nvme;
    if (options.keep_slabs) config.nvme->reuse = NvmeReuse::kKeepSlabs;
    config.nvme->cipher = cipher_of(options);
  }
  Server server(config);
  if (options.model.total_kv_heads > 0) {
    if (auto opened = server.open_arena(options.model); !opened) throw Exception(opened.error());
  }
  server.run(stop.get());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("The KV store of a node: its arena outlives the workers that fill it.",
               "foretoken-kvstore");
  Options options;
  add_options(app, options);
  ToolFlags tools;
  tools.add_to(app);
  return foretoken::run_program(app, argc, argv, "kvstore", [&] {
    if (options.encrypts || !options.key_file.empty()) foretoken::forbid_core_dumps();
    tools.is_wanted() ? tools.run(options.key_file) : serve(options);
  });
}
