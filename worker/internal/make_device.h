// The device that a service's configuration asks for.
#pragma once

#include <memory>

#include "common/model_config.h"
#include "common/service_config.h"
#include "kernels/device.h"

namespace foretoken::worker {

bool wants_cuda(const ServiceConfig& config);

// rank_on_node: which GPU it is, of those that this process sees. Throws Exception(kDevice).
std::unique_ptr<kernels::Device> make_device(const ServiceConfig& config, const ModelConfig& model,
                                             int rank_on_node);

}  // namespace foretoken::worker
