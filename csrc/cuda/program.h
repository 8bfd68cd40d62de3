// A relaxation's signature made runnable: buffers, bound launches, and their CUDA graph.
#pragma once

#include <tuple>

#include "graph.h"
#include "lower.h"
#include "place.h"

namespace ep::cuda {

// States and pre-activations of nodes 1.., drives and winners of each connection, residual [steps, B].
using Outputs = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor>;

class Program {
 public:
  // r: any relaxation of the signature; its tensors are not kept.
  explicit Program(const Relaxation& r);

  // Copies the relaxation's tensors in, runs it on the place's stream and copies the results out; one caller at a time.
  // The second run of a program captures its graph, later ones replay it: by then every kernel is loaded, which within
  // a capture may fail, and what runs only once is spared the capture.
  Outputs run(const Relaxation& r, const Place& place);
  // The same, launched one by one on a stream that the user is capturing. The program may go when this returns: its
  // buffers are of that capture's pool, which lives as long as the user's graph, and which gives their memory only to
  // what comes later in it.
  Outputs run_captured(const Relaxation& r, const Place& place) const;

 private:
  void start(const Device& device, cudaStream_t stream) const;  // up to the blocks
  void issue(const Device& device, cudaStream_t stream) const;
  void replay(const Place& place);
  Outputs results(const Relaxation& r, cudaStream_t stream) const;

  Buffers buffers_;
  Lowered lowered_;
  Graph head_, block_, tail_;
  int64_t runs_ = 0;
  Turn turn_;  // the first to go: it waits for the last run
};

}  // namespace ep::cuda
