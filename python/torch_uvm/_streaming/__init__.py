"""The streaming of weights: `torch_uvm.stream_weights`.

The modules, from the one that others build on to the one that a program calls; none imports one below it in this list.

    internals   what PyTorch does not offer to everyone, or what its types do not know
    owners      who holds memory: whether it may be overwritten
    pinned      host memory that copies are made from
    extents     which tensors share memory: what moves as one piece
    slots       device memory that is copied into, and the stream that copies
    order       in which order units are used
    plan        which weights stream and which stay
    units       weights that are copied together
    gradients   gradients in host memory
    fetch       copies units into slots before they are used
    saved       what autograd keeps instead of a weight in a slot
    forward     stands in for a module's forward
    budget      how much device memory weights may have, and need
    attach      moves the weights of a model, and back
    api         `stream_weights`, and what it returns
"""
