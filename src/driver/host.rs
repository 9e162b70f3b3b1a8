//! Host memory that is left.
