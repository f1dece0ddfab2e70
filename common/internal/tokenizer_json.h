// JsonField: a value in tokenizer.json and the way to it, so that an error can name the field.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace foretoken::internal {

// Refers to a document that must outlive it. Members throw Exception(kModelFile) where the value
// isn't what they ask for: "tokenizer.json: field model.merges[3]: ...".
class JsonField {
 public:
  JsonField(const nlohmann::json& value, std::string_view file) : value_(&value), file_(file) {}

  // A member that is absent reads as null.
  JsonField operator[](const std::string& key) const;
  JsonField operator[](std::size_t index) const;

  bool is_null() const { return value_->is_null(); }
  const nlohmann::json& json() const { return *value_; }
  const nlohmann::json& array() const;
  const nlohmann::json& object() const;
  const std::string& string() const;
  std::vector<JsonField> elements() const;

  bool boolean() const;
  bool boolean_or(bool absent) const { return is_null() ? absent : boolean(); }
  // Error where it isn't a whole number of 0 to max.
  int whole_number(int max) const;
  // The member "type". Error where there is none.
  const std::string& type() const { return (*this)["type"].string(); }

  [[noreturn]] void fail(const std::string& why) const;

 private:
  JsonField(const nlohmann::json* value, std::string_view file, std::string path)
      : value_(value), file_(file), path_(std::move(path)) {}

  const nlohmann::json* value_;
  std::string_view file_;
  std::string path_;  // "model.merges[3]"; empty for the whole file
};

}  // namespace foretoken::internal
