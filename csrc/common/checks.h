// Checks of the ops' arguments that all backends make: the same errors on each.
#pragma once

#include "ep/check.h"
#include "ep/elementwise.h"
#include "tensors.h"

namespace ep {

// What a backend takes.
struct Rules {
  bool (*takes)(ScalarType);  // of floating tensors
  const char* dtypes;         // the same in words
  int64_t storages;           // number of storage codes
  const char* storage;        // the same in words
};

void check_floating(const char* op, const Rules& rules, const char* argument, const Tensor& tensor);
// Raise unless shape; and dtype and device are as given.
void check_shape(const char* op, const char* argument, const Ints& shape, const Ints& expected);
void check_like(const char* op, const char* argument, const Tensor& tensor, const Ints& shape, const Tensor& like);
void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like);
void check_winners(const char* op, const Tensor& winners, const Ints& drive_shape, int64_t batch, const Tensor& like);

// Raise on hyper-parameters out of range or not finite.
void check_dynamics(const char* op, double damping, double slope, double lo, double hi, int64_t form, int64_t phases,
                    int64_t batch);
void check_operands(const char* op, int64_t operands);
void check_finite(const char* op, const char* argument, const Floats& values);

}  // namespace ep
