#include "settled_shapes.h"

#include <algorithm>

namespace cuda_int4 {

SettledShape* SettledShapes::find(const std::vector<int64_t>& key) {
  for (const auto& shape : shapes_)
    if (shape->key == key) {
      shape->last_used = ++now_;
      return shape.get();
    }
  return nullptr;
}

SettledShape& SettledShapes::add(const std::vector<int64_t>& key) {
  if (shapes_.size() == kMaxShapes)
    shapes_.erase(
        std::min_element(shapes_.begin(), shapes_.end(),
                         [](const auto& a, const auto& b) { return a->last_used < b->last_used; }));
  shapes_.push_back(std::make_unique<SettledShape>());
  shapes_.back()->key = key;
  shapes_.back()->last_used = ++now_;
  return *shapes_.back();
}

}  // namespace cuda_int4
