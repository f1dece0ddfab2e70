#include "common/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace foretoken {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

// Llama-3.1-8B's, as published.
json llama31() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
    "vocab_size": 128256})");
}

TEST(ModelConfig, ReadsLlama31) {
  const auto config = parse_model_config(llama31().dump(), R"({"eos_token_id": [128009, 7]})");
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->family, ModelFamily::kLlama);
  EXPECT_EQ(config->num_layers, 32);
  EXPECT_EQ(config->num_kv_heads, 8);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->max_position, 131072);
  EXPECT_EQ(config->rope_scaling.kind, RopeScalingKind::kLlama3);
  EXPECT_EQ(config->rope_scaling.original_max_position, 8192);
  EXPECT_EQ(config->dtype, ModelDtype::kBf16);
  EXPECT_FALSE(config->qkv_bias || config->o_bias || config->mlp_bias || config->qk_norm);
  EXPECT_THAT(config->bos_ids, ElementsAre(128000));
  EXPECT_THAT(config->eos_ids, ElementsAre(128001, 128008, 128009, 7));
}

TEST(ModelConfig, ReadsTheLayoutOfTransformers5) {
  json newer = llama31();
  newer["rope_parameters"] = newer["rope_scaling"];
  newer["rope_parameters"]["rope_theta"] = newer["rope_theta"];
  newer["dtype"] = "float16";
  for (const char* old : {"rope_scaling", "rope_theta", "torch_dtype"}) newer.erase(old);
  const auto config = parse_model_config(newer.dump());
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->rope_theta, 500000.0);
  EXPECT_EQ(config->rope_scaling.factor, 8.0);
  EXPECT_EQ(config->dtype, ModelDtype::kF16);
  EXPECT_EQ(rope_inverse_frequencies(*config),
            rope_inverse_frequencies(*parse_model_config(llama31().dump())));
}

TEST(ModelConfig, KnowsWhatEachFamilyAdds) {
  json object = llama31();
  object["attention_bias"] = true;
  object["mlp_bias"] = true;
  const auto read = [&](const char* architecture) {
    object["architectures"] = {architecture};
    return parse_model_config(object.dump()).value_or_throw();
  };
  const ModelConfig llama = read("LlamaForCausalLM");
  EXPECT_TRUE(llama.qkv_bias && llama.o_bias && llama.mlp_bias && !llama.qk_norm);
  const ModelConfig mistral = read("MistralForCausalLM");
  EXPECT_FALSE(mistral.qkv_bias || mistral.o_bias || mistral.mlp_bias || mistral.qk_norm);
  const ModelConfig qwen2 = read("Qwen2ForCausalLM");
  EXPECT_TRUE(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.mlp_bias && !qwen2.qk_norm);
  const ModelConfig qwen3 = read("Qwen3ForCausalLM");
  EXPECT_TRUE(qwen3.qkv_bias && qwen3.o_bias && !qwen3.mlp_bias && qwen3.qk_norm);
}

TEST(ModelConfig, RefusesBadFieldsByName) {
  const struct {
    const char* field;
    json value;
    const char* complaint;
  } cases[] = {
      {"architectures", {"GPT2LMHeadModel"}, "supported: LlamaForCausalLM, MistralForCausalLM"},
      {"architectures", "LlamaForCausalLM", "architectures"},
      {"hidden_size", 0, "hidden_size"},
      {"hidden_size", 1.5, "hidden_size"},
      {"hidden_size", "4096", "hidden_size"},
      {"hidden_size", nullptr, "hidden_size is missing"},
      {"num_hidden_layers", 1 << 30, "num_hidden_layers is 1073741824"},
      {"num_hidden_layers", -1, "num_hidden_layers"},
      {"num_hidden_layers", 18446744073709551615u, "num_hidden_layers"},
      {"num_attention_heads", 7, "num_attention_heads doesn't divide hidden_size"},
      {"num_key_value_heads", 5, "num_key_value_heads doesn't divide"},
      {"head_dim", 127, "head_dim"},
      {"head_dim", 4096, "head_dim"},
      {"rms_norm_eps", 0, "rms_norm_eps"},
      {"rms_norm_eps", "small", "rms_norm_eps"},
      {"rope_theta", -1.0, "rope_theta"},
      {"vocab_size", 128255, "vocab_size"},  // beside eos_token_id 128255, added below
      {"eos_token_id", 128256, "eos_token_id"},
      {"bos_token_id", -1, "bos_token_id"},
      {"hidden_act", "gelu", "hidden_act"},
      {"tie_word_embeddings", 1, "tie_word_embeddings"},
      {"torch_dtype", "float8", "torch_dtype"},
      {"quantization_config", json::object(), "quantization_config"},
      {"partial_rotary_factor", 0.5, "partial_rotary_factor"},
      {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}, "supported: default, linear"},
      {"rope_scaling", {{"type", "linear"}}, "rope_scaling.factor is missing"},
      {"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}, "low_freq_factor is missing"},
      {"rope_scaling", 3, "rope_scaling"},
  };
  for (const auto& bad : cases) {
    json object = llama31();
    object["eos_token_id"] = 128255;
    object[bad.field] = bad.value;
    const auto config = parse_model_config(object.dump());
    if (std::string(bad.field) == "vocab_size") {
      ASSERT_FALSE(config);
      EXPECT_THAT(config.error().message, HasSubstr("eos_token_id is 128255"));
      continue;
    }
    ASSERT_FALSE(config) << bad.field << " = " << bad.value;
    EXPECT_EQ(config.error().code, ErrorCode::kModelFile);
    EXPECT_THAT(config.error().message, HasSubstr(bad.complaint));
    EXPECT_THAT(config.error().message, HasSubstr("config.json"));
  }
}

