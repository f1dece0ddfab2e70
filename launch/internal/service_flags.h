// The flags of a service: one row for each field of ServiceConfig, with the help a user reads.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace foretoken::launch {

struct ServiceFlag {
  std::string_view field;   // of ServiceConfig; the flag is --field with '-' for '_'
  std::string_view group;   // heading in --help
  std::string_view values;  // "N", "cpu|cuda|auto"; empty: a switch
  std::string_view help;
};

// All of them, in --help's order. tests/launch/config_sources_test.cc: none is missing.
std::span<const ServiceFlag> service_flags();

std::string environment_name(std::string_view field);  // kv_budget -> FORETOKEN_KV_BUDGET

}  // namespace foretoken::launch
