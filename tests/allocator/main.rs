//! The allocator against the simulated device.

mod caching;
mod faults;
mod figures;
mod hints;
mod limits;
mod model;
mod oversubscription;
mod private_pools;
mod room;
mod shrinking;
mod soak;
mod streams;
mod threads;
mod world;
