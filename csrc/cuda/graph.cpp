#include "graph.h"

#include <exception>

#include "runtime.h"

namespace ep::cuda {
namespace {

// Not torch's stream: that may be the legacy default one, which cannot be captured.
class PrivateStream {
 public:
  PrivateStream() { EP_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;
  ~PrivateStream() { cudaStreamDestroy(stream_); }

  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  EP_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

Turn::~Turn() {
  if (last_ == nullptr) return;
  // another thread's capture may forbid waiting, in the mode that torch captures in
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (used_) cudaEventSynchronize(last_);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaEventDestroy(last_);
}

Turn::Taken::Taken(Turn& turn, cudaStream_t stream) : turn_(turn), stream_(stream) {
  if (turn.last_ == nullptr) EP_CUDA_CHECK(cudaEventCreateWithFlags(&turn.last_, cudaEventDisableTiming));
  if (turn.used_) EP_CUDA_CHECK(cudaStreamWaitEvent(stream, turn.last_, 0));
}

Turn::Taken::~Taken() { turn_.used_ |= cudaEventRecord(turn_.last_, stream_) == cudaSuccess; }

Graph::~Graph() {
  if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
}

void Graph::capture(const std::function<void(cudaStream_t)>& issue) {
  if (exec_ != nullptr) return;
  const PrivateStream stream;
  // thread-local: other threads may allocate meanwhile
  EP_CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  std::exception_ptr failed;
  try {
    issue(stream.get());
  } catch (...) {
    failed = std::current_exception();
  }
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream.get(), &graph);
  if (!failed && ended == cudaSuccess) {
    const cudaError_t made = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    EP_CUDA_CHECK(made);
    return;
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (failed) std::rethrow_exception(failed);
  EP_CUDA_CHECK(ended);
}

void Graph::replay(cudaStream_t stream) const { EP_CUDA_CHECK(cudaGraphLaunch(exec_, stream)); }

}  // namespace ep::cuda
