// 2x2 pooling of one window (pixels 0..3 in row-major order), and its adjoint.
#pragma once

#include "ep/elementwise.h"

namespace ep {

// Whether a later pixel takes the maximum: ties go to the first, NaN wins, as in torch.nn.functional.max_pool2d.
template <typename T>
EP_HD inline bool beats(T challenger, T champion) {
  return (challenger > champion) | (challenger != challenger);
}

// The maximum, and which pixel it is.
template <typename T>
EP_HD inline T largest(T z0, T z1, T z2, T z3, int32_t& index) {
  T best = z0;
  index = beats(z1, best) ? 1 : 0;
  best = beats(z1, best) ? z1 : best;
  index = beats(z2, best) ? 2 : index;
  best = beats(z2, best) ? z2 : best;
  index = beats(z3, best) ? 3 : index;
  return beats(z3, best) ? z3 : best;
}

template <typename T>
EP_HD inline T gathered(uint32_t winner, T z0, T z1, T z2, T z3) {
  const T top = winner == 0 ? z0 : z1;
  const T bottom = winner == 2 ? z2 : z3;
  return winner < 2 ? top : bottom;
}

template <typename T>
EP_HD inline T average(T z0, T z1, T z2, T z3) {
  return (z0 + z1 + z2 + z3) / 4;
}

// What a pixel gets of the pooled value: all of it at the winner.
template <typename T>
EP_HD inline T share_of(uint32_t winner, uint32_t pixel, T value) {
  return winner == pixel ? value : T(0);
}

// The same of average pooling.
template <typename T>
EP_HD inline T average_share(T value) {
  return value / 4;
}

}  // namespace ep
