// Host memory that other processes map: what the machine can give, memory that no name leads to,
// and its pages before anybody needs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/result.h"
#include "kvstore/internal/file_descriptor.h"

namespace foretoken::kvstore {

// Bytes: the kernel's MemAvailable, or what is left in our control group where that is less. What
// can't be read does not bound. So that memory is refused at the start instead of the process being
// killed when it fills.
std::uint64_t available_host_memory();

// The limit of the control group in this folder (of either version), less what it holds but for
// files' pages, which give way.
std::uint64_t left_in_control_group(const std::string& folder);

// A memfd of this size for good: sealed against shrinking and growing. `name` is what /proc shows;
// nobody opens it by that, and only our user by /proc. Error: kIo.
Result<FileDescriptor> make_shared_memory(const char* name, std::size_t bytes);

// Further seals (fcntl's F_SEAL_*). Error: kIo; F_SEAL_WRITE while somebody has it mapped to write.
Status seal(const FileDescriptor& memory, int seals);

// Huge pages where shared memory has them; elsewhere no harm. Of a mapping, before it is touched.
void prefer_huge_pages(std::byte* begin, std::size_t bytes);

// Makes the kernel back the bytes with memory, without writing to them. False, with errno: there is
// none.
bool populate(std::byte* begin, std::size_t bytes);

}  // namespace foretoken::kvstore
