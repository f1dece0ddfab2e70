#include "kvstore/internal/protocol.h"

#include <cstring>
#include <limits>
#include <msgpack.hpp>

#include "common/check.h"

namespace foretoken::kvstore {
namespace {

enum Kind : int {
  kHello = 1,
  kReserve = 2,
  kUse = 3,
  kCommit = 4,
  kRelease = 5,
  kStat = 6,
  kGoodbye = 7,
  kDistrust = 8,
  kNvmeFaults = 9,
  kFindWeights = 10,
  kKeepWeights = 11,
  kWeightsFilled = 12,
  kPublish = 13,
  kRefute = 14,
  kPrefillTimes = 15,
  kFindKey = 16,
  kError = 64,
  kWelcome = 65,
  kGrant = 66,
  kStatReply = 67,
  kWeightMemory = 68,
  kFileKey = 69,
};

constexpr auto kInt64Max = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxTextBytes = 1024;

// ---- writing ----------------------------------------------------------------------------------

class Writer {
 public:
  Writer(Kind kind, std::uint32_t num_fields) : packer_(buffer_) {
    packer_.pack_array(num_fields + 1);
    packer_.pack(static_cast<int>(kind));
  }
  Writer& integer(std::int64_t value) {
    packer_.pack(value);
    return *this;
  }
  Writer& id(std::uint64_t value) {
    packer_.pack(value);
    return *this;
  }
  Writer& text(std::string_view value) {
    value = value.substr(0, kMaxTextBytes);
    packer_.pack_str(static_cast<std::uint32_t>(value.size()));
    packer_.pack_str_body(value.data(), static_cast<std::uint32_t>(value.size()));
    return *this;
  }
  template <typename T>  // plain values, as they lie in memory (little-endian)
  Writer& binary(const T* data, std::size_t count) {
    const auto bytes = static_cast<std::uint32_t>(count * sizeof(T));
    packer_.pack_bin(bytes);
    packer_.pack_bin_body(reinterpret_cast<const char*>(data), bytes);
    return *this;
  }
  std::string finish() const { return {buffer_.data(), buffer_.size()}; }

