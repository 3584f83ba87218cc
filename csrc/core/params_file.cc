// Reader of Paddle's parameter file, which the plugin's artifact/params_file.py writes. The tensors' names
// and qvl_dtype are in a field that Paddle skips:
//   file:     records, one for each tensor
//   record:   uint32 0, uint64 0, uint32 0, int32 length of the message, message, data
//   message:  Paddle's TensorDesc in Protobuf's encoding, with the field as its last part:
//             tag 0x08, code of the data type; for each dimension tag 0x10, length; tag 0x7A, length of the
//             field, field
//   field:    "qvl1", uint8 qvl_dtype, uint8 n_dims, uint16 length of the name, n_dims x int64, name,
//             padding with zeros
// All numbers are little-endian; those of the message outside the field are varints. The padding aligns the
// data to 64 bytes in the file. The file may be damaged or malicious: Cursor checks the bounds of every read.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/pack.h"
#include "core/tensors.h"

namespace qvl {
namespace {

struct Damaged {};  // caught by read_records, which adds the path

// Bounded cursor over a part of the file.
class Cursor {
 public:
  Cursor(const unsigned char* at, uint64_t n) : at_(at), remaining_(n) {}

  uint64_t remaining() const { return remaining_; }

  // Read n bytes: return a cursor over them and advance.
  Cursor take(uint64_t n) {
    if (n > remaining_) throw Damaged();
    const Cursor taken(at_, n);
    at_ += n;
    remaining_ -= n;
    return taken;
  }

  const unsigned char* data() const { return at_; }

  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }

  // A varint of at most 63 bits, so that it fits int64_t.
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      const auto byte = number<uint8_t>();
      value |= uint64_t{byte & 127U} << shift;
      if (byte < 128) return value;
    }
    throw Damaged();
  }

 private:
  const unsigned char* at_;
  uint64_t remaining_;
};

// Product of `factor` and n dimensions; throws if a dimension is below 1 or the product is too large.
uint64_t product(const int64_t* dims, int n, uint64_t factor) {
  uint64_t result = factor;
  for (int i = 0; i < n; ++i) {
    if (dims[i] < 1 || __builtin_mul_overflow(result, static_cast<uint64_t>(dims[i]), &result) ||
        result > uint64_t{PTRDIFF_MAX}) {
      throw Damaged();
    }
  }
  return result;
}

// Paddle's code for a type (VarType in Paddle's framework.proto), and the size of a value in bytes. All types
// but the three float types are stored as uint8, code 20.
struct PaddleType {
  uint64_t code;
  uint64_t bytes;
};

PaddleType paddle_type(qvl_dtype dtype) {
  if (dtype == QVL_FLOAT32) return {5, 4};
  if (dtype == QVL_FLOAT16) return {4, 2};
  if (dtype == QVL_BFLOAT16) return {22, 2};
  return {20, 1};
}

// Parse this engine's field: the tensor, without its data, and its name.
qvl_tensor read_field(Cursor field, std::string* name) {
  if (std::memcmp(field.take(4).data(), "qvl1", 4) != 0) throw Damaged();
  qvl_tensor tensor{};
  tensor.device = QVL_DEVICE_CPU;
  tensor.dtype = field.number<uint8_t>();
  tensor.n_dims = field.number<uint8_t>();
  const auto name_length = field.number<uint16_t>();
  if (tensor.dtype >= QVL_DTYPES || tensor.n_dims < 1 || tensor.n_dims > 4) throw Damaged();
  for (int i = 0; i < tensor.n_dims; ++i) tensor.shape[i] = field.number<int64_t>();
  const Cursor text = field.take(name_length);
  name->assign(reinterpret_cast<const char*>(text.data()), text.remaining());
  if (name->empty()) throw Damaged();
  for (const char c : *name) {
    if (c <= ' ' || c > '~') throw Damaged();  // error messages contain names, which must be printable
  }
  const auto inner = product(tensor.shape + 1, tensor.n_dims - 1, 1);
  product(tensor.shape, 1, inner);  // throws if the number of values overflows
  tensor.bytes = packed_bytes(tensor.dtype, tensor.shape[0], static_cast<int64_t>(inner));
  if (tensor.bytes == 0) throw Damaged();
  return tensor;
}

