// The device that a service's configuration asks for.
#pragma once

#include <memory>
#include <string>

#include "common/model_config.h"
#include "common/service_config.h"
#include "kernels/device.h"

namespace foretoken::worker {

bool wants_cuda(const ServiceConfig& config);

// For an error: what gives a rank's sequences more of the device's memory.
std::string how_to_make_room(const ServiceConfig& config);

// What a GPU can't do of it, and what to change: before weights are loaded. Error: kDevice of the
// model, kConfig of the rest.
Status check_gpu_limits(const ServiceConfig& config, const ModelConfig& model);

// gpu: its number, of those that this process sees, where it is to be one. Throws
// Exception(kDevice), or what check_gpu_limits() says.
std::unique_ptr<kernels::Device> make_device(const ServiceConfig& config, const ModelConfig& model,
                                             int gpu);

}  // namespace foretoken::worker
