//! The contract of [`torch_uvm::driver::Driver`], as tests that take any machine.

use std::cell::Cell;

thread_local! {
    /// The path of the test that this thread runs, by which another process can run it too.
    pub static TEST: Cell<&'static str> = const { Cell::new("") };
}

pub mod allocator;
pub mod capture;
pub mod chunks;
pub mod machine;
pub mod memory;
pub mod order;
pub mod real;
pub mod simulated;
