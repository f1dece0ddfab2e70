// A BlockDevice whose units (a slab, a run, a table) lie sealed on the device below: encrypted on
// the way there, opened and proven on the way back. What has no unit passes as it is.
//
// Sealing is done by threads of its own, so that the caller's loop waits for none of it. A unit is
// bound to its offset in the file. A read that does not open ends with kCorrupt.
// Example: tests/kvstore/cipher_test.cc
#pragma once

#include <memory>

#include "kvstore/internal/block_device.h"
#include "kvstore/internal/kv_cipher.h"

namespace foretoken::kvstore {

// `cipher` may be null: then it is the device below itself.
std::unique_ptr<BlockDevice> make_sealing_device(std::unique_ptr<BlockDevice> below,
                                                 std::shared_ptr<const KvCipher> cipher);

}  // namespace foretoken::kvstore
