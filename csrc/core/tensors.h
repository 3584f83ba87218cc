// Named tensors shared by engines, in the caller's memory or mapped from an exported stage's parameter file.
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

  // Fails on a duplicate name.
  void add(const qvl_tensor& tensor, std::string name);

  // NULL if the name is unknown.
  const qvl_tensor* find(const std::string& name) const;

  const std::vector<qvl_tensor>& list() const { return list_; }

 private:
  friend std::shared_ptr<const Tensors> map_params_file(const char* path);

  std::vector<qvl_tensor> list_;
  std::deque<std::string> names_;  // storage of the names in list_
  std::unordered_map<std::string, size_t> places_;
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// Map a parameter file; the format is described in paddlemix_qwenvl_plugin/artifact/params_file.py.
std::shared_ptr<const Tensors> map_params_file(const char* path);

}  // namespace qvl
