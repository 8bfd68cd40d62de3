#include "program.h"

namespace ep::cuda {

Program::Program(const Relaxation& r) : buffers_(r), lowered_(lower(r, buffers_)) {}

void Program::start(const Device& device, cudaStream_t stream) const {
  launch(buffers_.start(), stream);
  launch(lowered_.head, device, stream);
}

void Program::issue(const Device& device, cudaStream_t stream) const {
  start(device, stream);
  for (int64_t i = 0; i < lowered_.repeats; ++i) launch(lowered_.block, device, stream);
  launch(lowered_.tail, device, stream);
}

void Program::replay(const Place& place) {
  const Device& device = place.device();
  head_.capture([&](cudaStream_t own) { start(device, own); });
  head_.replay(place.stream());
  if (lowered_.repeats == 0) return;
  block_.capture([&](cudaStream_t own) { launch(lowered_.block, device, own); });
  tail_.capture([&](cudaStream_t own) { launch(lowered_.tail, device, own); });
  for (int64_t i = 0; i < lowered_.repeats; ++i) block_.replay(place.stream());
  tail_.replay(place.stream());
}

Outputs Program::run(const Relaxation& r, const Place& place) {
  const cudaStream_t stream = place.stream();
  if (r.batch == 0) return results(r, stream);  // nothing to launch
  const Turn::Taken turn(turn_, stream);
  launch(buffers_.load(r), stream);
  if (runs_++ == 0) {
    issue(place.device(), stream);
  } else {
    replay(place);
  }
  return results(r, stream);
}

Outputs Program::run_captured(const Relaxation& r, const Place& place) const {
  if (r.batch > 0) {
    launch(buffers_.load(r), place.stream());
    issue(place.device(), place.stream());
  }
  return results(r, place.stream());
}

Outputs Program::results(const Relaxation& r, cudaStream_t stream) const {
  std::vector<Copy> copies;
  // what there is not is an empty tensor of its own: ops do not return the same memory twice
  const auto take = [&](const Buffer* from, const Ints& shape, ScalarType dtype) {
    const Tensor out = empty(from ? shape : Ints{0}, r.like, dtype);
    if (from) copies.push_back(take_map(*from, out));
    return out;
  };
  Tensors states, pre, drives, winners;
  for (size_t i = 1; i < r.nodes.size(); ++i) {
    const Ints& shape = r.nodes[i].shape;
    const ScalarType storage = dtype_of(buffers_.storage());
    if (lowered_.states[i]) {
      states.push_back(take(lowered_.states[i], shape, storage));
    } else {  // nothing reached it
      Tensor zero = empty(shape, r.like, storage);
      states.push_back(torch::stable::zero_(zero));
    }
    pre.push_back(take(lowered_.pre[i], shape, ScalarType::Float));
  }
  for (size_t c = 0; c < r.connections.size(); ++c) {
    const Ints& shape = r.nodes[r.connections[c].dst].shape;
    drives.push_back(take(lowered_.drives[c], shape, ScalarType::Float));
    winners.push_back(take(lowered_.winners[c], shape, ScalarType::Byte));
  }
  const Tensor residual = take(&buffers_.residual(), {r.steps, r.batch}, ScalarType::Float);
  launch(copies, stream);
  return {states, pre, drives, winners, residual};
}

}  // namespace ep::cuda
