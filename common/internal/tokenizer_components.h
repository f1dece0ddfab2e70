// The components of tokenizer.json around its model. Each throws Exception(kModelFile), naming the
// field, for a kind that isn't supported: see common/tokenizer.h.
#pragma once

#include <vector>

#include "common/ids.h"
#include "common/internal/tokenizer_json.h"
#include "common/internal/tokenizer_normalizer.h"
#include "common/internal/tokenizer_vocabulary.h"
#include "common/internal/tokenizer_words.h"

namespace foretoken::internal {

Normalizer read_normalizer(const JsonField& field);
PreTokenizer read_pre_tokenizer(const JsonField& field);
void check_decoder(const JsonField& field);

// What a post_processor puts around one text.
struct Surroundings {
  std::vector<TokenId> before;
  std::vector<TokenId> after;
};
Surroundings read_post_processor(const JsonField& field, const Vocabulary& vocabulary);

}  // namespace foretoken::internal
