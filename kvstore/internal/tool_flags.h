// ToolFlags: what foretoken-kvstore does in place of serving: --bench, --stat, --verify or --gc, on
// a folder. The answer goes to stdout, as lines or, with --json, as one object.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "kvstore/internal/store_bench.h"

namespace foretoken::kvstore {

class ToolFlags {
 public:
  void add_to(CLI::App& app);
  // After parsing.
  bool is_wanted() const { return !tool_.empty(); }
  // key_file: of an encrypted file, else empty. Throws Exception, as the tools do.
  // REQUIRES: is_wanted().
  void run(const std::string& key_file) const;

 private:
  std::string tool_;
  BenchConfig bench_;  // its folder is every tool's
  bool json_ = false;
};

}  // namespace foretoken::kvstore
