// The CUDA runtime's streams, events and graphs, in CPU memory. Work runs when it is issued; a capture records it.
#include <algorithm>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "host.h"

using ep::cuda::host::counters;
using ep::cuda::host::settings;

using Work = std::function<void()>;
using Nodes = std::set<int>;

// Work in the order of its capture. `before` are the nodes that a node waits for.
struct CUgraph_st {
  struct Node {
    Work work;
    Nodes before;
  };
  std::vector<Node> nodes;
};

struct CUgraphExec_st {
  CUgraph_st graph;
};

struct Capture {
  CUgraph_st* graph;
  cudaStream_t origin;
  std::set<cudaStream_t> streams;  // that take part
  bool invalid = false;
};

struct CUstream_st {
  Capture* capture = nullptr;
  Nodes last;  // what the next work waits for
};

struct CUevent_st {
  Capture* capture = nullptr;  // where it was last recorded
  Nodes last;
};

namespace {

// Handles that are alive; ops come from several threads.
template <typename T>
class Registry {
 public:
  T* add(T* handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    return *handles.insert(handle).first;
  }
  bool has(T* handle) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return handles.count(handle) != 0;
  }
  bool remove(T* handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    return handles.erase(handle) != 0;
  }
  int64_t size() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return static_cast<int64_t>(handles.size());
  }

 private:
  mutable std::mutex mutex;
  std::set<T*> handles;
};

Registry<CUstream_st> streams;
Registry<CUevent_st> events;
Registry<Capture> captures;
Registry<CUgraph_st> graphs;
Registry<CUgraphExec_st> executables;
std::mutex allowed_mutex;
std::unordered_map<const void*, int> allowed_shared;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool known(cudaStream_t stream) { return stream == nullptr || streams.has(stream); }

Capture* capture_of(cudaStream_t stream) { return stream == nullptr ? nullptr : stream->capture; }

cudaError_t invalidate(Capture* capture) {
  capture->invalid = true;
  return result(cudaErrorStreamCaptureUnsupported);
}

cudaError_t issue(cudaStream_t stream, Work work) {
  if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
  Capture* capture = capture_of(stream);
  if (capture == nullptr) {
    work();
    return cudaSuccess;
  }
  if (capture->invalid) return result(cudaErrorStreamCaptureInvalidated);
  capture->graph->nodes.push_back({std::move(work), stream->last});
  stream->last = {static_cast<int>(capture->graph->nodes.size()) - 1};
  return cudaSuccess;
}

// Whether the origin has waited for all work of the capture.
bool joined(const Capture& capture) {
  std::vector<int> open(capture.origin->last.begin(), capture.origin->last.end());
  Nodes seen;
  while (!open.empty()) {
    const int node = open.back();
    open.pop_back();
    if (!seen.insert(node).second) continue;
    const Nodes& before = capture.graph->nodes[node].before;
    open.insert(open.end(), before.begin(), before.end());
  }
  return seen.size() == capture.graph->nodes.size();
}

void end(Capture* capture) {
  for (cudaStream_t stream : capture->streams) {
    stream->capture = nullptr;
    stream->last.clear();
  }
  captures.remove(capture);
  delete capture;
}

// In a reverse order, of the nodes that are ready the last one goes first: a graph must not rely on more than its
// edges.
void replay(const CUgraph_st& graph) {
  const int count = static_cast<int>(graph.nodes.size());
  const bool reverse = settings().order == ep::cuda::host::Order::kReverse;
  std::vector<bool> done(count, false);
  for (int finished = 0; finished < count; ++finished) {
    int next = -1;
    for (int i = 0; i < count && (next < 0 || reverse); ++i) {
      const Nodes& before = graph.nodes[i].before;
      if (!done[i] && std::all_of(before.begin(), before.end(), [&](int node) { return done[node]; })) next = i;
    }
    done[next] = true;
    graph.nodes[next].work();
  }
}

}  // namespace

// ---- errors
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define EP_NAME(name) \
  case name:          \
    return #name
    EP_NAME(cudaSuccess);
    EP_NAME(cudaErrorInvalidValue);
    EP_NAME(cudaErrorMemoryAllocation);
    EP_NAME(cudaErrorInvalidConfiguration);
    EP_NAME(cudaErrorInvalidDevice);
    EP_NAME(cudaErrorInvalidResourceHandle);
    EP_NAME(cudaErrorLaunchFailure);
    EP_NAME(cudaErrorStreamCaptureUnsupported);
    EP_NAME(cudaErrorStreamCaptureInvalidated);
    EP_NAME(cudaErrorStreamCaptureMerge);
    EP_NAME(cudaErrorStreamCaptureUnmatched);
    EP_NAME(cudaErrorStreamCaptureUnjoined);
    EP_NAME(cudaErrorStreamCaptureIsolation);
    EP_NAME(cudaErrorStreamCaptureImplicit);
    EP_NAME(cudaErrorCapturedEvent);
