#include "common/internal/tokenizer_json.h"

#include <cstdint>

#include "common/result.h"

namespace foretoken::internal {

JsonField JsonField::operator[](const std::string& key) const {
  static const nlohmann::json absent;
  const auto found = object().find(key);
  return {found != value_->end() ? &*found : &absent, file_,
          path_.empty() ? key : path_ + "." + key};
}

JsonField JsonField::operator[](std::size_t index) const {
  return {&array().at(index), file_, path_ + "[" + std::to_string(index) + "]"};
}

const nlohmann::json& JsonField::array() const {
  if (!value_->is_array()) fail("it isn't a list");
  return *value_;
}

const nlohmann::json& JsonField::object() const {
  if (!value_->is_object()) fail("it isn't an object");
  return *value_;
}

const std::string& JsonField::string() const {
  if (!value_->is_string()) fail("it isn't a string");
  return value_->get_ref<const std::string&>();
}

std::vector<JsonField> JsonField::elements() const {
  std::vector<JsonField> fields;
  for (std::size_t i = 0; i < array().size(); ++i) fields.push_back((*this)[i]);
  return fields;
}

bool JsonField::boolean() const {
  if (!value_->is_boolean()) fail("it isn't true or false");
  return value_->get<bool>();
}

int JsonField::whole_number(int max) const {
  const bool fits = value_->is_number_unsigned() &&
                    value_->get<std::uint64_t>() <= static_cast<std::uint64_t>(max);
  if (!fits) fail("it isn't a whole number of 0 to " + std::to_string(max));
  return static_cast<int>(value_->get<std::uint64_t>());
}

void JsonField::fail(const std::string& why) const {
  throw Exception(ErrorCode::kModelFile,
                  std::string(file_) + ": " + (path_.empty() ? "" : "field " + path_ + ": ") + why);
}

}  // namespace foretoken::internal