// Parse the tensor of a message; return false if it lacks this engine's field.
bool read_message(Cursor message, qvl_tensor* tensor, std::string* name) {
  if (message.number<uint8_t>() != 0x08) throw Damaged();
  const uint64_t code = message.varint();
  uint64_t values = 1;
  bool has_field = false;  // the field must be the last part of the message
  while (message.remaining() > 0) {
    const auto tag = message.number<uint8_t>();
    if (tag == 0x10 && !has_field) {
      const auto dim = static_cast<int64_t>(message.varint());
      values = product(&dim, 1, values);
    } else if (tag == 0x7A && !has_field) {
      *tensor = read_field(message.take(message.varint()), name);
      has_field = true;
    } else {
      throw Damaged();
    }
  }
  if (!has_field) return false;
  const PaddleType type = paddle_type(tensor->dtype);
  if (code != type.code || tensor->bytes % type.bytes != 0 || values != tensor->bytes / type.bytes) {
    throw Damaged();
  }
  return true;
}

// Add the tensors of all records.
void read_records(const char* path, Cursor file, Tensors* tensors) {
  const unsigned char* const begin = file.data();
  while (file.remaining() > 0) {
    const auto start = static_cast<unsigned long long>(file.data() - begin);
    qvl_tensor tensor;
    std::string name;
    bool has_name;
    try {
      static const unsigned char zeros[16] = {};
      if (std::memcmp(file.take(sizeof zeros).data(), zeros, sizeof zeros) != 0) throw Damaged();
      const auto length = file.number<int32_t>();
      if (length < 2) throw Damaged();
      has_name = read_message(file.take(static_cast<uint64_t>(length)), &tensor, &name);
      if (has_name) {
        if ((file.data() - begin) % 64 != 0) throw Damaged();
        tensor.data = file.take(tensor.bytes).data();
      }
    } catch (const Damaged&) {
      fail(QVL_BAD_WEIGHT, "%.300s: damaged at byte %llu; export again", path, start);
    }
    QVL_REQUIRE(has_name, QVL_BAD_WEIGHT,
                "%.300s: does not name its tensors, as exports of an earlier version; export again", path);
    tensors->add(tensor, std::move(name));
  }
}

}  // namespace

std::shared_ptr<const Tensors> map_params_file(const char* path) {
  auto tensors = std::make_shared<Tensors>();
  // O_NONBLOCK: opening a named pipe, which is refused below, does not wait for a writer.
  struct Descriptor {
    int number;
    ~Descriptor() {
      if (number >= 0) close(number);
    }
  } file{open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  QVL_REQUIRE(file.number >= 0, QVL_INVALID, "%.300s: %s", path, std::strerror(errno));
  struct stat status;
  QVL_REQUIRE(fstat(file.number, &status) == 0, QVL_INVALID, "%.300s: %s", path, std::strerror(errno));
  QVL_REQUIRE(S_ISREG(status.st_mode), QVL_INVALID, "%.300s: is not a file", path);
  QVL_REQUIRE(status.st_size > 0, QVL_BAD_WEIGHT, "%.300s: is empty; export again", path);
  const auto bytes = static_cast<size_t>(status.st_size);
  void* const mapping = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.number, 0);
  QVL_REQUIRE(mapping != MAP_FAILED, QVL_NO_MEMORY, "%.300s: cannot be mapped: %s", path,
              std::strerror(errno));
  tensors->mapping_ = mapping;
  tensors->mapped_bytes_ = bytes;
  read_records(path, Cursor(static_cast<const unsigned char*>(mapping), bytes), tensors.get());
  return tensors;
}

}  // namespace qvl