 private:
  msgpack::sbuffer buffer_;
  msgpack::packer<msgpack::sbuffer> packer_;
};

struct RequestWriter {
  std::string operator()(const Hello& hello) const {
    const auto& [version, owner, model] = hello;
    return Writer(kHello, 11)
        .integer(version)
        .integer(owner.group)
        .integer(owner.rank)
        .integer(raw(owner.epoch))
        .integer(owner.first_head)
        .integer(owner.num_heads)
        .text(model.model_hash)
        .integer(model.total_kv_heads)
        .integer(model.num_layers)
        .integer(model.head_dim)
        .integer(static_cast<int>(model.kv_type))
        .finish();
  }
  std::string operator()(const Reserve& reserve) const {
    return Writer(kReserve, 3)
        .id(raw(reserve.sequence))
        .integer(reserve.num_segments)
        .binary(reserve.keys.data(), reserve.keys.size())
        .finish();
  }
  std::string operator()(const Use& use) const {
    return Writer(kUse, 2).id(raw(use.sequence)).integer(use.hit_segments).finish();
  }
  std::string operator()(const Commit& commit) const {
    return Writer(kCommit, 3)
        .id(raw(commit.sequence))
        .integer(commit.segment)
        .binary(&commit.key, 1)
        .finish();
  }
  std::string operator()(const Release& release) const {
    return Writer(kRelease, 1).id(raw(release.sequence)).finish();
  }
  std::string operator()(const StatRequest&) const { return Writer(kStat, 0).finish(); }
  std::string operator()(const FindKey&) const { return Writer(kFindKey, 0).finish(); }
  std::string operator()(const Distrust& distrust) const {
    return Writer(kDistrust, 1).id(raw(distrust.sequence)).finish();
  }
  std::string operator()(const NvmeFaults& faults) const {
    return Writer(kNvmeFaults, 2)
        .integer(faults.io_errors)
        .integer(faults.checksum_failures)
        .finish();
  }
  std::string operator()(const PrefillTimes& times) const {
    return Writer(kPrefillTimes, 4)
        .integer(times.computed)
        .integer(times.computing.count())
        .integer(times.read)
        .integer(times.reading.count())
        .finish();
  }
  std::string operator()(const Goodbye&) const { return Writer(kGoodbye, 0).finish(); }
  std::string operator()(const FindWeights& find) const {
    return Writer(kFindWeights, 2).integer(find.version).text(find.model_hash).finish();
  }
  std::string operator()(const KeepWeights& keep) const {
    return Writer(kKeepWeights, 3)
        .integer(keep.version)
        .text(keep.model_hash)
        .id(keep.bytes)
        .finish();
  }
  std::string operator()(const WeightsFilled&) const { return Writer(kWeightsFilled, 0).finish(); }
  std::string operator()(const Publish& publish) const {
    return Writer(kPublish, 5)
        .id(raw(publish.sequence))
        .integer(publish.segment)
        .binary(&publish.key, 1)
        .binary(publish.digests.data(), publish.digests.size())
        .binary(publish.seals.data(), publish.seals.size())
        .finish();
  }
  std::string operator()(const Refute& refute) const {
    return Writer(kRefute, 3)
        .id(raw(refute.sequence))
        .integer(refute.head)
        .integer(refute.segment)
        .finish();
  }
};

struct ReplyWriter {
  std::string operator()(const Error& error) const {
    return Writer(kError, 2).text(error_code_name(error.code)).text(error.message).finish();
  }
  std::string operator()(const Welcome& welcome) const {
    return Writer(kWelcome, 3)
        .id(welcome.slab_bytes)
        .integer(welcome.slabs_per_head)
        .integer(welcome.encrypts_nvme ? 1 : 0)
        .finish();
  }
  std::string operator()(const Grant& grant) const {
    return Writer(kGrant, 5)
        .binary(grant.head_hits.data(), grant.head_hits.size())
        .binary(grant.slabs.data(), grant.slabs.size())
        .id(grant.slots_offset)
        .binary(grant.slots.data(), grant.slots.size())
        .id(grant.file_id)
        .finish();
  }
  std::string operator()(const StoreStat& stat) const {
    return Writer(kStatReply, 24)
        .integer(stat.slabs_total)
        .integer(stat.slabs_ready)
        .integer(stat.slabs_free)
        .integer(stat.slabs_used)
        .integer(stat.slabs_cached)
        .integer(stat.hits)
        .integer(stat.misses)
        .integer(stat.evictions)
        .integer(stat.leases)
        .integer(stat.sequences)
        .integer(stat.bad_requests)
        .integer(static_cast<int>(stat.nvme.state))
        .integer(stat.nvme.slabs_total)
        .integer(stat.nvme.slabs_held)
        .integer(stat.nvme.slabs_read)
        .integer(stat.nvme.slabs_written)
        .integer(stat.nvme.bytes_read)
        .integer(stat.nvme.bytes_written)
        .integer(stat.nvme.evictions)
        .integer(stat.nvme.dropped)
        .integer(stat.nvme.io_errors)
        .integer(stat.nvme.checksum_failures)
        .integer(stat.nvme.host_checksum_failures)
        .integer(stat.nvme.tokens_passed_over)
        .finish();
  }
  std::string operator()(const WeightMemory& memory) const {
    return Writer(kWeightMemory, 1).id(memory.bytes).finish();
  }
  std::string operator()(const FileKey& key) const {
    return Writer(kFileKey, 1).integer(static_cast<int>(key.cipher)).finish();
  }
};

// ---- reading ----------------------------------------------------------------------------------

// Walks the fields of a message. The first thing wrong is kept, and all later reads give zeros.
class Reader {
 public:
  explicit Reader(std::string_view bytes) { parse(bytes); }

