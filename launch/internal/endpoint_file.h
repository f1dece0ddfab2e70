// The endpoint file: what a client needs to know of a running service. Written by `serve` once it
// is ready (--endpoint-file), mode 0600; a JSON object of the fields below.
#pragma once

#include <filesystem>
#include <string>

#include "common/result.h"

namespace foretoken::launch {

struct EndpointFile {
  std::string endpoint;
  std::string key_file;  // empty: a service without keys
  std::string model;
  int pid = 0;  // of `foretoken serve`
};

Status write_endpoint_file(const std::filesystem::path& path, const EndpointFile& content);
// Errors: kIo when there is none, kConfig.
Result<EndpointFile> read_endpoint_file(const std::filesystem::path& path);

}  // namespace foretoken::launch
