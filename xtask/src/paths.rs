//! Where everything lies: the repository's own folders and what the commands make under `target/`.

use std::env;
use std::path::{Path, PathBuf};

/// The repository's root, known from where this crate was compiled.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the repository's root")
}

/// Cargo's build folder, in which everything that can be made again is kept.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) if !folder.is_empty() => root().join(folder),
        _ => root().join("target"),
    }
}

/// Where the wheels that we make go.
pub fn wheels() -> PathBuf {
    target().join("wheels")
}

/// Files fetched from elsewhere, kept so that the next run does not fetch them again.
pub fn downloads() -> PathBuf {
    target().join("downloads")
}

/// Where the allocator is built as a static library, a folder for each C++ ABI: the overlay and the plug-in share it.
pub fn bridge() -> PathBuf {
    target().join("bridge")
}

/// PyTorch's source as published, before any patch.
pub fn pristine_sources() -> PathBuf {
    target().join("sources")
}

/// The virtual environment that the patched wheel of a release is installed in.
pub fn venv(torch: &str) -> PathBuf {
    target().join(format!("venv-{torch}"))
}

/// The virtual environment that an official wheel and the plug-in are installed in.
pub fn plugin_venv(torch: &str) -> PathBuf {
    target().join(format!("venv-plugin-{torch}"))
}

/// The virtual environment that an official wheel and the plug-in with sanitizers are installed in.
pub fn sanitizers_venv(torch: &str) -> PathBuf {
    target().join(format!("venv-sanitizers-{torch}"))
}

/// The libraries that stand in for CUDA's on a simulated device.
pub fn simulator_libraries() -> PathBuf {
    target().join("sim/lib")
}

/// What the steps of `cargo xtask test` say, a file for each.
pub fn test_logs() -> PathBuf {
    target().join("test")
}

/// `path` as a reader of the terminal wants it: relative to the repository where it lies inside.
pub fn shown(path: &Path) -> std::path::Display<'_> {
    path.strip_prefix(root()).unwrap_or(path).display()
}
