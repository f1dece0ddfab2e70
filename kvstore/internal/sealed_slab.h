// A slab in its slot of an encrypted file: its runs are sealed one by one, and their seals, which
// stand behind the slab, with what else is not run: the checksums. So who has the seal of that (it
// is in the slot's header) can read single runs, and who writes single runs can make a slab of
// them.
//
//   [num_layers] runs                        each bound to its offset in the file, as ...
//   checksums; [num_layers] Seal, one a run  sealed as one: SlotTable's bytes (slot_table.h)
//
// Pure functions; thread-safe. Example: tests/kvstore/cipher_test.cc
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kv_layout.h"
#include "kvstore/internal/kv_cipher.h"

namespace foretoken::kvstore {

// What bytes at this offset of the file are bound to; the reference must live as long as the view.
std::span<const std::byte> place_at(const std::uint64_t& offset);

// In place. `slot`: slot_bytes(slab, true), at `offset` in the file. The seal is the table's.
Seal seal_slab(const KvCipher& cipher, const kernels::KvShape& slab, std::span<std::byte> slot,
               std::uint64_t offset);
// In place. False: some of it was changed, or is another's; the bytes are then anything.
[[nodiscard]] bool open_slab(const KvCipher& cipher, const kernels::KvShape& slab,
                             std::span<std::byte> slot, std::uint64_t offset, const Seal& table);

}  // namespace foretoken::kvstore
