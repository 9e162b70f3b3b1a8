//! With the feature `bridge`: generates the C++ side of `src/bridge.rs` and compiles it with the C++ ABI and standard
//! of the PyTorch that it will be linked into. Without: nothing.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "bridge")]
    if let Err(message) = bridge::build() {
        println!("cargo::error={message}");
    }
}

#[cfg(feature = "bridge")]
mod bridge {
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    const ABI: &str = "TORCH_UVM_CXX11_ABI";
    const STANDARD: &str = "TORCH_UVM_CXX_STANDARD";
    const HEADER_DIR: &str = "TORCH_UVM_HEADER_DIR";

    pub fn build() -> Result<(), String> {
        for variable in [ABI, STANDARD, HEADER_DIR] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        println!("cargo::rerun-if-changed=src/bridge.rs");
        println!("cargo::rerun-if-changed=cpp/torch_uvm/bridge_types.h");

        let abi = one_of(ABI, None, &["0", "1"]).map_err(|problem| {
            format!(
                "{problem}: the libstdc++ ABI flag of the PyTorch that the bridge is for. `cargo xtask wheel` and \
                 cmake/TorchUvm.cmake set it; by hand, ask `python -c 'import torch; \
                 print(int(torch._C._GLIBCXX_USE_CXX11_ABI))'`"
            )
        })?;
        let standard = one_of(STANDARD, Some("17"), &["17", "20"])?;

        cxx_build::bridge("src/bridge.rs")
            .include("cpp")
            .define("_GLIBCXX_USE_CXX11_ABI", Some(abi.as_str()))
            .std(&format!("c++{standard}"))
            .flag("-fvisibility=hidden")
            .flag("-fvisibility-inlines-hidden")
            .pic(true)
            .try_compile("torch_uvm_bridge")
            .map_err(|error| format!("compiling the C++ side of src/bridge.rs: {error}").replace('\n', " "))?;

        if let Some(dir) = env::var_os(HEADER_DIR) {
            let out_dir = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: build.rs is run by cargo")?;
            let generated = PathBuf::from(out_dir).join("cxxbridge/include");
            let dir = PathBuf::from(dir);
            install(&generated.join("torch-uvm/src/bridge.rs.h"), &dir.join("torch_uvm/bridge.rs.h"))?;
            install(&generated.join("rust/cxx.h"), &dir.join("rust/cxx.h"))?;
        }
        Ok(())
    }

    fn one_of(variable: &str, default: Option<&str>, allowed: &[&str]) -> Result<String, String> {
        let value = env::var(variable).ok().or_else(|| default.map(str::to_owned));
        match value {
            Some(value) if allowed.contains(&value.as_str()) => Ok(value),
            Some(value) => Err(format!("{variable}: '{value}' is not allowed: expected {}", allowed.join(" or "))),
            None => Err(format!("{variable} is not set: expected {}", allowed.join(" or "))),
        }
    }

    /// Copies a header, but leaves one that is the same untouched, so that whatever includes it is not compiled again.
    fn install(from: &Path, to: &Path) -> Result<(), String> {
        let text = fs::read(from).map_err(|error| format!("{}: {error}", from.display()))?;
        if fs::read(to).is_ok_and(|there| there == text) {
            return Ok(());
        }
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        }
        fs::write(to, text).map_err(|error| format!("{}: {error}", to.display()))
    }
}
