// Window attention on windows of at most 64 tokens.
#include "attention_whole_backward.cuh"
#include "attention_whole_forward.cuh"

namespace swinops {

template cudaError_t launch_whole<false>(const ForwardArguments&, const AttentionShape&, cudaStream_t);
template int whole_backward_programs<false>(const Geometry&, const AttentionShape&);
template cudaError_t launch_whole_backward<false>(const BackwardArguments&, const AttentionShape&, int, cudaStream_t);

}  // namespace swinops
