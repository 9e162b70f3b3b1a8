/* Carries the SONAME libcudart.so.13 and its version node; see libcudart.so.12.c. */
#include <stddef.h>

#define FORWARD(name, params, args)                                                                                    \
    int uvmsim_rt13_##name params;                                                                                     \
    int name params { return uvmsim_rt13_##name args; }

typedef void *ptr;
typedef struct {
    int type;
    int id;
} location; /* cudaMemLocation: passed in one register, as CUDA passes it */

FORWARD(cudaRuntimeGetVersion, (int *version), (version))
FORWARD(cudaGetDeviceProperties, (ptr prop, int device), (prop, device))
FORWARD(cudaMemAdvise, (ptr p, size_t bytes, int advice, location to), (p, bytes, advice, to))
FORWARD(cudaMemPrefetchAsync, (ptr p, size_t bytes, location to, unsigned flags, ptr stream),
        (p, bytes, to, flags, stream))
FORWARD(cudaStreamGetCaptureInfo,
        (ptr stream, int *status, unsigned long long *id, ptr graph, ptr nodes, ptr edges, size_t *count),
        (stream, status, id, graph, nodes, edges, count))
FORWARD(cudaGraphGetEdges, (ptr graph, ptr from, ptr to, ptr data, size_t *count), (graph, from, to, data, count))
FORWARD(cudaGraphNodeGetDependencies, (ptr node, ptr nodes, ptr data, size_t *count), (node, nodes, data, count))
FORWARD(cudaGraphNodeGetDependentNodes, (ptr node, ptr nodes, ptr data, size_t *count), (node, nodes, data, count))
FORWARD(cudaStreamUpdateCaptureDependencies, (ptr stream, ptr nodes, ptr data, size_t count, unsigned flags),
        (stream, nodes, data, count, flags))
