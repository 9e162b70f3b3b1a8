/* Carries the SONAME libcudart.so.12 and its version node, which wheels check when they are loaded.
 *
 * Most entry points mean the same in CUDA 12 and 13 and live, unversioned, in libtorch_uvm_sim_capi.so. Those whose name
 * stayed and whose arguments changed are here and in libcudart.so.13.c, each under its own symbol version: the dynamic
 * loader then picks the one that the caller was compiled against, even when both libraries are loaded. */
#include <stddef.h>

#define FORWARD(name, params, args)                                                                                    \
    int uvmsim_rt12_##name params;                                                                                     \
    int name params { return uvmsim_rt12_##name args; }

typedef void *ptr;

FORWARD(cudaRuntimeGetVersion, (int *version), (version))
FORWARD(cudaGetDeviceProperties_v2, (ptr prop, int device), (prop, device))
FORWARD(cudaMemAdvise, (ptr p, size_t bytes, int advice, int device), (p, bytes, advice, device))
FORWARD(cudaMemPrefetchAsync, (ptr p, size_t bytes, int device, ptr stream), (p, bytes, device, stream))
FORWARD(cudaStreamGetCaptureInfo, (ptr stream, int *status, unsigned long long *id), (stream, status, id))
FORWARD(cudaGraphGetEdges, (ptr graph, ptr from, ptr to, size_t *count), (graph, from, to, count))
FORWARD(cudaGraphNodeGetDependencies, (ptr node, ptr nodes, size_t *count), (node, nodes, count))
FORWARD(cudaGraphNodeGetDependentNodes, (ptr node, ptr nodes, size_t *count), (node, nodes, count))
FORWARD(cudaStreamUpdateCaptureDependencies, (ptr stream, ptr nodes, size_t count, unsigned flags),
        (stream, nodes, count, flags))