  std::int64_t integer(const char* field, std::int64_t least, std::int64_t most) {
    const msgpack::object* object = next(field);
    if (object == nullptr) return 0;
    std::int64_t value = 0;
    if (object->type == msgpack::type::NEGATIVE_INTEGER) {
      value = object->via.i64;
    } else if (object->type == msgpack::type::POSITIVE_INTEGER &&
               object->via.u64 <= static_cast<std::uint64_t>(kInt64Max)) {
      value = static_cast<std::int64_t>(object->via.u64);
    } else {
      return fail(field, "is no integer"), 0;
    }
    if (value < least || value > most) return fail(field, "is out of range"), 0;
    return value;
  }
  int small(const char* field, int least, int most) {
    return static_cast<int>(integer(field, least, most));
  }
  std::int64_t counter(const char* field) { return integer(field, 0, kInt64Max); }
  std::uint64_t id(const char* field) {
    const msgpack::object* object = next(field);
    if (object == nullptr) return 0;
    if (object->type != msgpack::type::POSITIVE_INTEGER) return fail(field, "is no id"), 0;
    return object->via.u64;
  }
  std::string text(const char* field, std::size_t max_bytes) {
    const msgpack::object* object = next(field);
    if (object == nullptr) return {};
    if (object->type != msgpack::type::STR) return fail(field, "is no text"), "";
    if (object->via.str.size > max_bytes) return fail(field, "is too long"), "";
    return {object->via.str.ptr, object->via.str.size};
  }
  template <typename T>
  std::vector<T> binary(const char* field, std::size_t min_count, std::size_t max_count) {
    const msgpack::object* object = next(field);
    if (object == nullptr) return {};
    if (object->type != msgpack::type::BIN) return fail(field, "is no binary"), std::vector<T>{};
    const std::size_t bytes = object->via.bin.size;
    const std::size_t count = bytes / sizeof(T);
    if (bytes % sizeof(T) != 0 || count < min_count || count > max_count) {
      return fail(field, "has the wrong size"), std::vector<T>{};
    }
    std::vector<T> values(count);
    if (bytes > 0) std::memcpy(values.data(), object->via.bin.ptr, bytes);
    return values;
  }

  // The message, if all of it was read and nothing was wrong.
  template <typename Any, typename Message>
  Result<Any> finish(Message message) {
    if (error_.empty() && next_ != handle_.get().via.array.size) fail("message", "has more fields");
    if (!error_.empty()) return error();
    return Any(std::move(message));
  }
  template <typename Message>
  Result<Message> unknown_kind() {
    fail("kind", "is unknown");
    return error();
  }

 private:
  void parse(std::string_view bytes) {
    if (bytes.size() > kMaxMessageBytes) return fail("message", "is too large");
    try {
      // Nesting: the array and its scalars. No maps, and no extension types.
      const msgpack::unpack_limit limit(32, 0, kMaxTextBytes, kMaxMessageBytes, 0, 2);
      std::size_t offset = 0;
      handle_ = msgpack::unpack(
          bytes.data(), bytes.size(), offset,
          [](msgpack::type::object_type, std::size_t, void*) { return false; }, nullptr, limit);
      if (offset != bytes.size()) return fail("message", "has bytes after its end");
    } catch (const std::exception& error) {
      return fail("message", error.what());
    }
    if (handle_.get().type != msgpack::type::ARRAY) return fail("message", "is no array");
  }

  const msgpack::object* next(const char* field) {
    if (!error_.empty()) return nullptr;
    const msgpack::object_array& array = handle_.get().via.array;
    if (next_ >= array.size) return fail(field, "is missing"), nullptr;
    return &array.ptr[next_++];
  }
  void fail(const char* field, const char* why) {
    if (error_.empty()) error_ = std::string("store protocol: ") + field + " " + why;
  }
  Error error() const { return {ErrorCode::kCorrupt, error_}; }

