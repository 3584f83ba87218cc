#include "core/tensors.h"

#include <sys/mman.h>

#include "core/error.h"

namespace qvl {

Tensors::~Tensors() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
}

void Tensors::add(const qvl_tensor& tensor, std::string name) {
  QVL_REQUIRE(indices_.emplace(name, list_.size()).second, QVL_BAD_WEIGHT, "%.200s: given twice",
              name.c_str());
  names_.push_back(std::move(name));
  list_.push_back(tensor);
  list_.back().name = names_.back().c_str();
}

const qvl_tensor* Tensors::find(const std::string& name) const {
  const auto found = indices_.find(name);
  return found != indices_.end() ? &list_[found->second] : nullptr;
}

}  // namespace qvl
