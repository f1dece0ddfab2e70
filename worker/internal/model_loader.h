// ModelLoader: reads a rank's part of every tensor into a Model. Used once, by Model::load.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "worker/model.h"

namespace foretoken::worker {

class ModelLoader {
 public:
  ModelLoader(Model& model, const WeightSource& weights, LoadProgress& progress);
  ~ModelLoader();
  ModelLoader(const ModelLoader&) = delete;
  ModelLoader& operator=(const ModelLoader&) = delete;
  Status load();

 private:
  // Rows [rows.begin, rows.end()) and columns of a matrix in the files.
  struct Slice {
    std::string name;
    std::int64_t total_rows;
    std::int64_t total_columns;
    Range rows;
    Range columns;
  };
  Status load_embedding();
  Status load_layer(int index);
  Status load_attention(const std::string& prefix, Model::Layer& layer);
  Status load_mlp(const std::string& prefix, Model::Layer& layer);
  Status load_head();
  Result<std::unique_ptr<kernels::Weight>> matrix(std::span<const Slice> slices);
  // float32 on the device, whatever the file's type.
  Result<kernels::DeviceBuffer> vector(const std::string& name, std::int64_t size);
  // Parts of biases one behind the other; ranks other than 0 leave out what is added once.
  Result<kernels::DeviceBuffer> biases(std::span<const Slice> slices);
  Result<kernels::DeviceBuffer> upload(std::vector<float> values);
  Range head_rows(Range heads) const;
  std::int64_t total_bytes() const;  // of this rank's matrices, in the model's type

  Model& model_;
  const WeightSource& weights_;
  const ModelConfig& config_;
  const Partition& part_;
  LoadProgress& progress_;
  std::deque<std::vector<float>> uploading_;
};

}  // namespace foretoken::worker