#undef EP_NAME
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "refused by the host run (tests/host/runtime.cpp)";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

// ---- the device
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceSynchronize() {
  return result(captures.size() == 0 ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = settings().processors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings().minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = settings().shared_memory;
      return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

// ---- streams
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = streams.add(new CUstream_st);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!streams.remove(stream)) return result(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    stream->capture->invalid = true;
    stream->capture->streams.erase(stream);
  }
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
  Capture* capture = capture_of(stream);
  return capture == nullptr ? cudaSuccess : invalidate(capture);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!known(stream) || !events.has(event)) return result(cudaErrorInvalidResourceHandle);
  Capture* capture = capture_of(stream);
  if (!captures.has(event->capture)) {  // recorded outside of captures, or in one that has ended
    if (capture != nullptr) return result(cudaErrorStreamCaptureIsolation);
    return result(event->capture == nullptr ? cudaSuccess : cudaErrorCapturedEvent);
  }
  if (stream == nullptr) return result(cudaErrorStreamCaptureImplicit);
  if (capture != nullptr && capture != event->capture) return result(cudaErrorStreamCaptureMerge);
  stream->capture = event->capture;
  stream->capture->streams.insert(stream);
  stream->last.insert(event->last.begin(), event->last.end());
  return cudaSuccess;
}

// ---- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = events.add(new CUevent_st);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!known(stream) || !events.has(event)) return result(cudaErrorInvalidResourceHandle);
  event->capture = capture_of(stream);
  event->last = stream == nullptr ? Nodes() : stream->last;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (!events.has(event)) return result(cudaErrorInvalidResourceHandle);
  return result(event->capture == nullptr ? cudaSuccess : cudaErrorCapturedEvent);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!events.remove(event)) return result(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}

// ---- graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
  if (stream == nullptr || stream->capture != nullptr) return result(cudaErrorStreamCaptureUnsupported);
  stream->capture = captures.add(new Capture{graphs.add(new CUgraph_st), stream, {stream}});
  stream->last.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
  Capture* capture = capture_of(stream);
  if (capture == nullptr) return result(cudaErrorInvalidValue);
  if (capture->origin != stream) return result(cudaErrorStreamCaptureUnmatched);
  const cudaError_t error = capture->invalid    ? cudaErrorStreamCaptureInvalidated
                            : !joined(*capture) ? cudaErrorStreamCaptureUnjoined
                                                : cudaSuccess;
  *graph = error == cudaSuccess ? capture->graph : nullptr;
  if (error != cudaSuccess) cudaGraphDestroy(capture->graph);
  end(capture);
  return result(error);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
  const Capture* capture = capture_of(stream);
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (!graphs.has(graph)) return result(cudaErrorInvalidValue);
  *exec = executables.add(new CUgraphExec_st{*graph});
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!executables.has(exec)) return result(cudaErrorInvalidValue);
  if (!known(stream)) return result(cudaErrorInvalidResourceHandle);
  if (Capture* capture = capture_of(stream)) return invalidate(capture);
  ++counters().graph_launches;
  replay(exec->graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!executables.remove(exec)) return result(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!graphs.remove(graph)) return result(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}

// ---- work
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (to == nullptr && bytes != 0) return result(cudaErrorInvalidValue);
  return issue(stream, [=] {
    ++counters().memsets;
    if (bytes != 0) std::memset(to, value, bytes);
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if ((to == nullptr || from == nullptr) && bytes != 0) return result(cudaErrorInvalidValue);
  return issue(stream, [=] {
    ++counters().copies;
    if (bytes != 0) std::memcpy(to, from, bytes);
  });
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > settings().shared_memory) return result(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  allowed_shared[kernel] = value;
  return cudaSuccess;
}

namespace ep::cuda::host {

std::map<std::string, int64_t> live() {
  return {{"streams", streams.size()},
          {"events", events.size()},
          {"graphs", graphs.size()},
          {"executables", executables.size()}};
}

void issue(cudaStream_t stream, Launch launch) {
  int shared = 48 << 10;
  {
    const std::lock_guard<std::mutex> lock(allowed_mutex);
    shared = std::max(shared, allowed_shared[launch.key]);
  }
  if (launch.grid == 0 || launch.block == 0 || launch.block > 1024) {
    result(cudaErrorInvalidConfiguration);
  } else if (launch.shared > static_cast<size_t>(shared)) {
    result(cudaErrorInvalidValue);
  } else {
    ::issue(stream, [launch = std::move(launch)] { run(launch); });
  }
}

}  // namespace ep::cuda::host
