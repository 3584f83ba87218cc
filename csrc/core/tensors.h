// Named tensors that engines share. The tensors' data is in the caller's memory or in a mapped parameter
// file.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "qwenvl.h"

namespace qvl {

class Tensors {
 public:
  Tensors() = default;
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors();

  // Add a tensor; its data is not copied. Throws QVL_BAD_WEIGHT if the name exists.
  void add(const qvl_tensor& tensor, std::string name);

  // Tensor with this name; NULL if there is none.
  const qvl_tensor* find(const std::string& name) const;

  const std::vector<qvl_tensor>& list() const { return list_; }

 private:
  friend std::shared_ptr<const Tensors> map_params_file(const char* path);

  std::vector<qvl_tensor> list_;
  std::deque<std::string> names_;  // storage of the names in list_
  std::unordered_map<std::string, size_t> indices_;
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// Map a parameter file; core/params_file.cc describes the format. Throws QVL_INVALID if the path cannot be
// opened or is not a file, QVL_BAD_WEIGHT if the file is damaged, QVL_NO_MEMORY if it cannot be mapped.
std::shared_ptr<const Tensors> map_params_file(const char* path);

}  // namespace qvl