TEST(ModelConfig, RefusesWhatIsNoPlainObject) {
  EXPECT_FALSE(parse_model_config(""));
  EXPECT_FALSE(parse_model_config("[]"));
  EXPECT_FALSE(parse_model_config(R"({"a": 1, "a": 2})"));
  EXPECT_FALSE(parse_model_config(std::string(100000, '[')));
  EXPECT_THAT(parse_model_config(R"({"x":)" + std::string(20, '[') + std::string(20, ']') + "}")
                  .error()
                  .message,
              HasSubstr("nests deeper"));
}

TEST(ModelConfig, RefusesSlidingWindowsThatWouldCut) {
  json object = llama31();
  object["sliding_window"] = 4096;
  EXPECT_TRUE(parse_model_config(object.dump()));  // Llama has none: the field means nothing
  object["architectures"] = {"MistralForCausalLM"};
  EXPECT_THAT(parse_model_config(object.dump()).error().message, HasSubstr("sliding_window"));
  object["sliding_window"] = nullptr;
  EXPECT_TRUE(parse_model_config(object.dump()));
  object["sliding_window"] = 131072;
  EXPECT_TRUE(parse_model_config(object.dump()));

  object["architectures"] = {"Qwen2ForCausalLM"};
  object["sliding_window"] = 4096;
  EXPECT_TRUE(parse_model_config(object.dump()));  // use_sliding_window is false by default
  object["use_sliding_window"] = true;
  EXPECT_THAT(parse_model_config(object.dump()).error().message, HasSubstr("sliding_window"));
}

// What transformers 4.46.3 gives, in float32, for some pairs of dimensions.
struct Frequency {
  std::size_t pair;
  double expected;
};

void expect_frequencies(const ModelConfig& config, std::initializer_list<Frequency> expected) {
  const std::vector<double> frequencies = rope_inverse_frequencies(config);
  ASSERT_EQ(frequencies.size(), 64u);
  for (const auto& [pair, value] : expected) {
    EXPECT_NEAR(frequencies[pair] / value, 1.0, 1e-6) << "pair " << pair;
  }
}

TEST(ModelConfig, ScalesRopeAsLlama31Does) {
  const auto config = parse_model_config(llama31().dump());
  ASSERT_TRUE(config) << config.error().message;
  expect_frequencies(*config, {{0, 1.0},
                               {20, 0.016560440883040428},
                               {28, 0.0032114461064338684},
                               {30, 0.0013718936825171113},
                               {34, 0.0001785077911335975},
                               {63, 3.068925877869333e-07}});
}

TEST(ModelConfig, StretchesTheContextWithYarn) {
  json object = llama31();
  object["max_position_embeddings"] = 32768;
  object["rope_theta"] = 1000000.0;
  object["rope_scaling"] = {
      {"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}};
  const auto config = parse_model_config(object.dump());
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->max_position, 131072);
  EXPECT_NEAR(config->rope_scaling.attention_factor, 1.138629436111989, 1e-12);
  expect_frequencies(*config, {{0, 1.0},
                               {20, 0.01333521492779255},
                               {26, 0.0031684227287769318},
                               {36, 0.0001798411540221423},
                               {40, 4.4456985051510856e-05},
                               {63, 3.102344408034696e-07}});
}

class ModelFolderTest : public testing::Test {
 protected:
  ModelFolderTest() { fs::create_directories(folder_); }
  ~ModelFolderTest() override { fs::remove_all(folder_); }

  void write(const char* name, const std::string& text) {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }

  // One tensor `w` of 8 KiB, all `fill`.
  void write_weights(char fill) {
    const std::string header = R"({"w":{"dtype":"F32","shape":[2048],"data_offsets":[0,8192]}} )";
    const std::uint64_t length = header.size();
    write("model.safetensors", std::string(reinterpret_cast<const char*>(&length), 8) + header +
                                   std::string(8192, fill));
  }

  const fs::path folder_ =
      fs::path(testing::TempDir()) /
      (std::string("model_") + testing::UnitTest::GetInstance()->current_test_info()->name());
};

TEST_F(ModelFolderTest, ReadsBothFiles) {
  EXPECT_THAT(read_model_config(folder_).error().message, HasSubstr("config.json"));
  write("config.json", llama31().dump());
  ASSERT_TRUE(read_model_config(folder_));
  write("generation_config.json", R"({"eos_token_id": 128010})");
  EXPECT_EQ(read_model_config(folder_)->eos_ids.back(), 128010);
  write("generation_config.json", R"({"eos_token_id": -3})");
  EXPECT_THAT(read_model_config(folder_).error().message,
              HasSubstr("/generation_config.json: eos_token_id is -3"));
}

TEST_F(ModelFolderTest, HashesTellFineTunesApart) {
  write("config.json", llama31().dump());
  write_weights('a');
  const auto first = model_hash(folder_);
  ASSERT_TRUE(first) << first.error().message;
  EXPECT_EQ(first->size(), 64u);
  EXPECT_EQ(*first, *model_hash(folder_));
  write_weights('b');
  const auto second = model_hash(folder_);
  EXPECT_NE(*first, *second);
  write("config.json", llama31().dump(1));
  EXPECT_NE(*second, *model_hash(folder_));
}

}  // namespace
}  // namespace foretoken
