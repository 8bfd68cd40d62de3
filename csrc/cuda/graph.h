// CUDA graphs of launches, and buffers that several streams use in turn. Each object owns its CUDA objects.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace ep::cuda {

bool capturing(cudaStream_t stream);

// Orders the users of some buffers on the device: each waits for the one before it, whatever its stream.
class Turn {
 public:
  Turn() = default;
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn();  // waits on the host for the last user: what it used may go

  // The stream's turn, from here to the end of the scope.
  class Taken {
   public:
    Taken(Turn& turn, cudaStream_t stream);
    Taken(const Taken&) = delete;
    Taken& operator=(const Taken&) = delete;
    ~Taken();

   private:
    Turn& turn_;
    cudaStream_t stream_;
  };

 private:
  cudaEvent_t last_ = nullptr;
  bool used_ = false;
};

// Launches captured once, replayed on any stream of their device.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph();

  // `issue` launches on the stream that it is given, and neither allocates nor waits. A second capture does nothing.
  void capture(const std::function<void(cudaStream_t)>& issue);
  void replay(cudaStream_t stream) const;

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace ep::cuda
