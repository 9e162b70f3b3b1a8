//! Puts the simulator's libraries together in one folder, and says how a program is run on them.
//!
//! The one home of these commands: `xtask` includes this file.
//!
//! A wheel finds its CUDA libraries by run path, which goes before `LD_LIBRARY_PATH`. What goes before both is a library
//! of the same SONAME that is loaded already: so the stand-ins are preloaded.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// The engine and all entry points, as cargo builds it.
pub const ENGINE: &str = "libtorch_uvm_sim_capi.so";

/// The stand-ins, each made of `<name>.c` and the version script `<name>.map`.
pub const STAND_INS: [&str; 4] = ["libcudart.so.12", "libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1"];

/// Copies the engine `cdylib` into the folder `out` and links the stand-ins beside it from the sources in `stubs`
/// (`sim/capi/stubs`) with the C compiler `compiler`.
pub fn assemble(compiler: &OsStr, cdylib: &Path, stubs: &Path, out: &Path) -> io::Result<()> {
    fs::create_dir_all(out)?;
    let engine = out.join(ENGINE);
    // A new file rather than an overwritten one: a program that still runs on the old one keeps it.
    let fresh = out.join(format!("{ENGINE}.new"));
    fs::copy(cdylib, &fresh)?;
    fs::rename(&fresh, &engine)?;
    for name in STAND_INS {
        let fresh = out.join(format!("{name}.new"));
        let mut command = Command::new(compiler);
        command
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .arg(&fresh)
            .arg(stubs.join(format!("{name}.c")))
            .arg(format!("-Wl,-soname,{name}"))
            .arg(format!("-Wl,--version-script={}", stubs.join(format!("{name}.map")).display()))
            .args(["-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs"])
            .arg(&engine);
        let status = command.status().map_err(|e| io::Error::new(e.kind(), format!("cannot run {command:?}: {e}")))?;
        if !status.success() {
            return Err(io::Error::other(format!("{command:?} failed: {status}")));
        }
        fs::rename(&fresh, out.join(name))?;
    }
    // cudarc and Triton look for the driver under this name first.
    let alias = out.join("libcuda.so");
    if fs::symlink_metadata(&alias).is_err() {
        symlink("libcuda.so.1", &alias)?;
    }
    Ok(())
}

/// The environment variables that put a program on the simulator whose libraries lie in `out` (an absolute path):
/// what the process has in them already stays, behind ours.
#[must_use]
pub fn environment(out: &Path) -> Vec<(&'static str, OsString)> {
    let preload = STAND_INS.iter().map(|name| out.join(name).into_os_string());
    let library_path = std::iter::once(out.as_os_str().to_owned());
    vec![
        ("LD_PRELOAD", joined(preload.chain(env::var_os("LD_PRELOAD")))),
        ("LD_LIBRARY_PATH", joined(library_path.chain(env::var_os("LD_LIBRARY_PATH")))),
    ]
}

fn joined(parts: impl Iterator<Item = OsString>) -> OsString {
    let mut all = OsString::new();
    for part in parts.filter(|part| !part.is_empty()) {
        if !all.is_empty() {
            all.push(":");
        }
        all.push(part);
    }
    all
}
