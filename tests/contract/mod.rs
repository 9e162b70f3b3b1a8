//! The contract of [`torch_uvm::driver::Driver`], as tests that take any machine.

pub mod allocator;
pub mod capture;
pub mod machine;
pub mod memory;
pub mod order;
pub mod real;
pub mod simulated;
