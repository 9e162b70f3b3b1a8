//! The driver API: `cu*`, under the names that a library exports (`cuMemAlloc_v2`), not those that a header defines.

pub mod device;
pub mod memory;
pub mod modules;
pub mod symbols;
pub mod virtual_memory;
