// The ops' functions, in the order of their schemas (csrc/schemas.h): included in the namespace of each backend.
std::tuple<Tensor, Tensor> drive(const Tensor& source, const Tensor& weight, const Ints& stride, const Ints& padding,
                                 int64_t pool, const std::optional<Tensor>& winners);

std::tuple<Tensor, Tensor, Tensor> relax_step(
    const Tensor& state, const std::optional<Tensor>& bias, const Tensors& drives, const Floats& drive_gains,
    const Tensors& below, const Tensors& below_weights, const Ints& below_geometry, const Floats& below_gains,
    const Tensors& above, const Tensors& above_weights, const Tensors& above_winners, const Ints& above_geometry,
    const Floats& above_gains, const std::optional<Tensor>& nudge, double nudge_gain,
    const std::optional<Tensor>& preactivation, int64_t form, int64_t phases, double damping, double slope, double lo,
    double hi, double scale, bool keep);

std::tuple<Tensor, Tensor> contrast(const Tensor& source, const std::optional<Tensor>& source_delta,
                                    const Tensor& target, const Tensor& target_delta, const Ints& weight_shape,
                                    const Ints& stride, const Ints& padding, int64_t pool,
                                    const std::optional<Tensor>& winners, double source_gain, double target_gain,
                                    double centre, double scale, int64_t operands);

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> relax(
    const Tensors& states, const Tensors& weights, const Tensors& feedback_weights, const Tensors& biases,
    const Tensors& drives, const Tensors& winners, const Tensors& free, const Tensors& preactivations,
    const Tensors& heads, const Tensors& extra, const Ints& shapes, const Ints& connections, const Ints& head_spec,
    const Ints& program, const Ints& linear_nodes, const Floats& drive_gains, const Floats& feedback_gains,
    const Floats& nudge_gains, const Floats& scales, const Floats& head_scalars, int64_t batch, int64_t phases,
    int64_t steps, int64_t form, bool frozen, bool deferred, int64_t operands, int64_t storage, bool keep,
    double damping, double slope, double lo, double hi, double tol);
