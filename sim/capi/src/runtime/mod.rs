//! The runtime API: `cuda*`, in the forms that CUDA 12 and 13 share, and `uvmsim_rt12_*`/`uvmsim_rt13_*` where they
//! differ (see `stubs/libcudart.so.12.c`).

pub mod device;
pub mod launch;
pub mod memory;