  msgpack::object_handle handle_;
  std::uint32_t next_ = 0;
  std::string error_;
};

int read_version(Reader& reader) {
  return reader.small("version", 0, std::numeric_limits<int>::max());
}

Hello read_hello(Reader& reader) {
  Hello hello;
  hello.version = read_version(reader);
  LeaseOwner& owner = hello.owner;
  owner.group = reader.small("group", 0, kMaxGroups - 1);
  owner.rank = reader.small("rank", 0, kMaxRanks - 1);
  owner.epoch = Epoch{static_cast<std::uint32_t>(
      reader.integer("epoch", 0, std::numeric_limits<std::uint32_t>::max()))};
  owner.first_head = reader.small("first_head", 0, kMaxHeads - 1);
  owner.num_heads = reader.small("num_heads", 1, kMaxHeads);
  ModelIdentity& model = hello.model;
  model.model_hash = reader.text("model_hash", kMaxModelHashBytes);
  model.total_kv_heads = reader.small("total_kv_heads", 1, kMaxHeads);
  model.num_layers = reader.small("num_layers", 1, kMaxLayers);
  model.head_dim = reader.small("head_dim", 1, kMaxHeadDim);
  model.kv_type = static_cast<kernels::DataType>(
      reader.small("kv_type", static_cast<int>(kernels::DataType::kFp16),
                   static_cast<int>(kernels::DataType::kBf16)));
  return hello;
}

Reserve read_reserve(Reader& reader) {
  Reserve reserve;
  reserve.sequence = SequenceId{reader.id("sequence")};
  reserve.num_segments = reader.small("num_segments", 1, kMaxSegments);
  reserve.keys = reader.binary<PrefixKey>("keys", 0, kMaxSegments);
  return reserve;
}

PrefixKey read_key(Reader& reader) {
  const auto key = reader.binary<PrefixKey>("key", 1, 1);
  return key.empty() ? PrefixKey{} : key.front();
}

Commit read_commit(Reader& reader) {
  Commit commit;
  commit.sequence = SequenceId{reader.id("sequence")};
  commit.segment = reader.small("segment", 0, kMaxSegments - 1);
  commit.key = read_key(reader);
  return commit;
}

Publish read_publish(Reader& reader) {
  Publish publish;
  publish.sequence = SequenceId{reader.id("sequence")};
  publish.segment = reader.small("segment", 0, kMaxSegments - 1);
  publish.key = read_key(reader);
  publish.digests = reader.binary<std::uint64_t>("digests", 1, kMaxHeads);
  publish.seals = reader.binary<Seal>("seals", 0, kMaxHeads);
  return publish;
}

Refute read_refute(Reader& reader) {
  Refute refute;
  refute.sequence = SequenceId{reader.id("sequence")};
  refute.head = reader.small("head", 0, kMaxHeads - 1);
  refute.segment = reader.small("segment", 0, kMaxSegments - 1);
  return refute;
}

// Bounded, so that the store can add them up.
NvmeFaults read_faults(Reader& reader) {
  constexpr std::int64_t kMost = std::numeric_limits<std::uint32_t>::max();
  NvmeFaults faults;
  faults.io_errors = reader.integer("io_errors", 0, kMost);
  faults.checksum_failures = reader.integer("checksum_failures", 0, kMost);
  return faults;
}

PrefillTimes read_times(Reader& reader) {
  const auto time = [&](const char* field) {
    return std::chrono::microseconds(reader.counter(field));
  };
  PrefillTimes times;
  times.computed = reader.counter("computed");
  times.computing = time("computing");
  times.read = reader.counter("read");
  times.reading = time("reading");
  return times;
}

FindWeights read_find(Reader& reader) {
  FindWeights find;
  find.version = read_version(reader);
  find.model_hash = reader.text("model_hash", kMaxModelHashBytes);
  return find;
}

KeepWeights read_keep(Reader& reader) {
  KeepWeights keep;
  keep.version = read_version(reader);
  keep.model_hash = reader.text("model_hash", kMaxModelHashBytes);
  keep.bytes = reader.id("bytes");
  return keep;
}

Error read_error(Reader& reader) {
  const auto code = error_code_from_name(reader.text("code", kMaxTextBytes));
  return {code.value_or(ErrorCode::kInternal), reader.text("message", kMaxTextBytes)};
}

Grant read_grant(Reader& reader) {
  Grant grant;
  grant.head_hits = reader.binary<int>("head_hits", 1, kMaxHeads);
  grant.slabs = reader.binary<SlabIndex>("slabs", 1, kMaxGrantSlabs);
  grant.slots_offset = reader.id("slots_offset");
  grant.slots = reader.binary<SlotIndex>("slots", 0, kMaxGrantSlabs);
  grant.file_id = reader.id("file_id");
  return grant;
}

NvmeStat read_nvme(Reader& reader) {
  NvmeStat stat;
  stat.state = static_cast<NvmeState>(reader.small("nvme state", static_cast<int>(NvmeState::kOff),
                                                   static_cast<int>(NvmeState::kOffline)));
  stat.slabs_total = reader.counter("nvme slabs_total");
  stat.slabs_held = reader.counter("nvme slabs_held");
  stat.slabs_read = reader.counter("nvme slabs_read");
  stat.slabs_written = reader.counter("nvme slabs_written");
  stat.bytes_read = reader.counter("nvme bytes_read");
  stat.bytes_written = reader.counter("nvme bytes_written");
  stat.evictions = reader.counter("nvme evictions");
  stat.dropped = reader.counter("nvme dropped");
  stat.io_errors = reader.counter("nvme io_errors");
  stat.checksum_failures = reader.counter("nvme checksum_failures");
  stat.host_checksum_failures = reader.counter("nvme host_checksum_failures");
  stat.tokens_passed_over = reader.counter("nvme tokens_passed_over");
  return stat;
}

StoreStat read_stat(Reader& reader) {
  StoreStat stat;
  stat.slabs_total = reader.counter("slabs_total");
  stat.slabs_ready = reader.counter("slabs_ready");
  stat.slabs_free = reader.counter("slabs_free");
  stat.slabs_used = reader.counter("slabs_used");
  stat.slabs_cached = reader.counter("slabs_cached");
  stat.hits = reader.counter("hits");
  stat.misses = reader.counter("misses");
  stat.evictions = reader.counter("evictions");
  stat.leases = reader.counter("leases");
  stat.sequences = reader.counter("sequences");
  stat.bad_requests = reader.counter("bad_requests");
  stat.nvme = read_nvme(reader);
  return stat;
}

}  // namespace

std::string encode(const Request& request) { return std::visit(RequestWriter{}, request); }
std::string encode(const Reply& reply) { return std::visit(ReplyWriter{}, reply); }

Result<Request> decode_request(std::string_view bytes) {
  Reader reader(bytes);
  switch (reader.small("kind", 0, 127)) {
    case kHello:
      return reader.finish<Request>(read_hello(reader));
    case kReserve:
      return reader.finish<Request>(read_reserve(reader));
    case kUse: {
      const SequenceId sequence{reader.id("sequence")};
      return reader.finish<Request>(Use{sequence, reader.small("hit_segments", 0, kMaxSegments)});
    }
    case kCommit:
      return reader.finish<Request>(read_commit(reader));
    case kRelease:
      return reader.finish<Request>(Release{SequenceId{reader.id("sequence")}});
    case kStat:
      return reader.finish<Request>(StatRequest{});
    case kFindKey:
      return reader.finish<Request>(FindKey{});
    case kDistrust:
      return reader.finish<Request>(Distrust{SequenceId{reader.id("sequence")}});
    case kNvmeFaults:
      return reader.finish<Request>(read_faults(reader));
    case kGoodbye:
      return reader.finish<Request>(Goodbye{});
    case kFindWeights:
      return reader.finish<Request>(read_find(reader));
    case kKeepWeights:
      return reader.finish<Request>(read_keep(reader));
    case kWeightsFilled:
      return reader.finish<Request>(WeightsFilled{});
    case kPublish:
      return reader.finish<Request>(read_publish(reader));
    case kRefute:
      return reader.finish<Request>(read_refute(reader));
    case kPrefillTimes:
      return reader.finish<Request>(read_times(reader));
    default:
      return reader.unknown_kind<Request>();
  }
}

Result<Reply> decode_reply(std::string_view bytes) {
  Reader reader(bytes);
  switch (reader.small("kind", 0, 127)) {
    case kError:
      return reader.finish<Reply>(read_error(reader));
    case kWelcome: {
      const std::uint64_t slab_bytes = reader.id("slab_bytes");
      const auto slabs =
          reader.integer("slabs_per_head", 1, std::numeric_limits<std::uint32_t>::max());
      const bool encrypts = reader.small("encrypts_nvme", 0, 1) == 1;
      return reader.finish<Reply>(Welcome{slab_bytes, static_cast<std::uint32_t>(slabs), encrypts});
    }
    case kGrant:
      return reader.finish<Reply>(read_grant(reader));
    case kStatReply:
      return reader.finish<Reply>(read_stat(reader));
    case kWeightMemory:
      return reader.finish<Reply>(WeightMemory{reader.id("bytes")});
    case kFileKey:
      return reader.finish<Reply>(FileKey{
          static_cast<CipherKind>(reader.small("cipher", static_cast<int>(CipherKind::kAes256Gcm),
                                               static_cast<int>(CipherKind::kXChaCha20Poly1305)))});
    default:
      return reader.unknown_kind<Reply>();
  }
}

}  // namespace foretoken::kvstore
