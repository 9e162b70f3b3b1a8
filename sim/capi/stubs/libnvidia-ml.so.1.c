/* Carries the SONAME libnvidia-ml.so.1. Every entry point is in libtorch_uvm_sim_capi.so, which this needs. */
